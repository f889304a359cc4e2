"""A session of the SQLite store: what commits together, and what never commits."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from duly.errors import (
    BrokerUnavailable,
    CommitUnknown,
    ConfigurationError,
    TransactionFailed,
    TransactionLost,
)
from duly.stores.sqlite import SQLiteStore
from tests.sqlite.programs import run as run_program
from tests.sqlite.programs import running
from tests.sqlite.stores import begin_anew, effects, execute, lose_the_transaction, rows, write


@pytest.fixture
def store(db_path: Path) -> Iterator[SQLiteStore]:
    store = SQLiteStore(db_path, begin_s=5)
    execute(db_path, "create table if not exists effects (value)")
    yield store
    store.close()


def test_effects_are_there_after_commit_and_not_before(store: SQLiteStore):
    session = store.begin(None)
    write(session, "a")
    assert effects(store.path) == []
    session.commit()
    assert effects(store.path) == ["a"]
    session.rollback()
    assert effects(store.path) == ["a"], "rollback after commit does nothing"


def test_rollback_leaves_nothing_and_gives_the_turn_back(store: SQLiteStore):
    session = store.begin(None)
    write(session, "a")
    session.rollback()
    session.rollback()
    assert effects(store.path) == []
    following = store.begin(None)
    write(following, "b")
    following.commit()
    assert effects(store.path) == ["b"]


def test_what_it_provides(store: SQLiteStore):
    provided = store.capabilities
    assert provided.name == "SQLite"
    assert provided.database == store.file.identity
    assert provided.one_writer
    assert provided.outbox
    assert provided.durable
    assert provided.tx_s == 0.05


def test_a_second_session_waits_for_the_first(store: SQLiteStore):
    first = store.begin(None)
    order = []

    def second() -> None:
        session = store.begin(None)
        order.append("second")
        write(session, "second")
        session.commit()

    thread = threading.Thread(target=second)
    thread.start()
    write(first, "first")
    order.append("first")
    first.commit()
    thread.join(10)
    assert order == ["first", "second"]
    assert effects(store.path) == ["first", "second"]


def test_who_tries_again_waits_where_it_waited_before(db_path: Path):
    """One thread waits for the turn, however often somebody has given up on it."""
    store, holder = SQLiteStore(db_path, begin_s=0.05), SQLiteStore(db_path)
    held = holder.begin(None)
    before = threading.active_count()
    for _ in range(5):
        with pytest.raises(BrokerUnavailable):
            store.begin(None)
    assert threading.active_count() <= before + 1
    held.rollback()
    store.begin(None).rollback()
    store.close()
    holder.close()


def test_a_turn_that_does_not_come_is_unavailable_and_names_who_has_it(db_path: Path):
    store = SQLiteStore(db_path, begin_s=0.1)
    session = store.begin(None)
    with pytest.raises(BrokerUnavailable, match="another thread of this process"):
        store.begin(None)
    session.rollback()
    store.begin(None).rollback()
    store.close()


def test_a_foreign_lock_is_unavailable_and_the_turn_is_given_back(db_path: Path):
    store = SQLiteStore(db_path)
    store.file.busy_s = 0.1
    foreign = sqlite3.connect(db_path, isolation_level=None)
    foreign.execute("begin immediate")
    with pytest.raises(BrokerUnavailable, match="nothing was changed"):
        store.begin(None)
    foreign.close()
    turn = store.file.turn()
    turn.acquire(0)
    turn.close()
    store.begin(None).rollback()
    store.close()


def test_savepoints_undo_one_part(store: SQLiteStore):
    session = store.begin(None)
    write(session, "a")
    session.savepoint()
    write(session, "b")
    session.rollback_to_savepoint()
    session.savepoint()
    write(session, "c")
    session.release_savepoint()
    session.savepoint()
    write(session, "d")
    session.rollback_to_savepoint()
    session.commit()
    assert effects(store.path) == ["a", "c"]


def test_a_handlers_own_savepoints_go_with_dulys(store: SQLiteStore):
    session = store.begin(None)
    session.savepoint()
    session.connection.execute("savepoint mine")
    write(session, "a")
    session.rollback_to_savepoint()
    session.savepoint()
    session.connection.execute("savepoint mine")
    write(session, "b")
    session.release_savepoint()
    session.commit()
    assert effects(store.path) == ["b"]


def test_a_savepoint_of_a_transaction_that_was_rolled_back_is_lost(store: SQLiteStore):
    for anew in (False, True):
        session = store.begin(None)
        session.savepoint()
        lose_the_transaction(session)
        if anew:
            begin_anew(session)
        with pytest.raises(TransactionLost):
            session.rollback_to_savepoint()
        session.rollback()
        session = store.begin(None)
        session.savepoint()
        lose_the_transaction(session)
        if anew:
            begin_anew(session)
        with pytest.raises(TransactionLost):
            session.release_savepoint()
        session.rollback()
    assert effects(store.path) == []


@pytest.mark.parametrize("anew", [False, True])
def test_a_swallowed_rollback_is_never_committed(store: SQLiteStore, anew: bool):
    session = store.begin(None)
    write(session, "before")
    lose_the_transaction(session)
    if anew:
        begin_anew(session)
    with pytest.raises(TransactionLost, match="Nothing of it was kept"):
        session.commit()
    session.rollback()
    assert effects(store.path) == []
    following = store.begin(None)
    write(following, "following")
    following.commit()
    assert effects(store.path) == ["following"]


def test_an_error_of_a_statement_that_did_not_end_the_transaction_may_be_handled(
    store: SQLiteStore,
):
    session = store.begin(None)
    session.connection.execute("create table once (a primary key)")
    session.connection.execute("insert into once values (1)")
    with pytest.raises(sqlite3.IntegrityError):
        session.connection.execute("insert into once values (1)")
    session.commit()
    assert rows(store.path, "select a from once") == [(1,)]


def test_a_commit_that_the_database_refuses_is_failed_and_rolled_back(db_path: Path):
    store = SQLiteStore(db_path, foreign_keys=True)
    session = store.begin(None)
    session.connection.execute("create table parent (a primary key)")
    session.connection.execute(
        "create table child (a references parent deferrable initially deferred)"
    )
    session.commit()
    session = store.begin(None)
    session.connection.execute("insert into child values (1)")
    with pytest.raises(TransactionFailed, match="FOREIGN KEY"):
        session.commit()
    session.rollback()
    assert rows(db_path, "select * from child") == []
    store.begin(None).commit()
    store.close()


def test_a_commit_without_an_answer_is_unknown_and_its_connection_is_not_used_again(
    store: SQLiteStore, monkeypatch: pytest.MonkeyPatch
):
    from duly.sql.sqlite import driver

    really_commit = driver.commit

    def lose_the_answer(*args: Any) -> None:
        really_commit(*args)
        raise CommitUnknown("the answer was lost")

    session = store.begin(None)
    write(session, "a")
    monkeypatch.setattr(driver, "commit", lose_the_answer)
    with pytest.raises(CommitUnknown):
        session.commit()
    monkeypatch.undo()
    used = session.connection
    session.rollback()
    following = store.begin(None)
    assert following.connection is not used
    following.rollback()
    assert effects(store.path) == ["a"]


def test_a_disk_that_is_full_at_commit_fails_the_transaction_and_nothing_else(db_path: Path):
    said = run_program(
        """
        import os, resource, sys
        from duly.errors import TransactionFailed
        from duly.stores.sqlite import SQLiteStore

        store = SQLiteStore(sys.argv[1])
        session = store.begin(None)
        session.connection.execute("create table effects (value)")
        session.commit()
        size = os.stat(sys.argv[1] + "-wal").st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20_000, resource.RLIM_INFINITY))
        session = store.begin(None)
        session.connection.execute("insert into effects values (zeroblob(500000))")
        try:
            session.commit()
        except TransactionFailed as error:
            print("failed", "rolled back" in str(error))
        session.rollback()
        session = store.begin(None)
        session.connection.execute("insert into effects values ('small')")
        session.commit()
        print("small")
        """,
        db_path,
    )
    assert said == ["failed True", "small"]
    assert effects(db_path) == ["small"]


def test_what_a_handler_set_on_the_connection_is_gone_for_the_next(store: SQLiteStore):
    session = store.begin(None)
    session.connection.row_factory = sqlite3.Row
    session.connection.text_factory = bytes
    session.commit()
    session = store.begin(None)
    assert session.connection.execute("select 'x'").fetchone() == ("x",)
    session.rollback()


def test_a_cursor_that_a_handler_left_open_does_not_stop_the_next_transaction(store: SQLiteStore):
    session = store.begin(None)
    write(session, *"abc")
    kept = session.connection.execute("select value from effects")
    kept.fetchone()
    session.commit()
    other = sqlite3.connect(store.path)
    other.execute("insert into effects values ('d')")
    other.commit()
    other.close()
    session = store.begin(None)
    write(session, "e")
    session.commit()
    assert effects(store.path) == ["a", "b", "c", "d", "e"]
    assert kept is not None


def test_a_cursor_kept_in_the_middle_of_a_write_fails_its_transaction_and_no_other(
    store: SQLiteStore,
):
    session = store.begin(None)
    kept = session.connection.execute("insert into effects values ('a'), ('b') returning value")
    with pytest.raises(TransactionFailed, match="RETURNING: fetch all"):
        session.commit()
    session.rollback()
    session = store.begin(None)
    session.savepoint()
    also_kept = session.connection.execute("insert into effects values ('c') returning value")
    with pytest.raises(TransactionFailed, match="RETURNING: fetch all"):
        session.release_savepoint()
    session.rollback()
    session = store.begin(None)
    session.savepoint()
    write(session, "d")
    session.release_savepoint()
    session.commit()
    assert effects(store.path) == ["d"]
    assert kept is not also_kept


def test_the_connection_works_on_another_thread(store: SQLiteStore):
    session = store.begin(None)
    thread = threading.Thread(target=write, args=(session, "a"))
    thread.start()
    thread.join()
    session.commit()
    assert effects(store.path) == ["a"]


def test_a_commit_wakes_who_waits_for_changes(store: SQLiteStore):
    seen = store.file.wait(store.file.changes(), 0.05)
    session = store.begin(None)
    write(session, "a")
    session.commit()
    assert store.file.changes() != seen
    assert store.file.stats.commits == store.file.stats.fsyncs == 1


HOLD = """
    import sys
    from duly.stores.sqlite import SQLiteStore

    store = SQLiteStore(sys.argv[1])
    session = store.begin(None)
    session.connection.execute("insert into effects values ('killed')")
    print("open")
    sys.stdin.readline()
"""


def test_a_killed_process_leaves_no_effect_and_no_lock(store: SQLiteStore):
    with running(HOLD, store.path) as holder:
        holder.expect("open")
        holder.kill()
        began = time.monotonic()
        session = store.begin(None)
        assert time.monotonic() - began < 10, "nobody waits for the dead"
        write(session, "next")
        session.commit()
    assert effects(store.path) == ["next"]


def test_a_forked_child_is_told_to_open_its_own(db_path: Path):
    said = run_program(
        """
        import os, sys
        from duly.errors import ConfigurationError
        from duly.stores.sqlite import SQLiteStore

        store = SQLiteStore(sys.argv[1])
        store.begin(None).rollback()
        if (child := os.fork()) == 0:
            try:
                store.begin(None)
            except ConfigurationError as error:
                print("after forking" in str(error))
            sys.stdout.flush()
            os._exit(0)
        os.waitpid(child, 0)
        store.begin(None).commit()
        print("parent goes on")
        """,
        db_path,
    )
    assert said == ["True", "parent goes on"]


def test_a_session_without_a_scope_admits_nothing(store: SQLiteStore):
    session = store.begin(None)
    with pytest.raises(TypeError, match="without a scope"):
        session.admit([])
    session.rollback()


def test_a_session_that_is_over_says_so(store: SQLiteStore):
    session = store.begin(None)
    session.commit()
    with pytest.raises(TransactionLost, match="over"):
        session.commit()
    with pytest.raises(TransactionLost, match="over"):
        session.publish([])


def test_a_closed_store_is_refused(db_path: Path):
    store = SQLiteStore(db_path)
    store.close()
    store.close()
    with pytest.raises(ConfigurationError, match="closed"):
        store.begin(None)


def test_closing_with_a_session_open_ends_well(db_path: Path):
    store = SQLiteStore(db_path)
    session = store.begin(None)
    store.close()
    session.rollback()
    other = SQLiteStore(db_path, begin_s=1)
    other.begin(None).rollback()
    other.close()

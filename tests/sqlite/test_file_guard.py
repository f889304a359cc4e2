"""The handler's connection: everything works on it but ending duly's transaction."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from duly.errors import ConfigurationError, DulyError, TransactionLost
from duly.sql.sqlite import DatabaseFile
from duly.sql.sqlite.guard import Guard, GuardedConnection
from duly.sql.steps import Ask, Steps
from tests.sqlite.stores import execute


@pytest.fixture
def file(db_path: Path) -> Iterator[DatabaseFile]:
    file = DatabaseFile.open(db_path, busy_s=1)
    execute(db_path, "create table if not exists theirs (a)")
    yield file
    file.close()


@pytest.fixture
def guard(file: DatabaseFile) -> Iterator[Guard]:
    guard = Guard(
        file.connect(GuardedConnection, isolation_level="IMMEDIATE"), file.path, file.tables
    )
    guard.begin(1)
    yield guard
    guard.close()


def committed(guard: Guard) -> list[Any]:
    """What another connection sees."""
    other = sqlite3.connect(guard._path)
    try:
        return [a for (a,) in other.execute("select a from theirs order by rowid")]
    finally:
        other.close()


def with_block(connection: sqlite3.Connection) -> None:
    with connection:
        connection.execute("insert into theirs values ('inside')")


ENDINGS: dict[str, Callable[[sqlite3.Connection], object]] = {
    "commit()": lambda c: c.commit(),
    "rollback()": lambda c: c.rollback(),
    "with": with_block,
    "execute commit": lambda c: c.execute("COMMIT"),
    "execute commit with a comment": lambda c: c.execute("/* now */ commit transaction"),
    "execute end": lambda c: c.execute("end"),
    "execute rollback": lambda c: c.execute("ROLLBACK"),
    "cursor execute": lambda c: c.cursor().execute("COMMIT"),
    "executescript": lambda c: c.executescript("select 1"),
    "cursor executescript": lambda c: c.cursor().executescript("select 1"),
    "close": lambda c: c.close(),
    "isolation_level": lambda c: setattr(c, "isolation_level", None),
    "autocommit": lambda c: setattr(c, "autocommit", True),
    "set_authorizer": lambda c: c.set_authorizer(None),
    "attach": lambda c: c.execute("attach database ':memory:' as other"),
    "detach": lambda c: c.execute("detach database main"),
    "synchronous": lambda c: c.execute("pragma synchronous = off"),
    "journal_mode": lambda c: c.execute("pragma journal_mode = delete"),
    "locking_mode": lambda c: c.execute("pragma locking_mode = exclusive"),
    "wal_checkpoint": lambda c: c.execute("pragma wal_checkpoint(truncate)"),
    "wal_autocheckpoint": lambda c: c.execute("pragma wal_autocheckpoint = 1"),
    "writable_schema": lambda c: c.execute("pragma writable_schema = on"),
    "foreign_keys": lambda c: c.execute("pragma foreign_keys = on"),
    "duly's savepoint": lambda c: c.execute("savepoint duly_message"),
    "duly's tables": lambda c: c.execute("delete from duly_inbox"),
    "drop duly's tables": lambda c: c.execute("drop table duly_inbox"),
    "alter duly's tables": lambda c: c.execute("alter table duly_inbox rename to x"),
    "duly's mark": lambda c: c.execute("delete from temp.duly_mark"),
    "drop duly's mark": lambda c: c.execute("drop table temp.duly_mark"),
    "hide duly's tables": lambda c: c.execute("create temp table duly_claims (a)"),
    "hide them by a view": lambda c: c.execute("create temp view duly_claims as select 1"),
    "trigger on duly's tables": lambda c: c.execute(
        "create trigger t before delete on duly_claims begin select raise(rollback, 'no'); end"
    ),
    "passing trigger on duly's tables": lambda c: c.execute(
        "create temp trigger t before delete on duly_claims begin select raise(ignore); end"
    ),
    "index on duly's tables": lambda c: c.execute("create unique index i on duly_claims (worker)"),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_would_end_or_weaken_the_transaction_is_refused(guard: Guard, ending: str):
    guard.connection.execute("insert into theirs values ('before')")
    with pytest.raises(ConfigurationError) as error:
        ENDINGS[ending](guard.connection)
    assert len(str(error.value)) > 60, "it says what to do"
    assert guard.in_transaction
    assert committed(guard) == []
    guard.commit()
    assert committed(guard) == ["before"]


UNBOUND: dict[str, Callable[[sqlite3.Connection], object]] = {
    "commit": sqlite3.Connection.commit,
    "rollback": sqlite3.Connection.rollback,
    "executescript": lambda c: sqlite3.Connection.executescript(c, "select 1"),
    "cursor executescript": lambda c: sqlite3.Cursor(c).executescript("select 1"),
    "with": lambda c: sqlite3.Connection.__exit__(c, None, None, None),
}


@pytest.mark.parametrize("ending", UNBOUND)
def test_going_around_the_methods_meets_the_authorizer(guard: Guard, ending: str):
    guard.connection.execute("insert into theirs values ('before')")
    with pytest.raises(sqlite3.DatabaseError, match="not authorized"):
        UNBOUND[ending](guard.connection)
    assert guard.in_transaction
    assert committed(guard) == []


def test_dulys_own_commit_does_not_open_a_way_for_the_handlers(guard: Guard):
    """A prepared COMMIT in the driver's cache would pass the authorizer."""
    for mark in range(2, 5):
        guard.commit()
        guard.begin(mark)
        with pytest.raises(ConfigurationError):
            guard.connection.execute("COMMIT")
        with pytest.raises(ConfigurationError):
            sqlite3.Cursor(guard.connection).execute("COMMIT")
    assert guard.in_transaction


def test_everything_else_works(guard: Guard):
    connection = guard.connection
    assert isinstance(connection, sqlite3.Connection)
    connection.execute("create table made (a integer primary key, b)")
    connection.execute("create index made_b on made (b)")
    connection.executemany("insert into made (b) values (?)", [("x",), ("y",)])
    cursor = connection.cursor()
    assert cursor.execute("insert into made (b) values ('z') returning a").fetchone() == (3,)
    connection.execute("update made set b = 'q' where a = 1")
    connection.execute("with w as (select 9 as n) insert into made (b) select n from w")
    connection.execute("savepoint mine")
    connection.execute("delete from made")
    connection.execute("rollback to mine")
    connection.execute("release mine")
    connection.execute("alter table made add column c")
    connection.execute("create temp table scratch (a)")
    connection.execute("insert into scratch values (1)")
    assert connection.execute("pragma table_info(made)").fetchall()
    assert connection.execute("pragma user_version").fetchone() == (0,)
    assert [b for (b,) in connection.execute("select b from made order by a")] == ["q", "y", "z", 9]
    assert connection.execute("select count(*) from duly_inbox").fetchone() == (0,)
    connection.execute("drop table scratch")
    guard.commit()
    other = sqlite3.connect(guard._path)
    assert other.execute("select count(*) from made").fetchone() == (4,)
    other.close()


def look() -> Steps[list[tuple[Any, ...]]]:
    rows: list[tuple[Any, ...]] = yield Ask("outbox_first", (10,))
    return rows


def test_what_the_handler_sets_does_not_reach_dulys_statements(guard: Guard):
    guard.connection.row_factory = sqlite3.Row
    guard.connection.text_factory = bytes

    def put() -> Steps[None]:
        yield Ask("outbox_put", ("topic", "test", "a", None, 0, None, None, b""))

    guard.run(put())
    [row] = guard.run(look())
    assert type(row) is tuple
    assert row[3] == "a"
    assert guard.connection.text_factory is bytes, "and stays what the handler set"
    assert isinstance(guard.connection.execute("select 1").fetchone(), sqlite3.Row)
    guard.reset()
    assert guard.connection.execute("select 'x'").fetchone() == ("x",)


def test_what_would_interrupt_the_handlers_statements_does_not_reach_dulys(guard: Guard):
    guard.connection.execute("insert into theirs values ('before')")
    guard.connection.set_progress_handler(lambda: 1, 1)
    with pytest.raises(sqlite3.OperationalError, match="interrupted"):
        guard.connection.execute("select * from theirs")
    assert guard.run(look()) == []
    guard.execute("savepoint duly_x")
    guard.commit()
    assert committed(guard) == ["before"]


def test_what_makes_parameters_and_loses_the_transaction_is_followed_by_no_write(guard: Guard):
    guard.connection.execute("create table once (a primary key)")

    def careless() -> Iterator[tuple[str]]:
        yield ("first",)
        for conflict in ("abort", "rollback"):  # the second one is lost, and swallowed
            with contextlib.suppress(sqlite3.IntegrityError):
                guard.connection.execute(f"insert or {conflict} into once values (1)")
        yield ("second",)

    for many in (guard.connection.executemany, guard.connection.cursor().executemany):
        if not guard.in_transaction:
            guard.begin(2)
            guard.connection.execute("create table once (a primary key)")
        with pytest.raises(TransactionLost):
            many("insert into theirs values (?)", careless())
        assert committed(guard) == []


def fill(guard: Guard) -> None:
    """Make SQLite roll back by itself, and swallow the error as a careless handler does."""
    connection = guard.connection
    [(pages,)] = guard._runner.execute("pragma page_count")
    guard.execute(f"pragma max_page_count = {pages + 2}")
    rows = [("x" * 4000,)] * 100
    with pytest.raises(sqlite3.OperationalError, match="full"):
        connection.executemany("insert into theirs values (?)", rows)
    connection.own = True
    guard._runner.execute("pragma max_page_count = 1000000")
    connection.own = False


# Prepared before the rollback, so that no authorizer is asked again; the driver knows of none that
# the last ones write.
WRITES: dict[str, Callable[[Any], object]] = {
    "insert": lambda c: c.execute("insert into theirs values ('after')"),
    "many": lambda c: c.executemany("insert into theirs values (?)", [("after",)]),
    "a cursor": lambda c: c.cursor().execute("insert into theirs values ('after')"),
    "a plain cursor": lambda c: c.execute("select 1").execute(
        "insert into theirs values ('after')"
    ),
    "with": lambda c: c.execute("with w as (select 1) insert into theirs select 'after' from w"),
    "a comment": lambda c: c.execute("/* I */ insert into theirs values ('after')"),
    "create": lambda c: c.execute("create table if not exists after (a)"),
}


@pytest.mark.parametrize("before", [True, False], ids=["prepared", "new"])
@pytest.mark.parametrize("write", WRITES)
def test_what_follows_a_rollback_by_sqlite_itself_is_undone(guard: Guard, write: str, before: bool):
    if before:
        WRITES[write](guard.connection)
        guard.roll_back()
        guard.begin(2)
    fill(guard)
    assert not guard.in_transaction, "SQLite rolled back: else this test proves nothing"
    for _ in range(2):
        with contextlib.suppress(TransactionLost):
            WRITES[write](guard.connection)
        assert committed(guard) == []
    with pytest.raises(TransactionLost):
        guard.commit()
    guard.roll_back()
    assert committed(guard) == []
    other = sqlite3.connect(guard._path)
    assert other.execute("select count(*) from sqlite_master where name = 'after'").fetchone() == (
        0,
    )
    other.close()
    guard.begin(3)
    guard.connection.execute("insert into theirs values ('next')")
    guard.commit()
    assert committed(guard) == ["next"], "and the next transaction is whole"


@pytest.mark.parametrize("end", [Guard.commit, Guard.roll_back])
@pytest.mark.parametrize("write", [write for write in WRITES if write != "a plain cursor"])
def test_a_connection_kept_beyond_its_transaction_begins_no_other(
    guard: Guard, end: Callable[[Guard], object], write: str
):
    connection = guard.connection
    WRITES[write](connection)
    end(guard)
    stands = committed(guard)
    with pytest.raises(TransactionLost):
        WRITES[write](connection)
    assert not connection.in_transaction
    assert committed(guard) == stands


def test_a_handlers_statement_costs_no_call_of_ours(guard: Guard):
    """Until it has a statement that the driver would not begin a transaction for."""
    plain = sqlite3.Connection.execute
    connection = guard.connection
    connection.execute("insert into theirs values (1)")
    assert type(connection).execute is plain
    connection.execute("with w as (select 1) select * from w")
    guard.commit()
    guard.begin(2)
    assert type(connection).execute is not plain, "it is in the driver's cache"


def test_a_transaction_begun_anew_behind_dulys_back_is_not_committed(guard: Guard):
    guard.connection.execute("insert into theirs values ('before')")
    fill(guard)
    # Past the cursor's check the driver begins by itself, before a statement that writes.
    sqlite3.Cursor(guard.connection).execute("insert into theirs values ('after')")
    assert guard.in_transaction
    with pytest.raises(TransactionLost):
        guard.commit()
    guard.roll_back()
    assert committed(guard) == []


def test_a_handler_cannot_forge_the_mark(guard: Guard):
    fill(guard)
    with pytest.raises(ConfigurationError, match="duly_mark"):
        sqlite3.Cursor(guard.connection).execute("insert into temp.duly_mark values (1)")


def test_the_mark_leaves_no_page_in_the_file(guard: Guard):
    [(before,)] = guard._runner.execute("pragma page_count")
    wal = Path(f"{guard._path}-wal")
    size = wal.stat().st_size if wal.exists() else 0
    for mark in range(2, 20):
        guard.commit()
        guard.begin(mark)
    assert (wal.stat().st_size if wal.exists() else 0) == size
    assert guard._runner.execute("pragma page_count") == [(before,)]


def test_a_refusal_is_no_sqlite_error_that_a_handler_would_swallow():
    assert not issubclass(ConfigurationError, sqlite3.Error)
    assert issubclass(TransactionLost, DulyError)

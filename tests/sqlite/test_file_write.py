"""Group commit: shared fsyncs, errors that stay their caller's, and what a failure means."""

from __future__ import annotations

import fcntl
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from duly.errors import BrokerUnavailable, BrokerUnusable, CommitUnknown, ConfigurationError
from duly.message import Message
from duly.sql import outbox
from duly.sql.sqlite import DatabaseFile
from duly.sql.sqlite.driver import is_certain, single_statements
from duly.sql.steps import Ask, Steps
from tests.sqlite.programs import run, running
from tests.waiting import eventually


@pytest.fixture
def file(db_path: Path) -> Iterator[DatabaseFile]:
    file = DatabaseFile.open(db_path, busy_s=10)
    yield file
    file.close()


def put(id: str, body: bytes = b"") -> Callable[[], Steps[Any]]:
    message: Message[Any] = Message("topic", "test", id, body, 0)
    return lambda: outbox.put({"topic"}, [message])


def writing(file: DatabaseFile, id: str, *, durable: bool = True) -> Callable[[], Any]:
    return lambda: file.write(put(id), durable=durable)


def stored(file: DatabaseFile) -> list[str]:
    return [message.id for _, message in file.read(lambda: outbox.first(10_000))]


def together(file: DatabaseFile, writes: list[Callable[[], Any]]) -> list[Any]:
    """Make the writes queue while the turn is taken, so that they become one group."""
    ended: list[Any] = [None] * len(writes)

    def one(index: int) -> None:
        try:
            ended[index] = writes[index]()
        except Exception as error:
            ended[index] = error

    turn = file.turn()
    turn.acquire(10)
    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(writes))]
    for thread in threads:
        thread.start()
    eventually(lambda: len(file._writer._queue) == len(writes), "all writes queue")
    turn.close()
    for thread in threads:
        thread.join()
    return ended


def test_a_write_is_there_on_return(file: DatabaseFile):
    file.write(put("a"))
    assert stored(file) == ["a"]
    assert (file.stats.commits, file.stats.fsyncs) == (1, 1)


def test_a_write_that_need_not_be_durable_is_not_synced(file: DatabaseFile):
    file.write(put("a"), durable=False)
    file.write(put("b"), durable=False)
    assert (file.stats.commits, file.stats.fsyncs) == (2, 0)
    file.write(put("c"))
    assert (file.stats.commits, file.stats.fsyncs) == (3, 1)
    assert stored(file) == ["a", "b", "c"]


def test_each_write_has_the_synchronous_level_it_asked_for(db_path: Path):
    file = DatabaseFile.open(db_path)
    levels = []
    for durable in (True, False, False, True):
        file.write(put("x"), durable=durable)
        assert file._writer._connection is not None
        levels += file._writer._connection.execute("pragma synchronous").fetchone()
    assert levels == [2, 1, 1, 2]
    file.close()


def test_writes_that_queue_share_one_commit(file: DatabaseFile):
    together(file, [writing(file, str(i)) for i in range(30)])
    assert sorted(stored(file), key=int) == [str(i) for i in range(30)]
    assert (file.stats.commits, file.stats.fsyncs) == (1, 1)


def test_one_durable_write_makes_its_group_durable(file: DatabaseFile):
    together(file, [writing(file, str(i), durable=i == 3) for i in range(5)])
    assert (file.stats.commits, file.stats.fsyncs) == (1, 1)


def test_fifty_callers_share_fsyncs(file: DatabaseFile):
    def publish(caller: int) -> None:
        for n in range(20):
            file.write(put(f"{caller}-{n}"))

    threads = [threading.Thread(target=publish, args=(i,)) for i in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ids = stored(file)
    assert len(ids) == len(set(ids)) == 1000
    assert file.stats.fsyncs < 500
    for caller in range(50):
        own = [id for id in ids if id.startswith(f"{caller}-")]
        assert own == [f"{caller}-{n}" for n in range(20)], "each caller's are in its order"


@pytest.mark.parametrize("obstacle", ["a turn", "a lock", "a checkpoint"])
def test_whose_write_is_stored_is_told_before_anybody_waits(
    file: DatabaseFile, monkeypatch: pytest.MonkeyPatch, obstacle: str
):
    """The next to lead tells them, but not after it has waited for its turn or for a foreign
    program; and not after its predecessor has moved the log.
    """
    gates = {"first": threading.Event(), "third": threading.Event()}  # each the last of its group
    callers: dict[str, threading.Thread] = {}
    foreign = sqlite3.connect(file.path, isolation_level=None, check_same_thread=False)
    rival, free_again = file.turn(), threading.Event()
    writer, before_release = file._writer, file.before_release

    def write(name: str) -> None:
        def make_steps() -> Steps[Any]:
            if name in gates:
                gates[name].wait(20)
            return put(name)()

        def call() -> None:
            file.write(make_steps)

        callers[name] = threading.Thread(target=call)
        callers[name].start()

    def be_in_the_way(before_long: Callable[[], None]) -> None:
        before_release(before_long)
        if "third" not in stored(file) or free_again.is_set():
            return
        if obstacle == "a lock":
            foreign.execute("begin immediate")
        elif obstacle == "a turn":
            callers["rival"] = threading.Thread(target=rival.acquire, args=(20,))
            callers["rival"].start()
            eventually(lambda: _is_taken(file.folder / "queue.lock"), "the rival is next")
        else:
            before_long()
            free_again.wait(20)

    monkeypatch.setattr(writer, "_before_release", be_in_the_way)
    write("first")
    eventually(lambda: writer._led and not writer._queue, "the first leads")
    write("second")
    eventually(lambda: len(writer._queue) == 1, "the second is next")
    write("third")
    eventually(lambda: len(writer._queue) == 2, "the third goes with it")
    gates["first"].set()
    eventually(lambda: not writer._queue, "the second leads both")
    write("fourth")
    eventually(lambda: len(writer._queue) == 1, "the fourth is next")
    gates["third"].set()
    callers["third"].join(10)
    told = not callers["third"].is_alive()
    assert callers["fourth"].is_alive(), "it was not in the way"
    free_again.set()
    if obstacle == "a lock":
        foreign.execute("rollback")
    if "rival" in callers:
        callers["rival"].join(20)
    rival.close()
    foreign.close()
    for thread in callers.values():
        thread.join(20)
    assert told
    assert stored(file) == ["first", "second", "third", "fourth"]


def _is_taken(lock: Path) -> bool:
    with lock.open("rb") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def test_one_callers_failure_is_its_own(file: DatabaseFile):
    def failing() -> Steps[None]:
        yield Ask("outbox_put", ("topic", "test", "bad", None, 0, None, None, b""))
        raise LookupError("mine")

    writes = [writing(file, str(i)) for i in range(10)]
    ended = together(file, [*writes[:5], lambda: file.write(failing), *writes[5:]])
    assert isinstance(ended[5], LookupError)
    assert not [error for error in ended[:5] + ended[6:] if isinstance(error, Exception)]
    assert sorted(stored(file), key=int) == [str(i) for i in range(10)]


class Shelf:
    """Puts names away and gives each its place, or fails where one is called ``bad``."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def put(self, names: Sequence[str]) -> Steps[list[str]]:
        self.asked.append([*names])
        for name in names:
            yield Ask("outbox_put", ("topic", "test", name, None, 0, None, None, b""))
            if name == "bad":
                raise LookupError(name)
        return [f"place of {name}" for name in names]


def writing_items(file: DatabaseFile, names: Sequence[str], shelf: Shelf) -> Callable[[], Any]:
    return lambda: file.write_items(names, shelf.put)


def test_items_of_several_callers_are_written_in_one_go(file: DatabaseFile):
    shelf, another = Shelf(), Shelf()
    callers = [["a", "b"], ["c"], ["d", "e", "f"]]
    writes: list[Callable[[], Any]] = [
        lambda: file.write_items(callers[0], shelf.put),
        lambda: file.write_items(callers[1], shelf.put),
        lambda: file.write_items(["x"], another.put),
        writing(file, "y"),
        lambda: file.write_items(callers[2], shelf.put),
    ]
    ended = together(file, writes)
    assert [ended[i] for i in (0, 1, 4)] == [[f"place of {n}" for n in c] for c in callers]
    assert ended[2] == ["place of x"]
    assert [sorted(names) for names in shelf.asked] == [["a", "b", "c", "d", "e", "f"]]
    assert another.asked == [["x"]]
    assert sorted(stored(file)) == ["a", "b", "c", "d", "e", "f", "x", "y"]
    assert file.stats.commits == 1


def test_one_callers_items_that_fail_are_its_own(file: DatabaseFile):
    shelf = Shelf()
    given = [["a"], ["bad", "b"], ["c"]]
    ended = together(file, [writing_items(file, names, shelf) for names in given])
    assert isinstance(ended[1], LookupError)
    assert [ended[0], ended[2]] == [["place of a"], ["place of c"]]
    assert sorted(stored(file)) == ["a", "c"]


def test_what_many_callers_write_at_once_is_looked_at_in_parts(file: DatabaseFile):
    shelf = Shelf()
    given = [[f"{caller}-{n}" for n in range(400)] for caller in range(5)]
    ended = together(file, [writing_items(file, names, shelf) for names in given])
    assert ended == [[f"place of {n}" for n in names] for names in given]
    assert sorted(map(len, shelf.asked)) == [400, 800, 800]


def test_a_statement_that_fails_is_one_of_dulys_errors(file: DatabaseFile):
    def broken() -> Steps[None]:
        yield Ask("outbox_put", ("topic", None, "bad", None, 0, None, None, b""))

    with pytest.raises(BrokerUnusable, match="NOT NULL"):
        file.write(broken)
    file.write(put("good"))
    assert stored(file) == ["good"]


def test_a_group_whose_commit_is_unknown_is_not_run_again(
    file: DatabaseFile, monkeypatch: pytest.MonkeyPatch
):
    from duly.sql.sqlite import driver, writer

    really_commit = driver.commit

    def lose_the_answer(connection: sqlite3.Connection, path: Path) -> None:
        really_commit(connection, path)
        raise CommitUnknown("the answer was lost")

    file.write(put("before"))
    monkeypatch.setattr(writer, "commit", lose_the_answer)
    ended = together(file, [writing(file, str(i)) for i in range(5)])
    assert all(isinstance(error, CommitUnknown) for error in ended)
    monkeypatch.undo()
    assert sorted(stored(file)) == ["0", "1", "2", "3", "4", "before"]
    file.write(put("after"))


def test_an_interrupted_leader_hands_on_what_others_had_queued(file: DatabaseFile):
    def interrupted() -> Steps[None]:
        yield Ask("outbox_first", (1,))
        raise KeyboardInterrupt

    caught = []

    def interrupt() -> None:
        try:
            file.write(interrupted)
        except KeyboardInterrupt as error:
            caught.append(error)

    writes = [writing(file, str(i)) for i in range(10)]
    together(file, [interrupt, *writes])
    assert len(caught) == 1
    assert sorted(stored(file), key=int) == [str(i) for i in range(10)]


def test_a_lock_held_by_a_foreign_program_is_waited_for_and_then_reported(db_path: Path):
    file = DatabaseFile.open(db_path, busy_s=0.1)
    foreign = sqlite3.connect(db_path, isolation_level=None)
    foreign.execute("begin immediate")
    with pytest.raises(BrokerUnavailable, match=r"nothing was changed.*sqlite3 shell"):
        file.write(put("a"))
    foreign.close()
    file.write(put("b"))
    assert stored(file) == ["b"]
    file.close()


def test_a_full_database_stores_nothing_of_what_failed_and_goes_on(file: DatabaseFile):
    file.write(put("a"))
    assert file._writer._connection is not None
    (pages,) = file._writer._connection.execute("pragma page_count").fetchone()
    file._writer._connection.execute(f"pragma max_page_count = {pages + 5}")
    small = [writing(file, f"small-{i}") for i in range(3)]
    ended = together(file, [*small, lambda: file.write(put("big", b"x" * 1_000_000))])
    assert isinstance(ended[3], BrokerUnavailable)
    assert "make room" in str(ended[3])
    assert sorted(stored(file)) == ["a", "small-0", "small-1", "small-2"]


def test_a_disk_that_refuses_at_commit_certainly_stored_nothing(db_path: Path):
    said = run(
        """
        import os, resource, sys
        from duly.errors import BrokerUnavailable
        from duly.sql import outbox
        from duly.message import Message
        from duly.sql.sqlite import DatabaseFile

        def put(id, body):
            return lambda: outbox.put({"t"}, [Message("t", "s", id, body, 0)])

        file = DatabaseFile.open(sys.argv[1])
        file.write(put("a", b""))
        size = os.stat(sys.argv[1] + "-wal").st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20_000, resource.RLIM_INFINITY))
        try:
            file.write(put("b", b"x" * 500_000))
        except BrokerUnavailable as error:
            print("refused", "nothing was changed" in str(error))
        print([m.id for _, m in file.read(lambda: outbox.first(9))])
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        file.write(put("c", b"x" * 500_000))
        print([m.id for _, m in file.read(lambda: outbox.first(9))])
        """,
        db_path,
    )
    assert said == ["refused True", "['a']", "['a', 'c']"]
    file = DatabaseFile.open(db_path)
    assert stored(file) == ["a", "c"]
    file.close()


def error_with(code: int) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError("x")
    error.sqlite_errorcode = code
    return error


def test_which_failures_of_commit_are_certain():
    certain = ("BUSY", "FULL", "READONLY", "CONSTRAINT_FOREIGNKEY", "IOERR_WRITE")
    unknown = ("IOERR_FSYNC", "IOERR_SHMMAP", "IOERR", "NOMEM", "CORRUPT", "PROTOCOL")
    assert [c for c in certain if not is_certain(error_with(getattr(sqlite3, f"SQLITE_{c}")))] == []
    assert [u for u in unknown if is_certain(error_with(getattr(sqlite3, f"SQLITE_{u}")))] == []
    assert not is_certain(sqlite3.OperationalError("no code at all"))


def test_a_killed_writer_leaves_whole_writes_only(db_path: Path):
    program = """
        import os, sys
        from duly.sql import outbox
        from duly.message import Message
        from duly.sql.sqlite import DatabaseFile

        def steps(name):
            yield from outbox.put({"t"}, [Message("t", "s", name + "-1", b"", 0)])
            if name == "killed":
                os.kill(os.getpid(), 9)
            yield from outbox.put({"t"}, [Message("t", "s", name + "-2", b"", 0)])

        file = DatabaseFile.open(sys.argv[1])
        file.write(lambda: steps("whole"))
        file.write(lambda: steps("killed"))
    """
    with running(program, db_path) as killed:
        assert killed.rest() == []
        assert killed.process.returncode == -9
    file = DatabaseFile.open(db_path)
    assert stored(file) == ["whole-1", "whole-2"]
    file.write(put("next"))
    file.close()


def test_reads_see_one_snapshot(file: DatabaseFile):
    file.write(put("a"))

    def look() -> Steps[tuple[int, int]]:
        before = yield Ask("outbox_first", (10,))
        file.write(put("b"))
        after = yield Ask("outbox_first", (10,))
        return len(before), len(after)

    assert file.read(look) == (1, 1)
    assert stored(file) == ["a", "b"]


def test_reads_cannot_write(file: DatabaseFile):
    with pytest.raises(BrokerUnavailable, match="readonly"):
        file.read(put("a"))
    assert stored(file) == []


def test_reading_a_file_whose_tables_are_gone_says_so(file: DatabaseFile):
    foreign = sqlite3.connect(file.path)
    foreign.execute("drop table duly_outbox")
    foreign.commit()
    foreign.close()
    with pytest.raises(BrokerUnusable, match="no such table: duly_outbox"):
        stored(file)


def test_a_closed_file_is_refused(db_path: Path):
    file = DatabaseFile.open(db_path)
    file.close()
    with pytest.raises(ConfigurationError, match="closed"):
        file.write(put("a"))


def test_ensuring_again_writes_nothing(file: DatabaseFile):
    before = file.changes()
    assert file.changes() == before


def test_a_script_is_cut_into_its_statements():
    script = """
        create table a (b default ';'); -- a comment; with a semicolon
        create trigger t after insert on a begin delete from a; select 1; end;
    """
    assert len(list(single_statements(script))) == 2


def test_closing_lets_end_what_came_before(db_path: Path):
    file = DatabaseFile.open(db_path, busy_s=10)
    inside, go_on = threading.Event(), threading.Event()

    def steps() -> Steps[Any]:
        yield from put("first")()
        inside.set()
        assert go_on.wait(10)
        yield from put("second")()

    with ThreadPoolExecutor(3) as threads:
        leads = threads.submit(file.write, steps)
        assert inside.wait(10)
        queues = threads.submit(writing(file, "queued"))
        eventually(lambda: len(file._writer._queue) == 1, "it waits for the lead")
        closes = threads.submit(file.close)
        eventually(lambda: file._writer._closed, "it is being closed")
        with pytest.raises(ConfigurationError, match="already closed"):
            file.write(put("too late"))
        with pytest.raises(TimeoutError):
            closes.result(0.2)
        go_on.set()
        for ended in (leads, queues, closes):
            ended.result(10)
    with closing(DatabaseFile.open(db_path)) as again:
        assert stored(again) == ["first", "second", "queued"]


def test_who_closes_in_the_middle_of_its_own_write_does_not_wait_for_itself(db_path: Path):
    file = DatabaseFile.open(db_path, busy_s=10)

    def steps() -> Steps[Any]:
        yield from put("first")()
        file.close()  # as a signal handler may
        yield from put("second")()

    file.write(steps)
    with pytest.raises(ConfigurationError, match="already closed"):
        file.write(put("third"))
    with closing(DatabaseFile.open(db_path)) as again:
        assert stored(again) == ["first", "second"]

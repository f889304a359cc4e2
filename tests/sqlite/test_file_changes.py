"""Noticing commits: at once in one process, within milliseconds between processes."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from duly.sql.sqlite import DatabaseFile
from tests.sqlite.programs import running
from tests.sqlite.test_file_write import put

PUBLISH = """
    import sys, time
    from duly.sql import outbox
    from duly.message import Message
    from duly.sql.sqlite import DatabaseFile

    file = DatabaseFile.open(sys.argv[1])
    print("open")
    while sys.stdin.readline():
        message = Message("t", "s", "id", b"", 0)
        file.write(lambda: outbox.put({"t"}, [message]))
        print(time.monotonic())
"""


@pytest.fixture
def file(db_path: Path) -> Iterator[DatabaseFile]:
    file = DatabaseFile.open(db_path)
    yield file
    file.close()


def test_a_write_of_this_process_moves_the_number(file: DatabaseFile):
    before = file.changes()
    file.write(put("a"))
    assert file.changes() != before
    assert file.wait(before, 0) != before


def test_waiting_ends_at_the_deadline_when_nothing_happens(file: DatabaseFile):
    seen = file.wait(file.changes(), 0.1)  # set-up may still be noticed here
    began = time.monotonic()
    assert file.wait(seen, 0.1) == seen
    assert 0.09 < time.monotonic() - began < 5


def test_a_waiter_wakes_at_once_for_a_write_of_this_process(file: DatabaseFile):
    woken = []

    def wait() -> None:
        woken.append(file.wait(seen, 10) != seen)

    seen = file.wait(file.changes(), 0.05)
    waiter = threading.Thread(target=wait)
    waiter.start()
    file.write(put("a"))
    waiter.join(10)
    assert woken == [True]


def test_a_commit_between_taking_the_number_and_waiting_is_not_missed(
    file: DatabaseFile, db_path: Path
):
    with running(PUBLISH, db_path) as publisher:
        publisher.expect("open")
        seen = file.wait(file.changes(), 0.05)
        publisher.tell("now")
        publisher.line()  # committed, and nobody was waiting
        assert file.wait(seen, 10) != seen


def test_a_commit_of_another_process_wakes_within_milliseconds(file: DatabaseFile, db_path: Path):
    with running(PUBLISH, db_path) as publisher:
        publisher.expect("open")
        delays = []
        for _ in range(40):
            seen = file.wait(file.changes(), 0.02)
            publisher.tell("now")
            while file.wait(seen, 10) == seen:
                pass
            woken = time.monotonic()
            delays.append(woken - float(publisher.line()))
    # Looked for every 8 ms. Three in four may have waited for a core too.
    assert sorted(delays)[10] < 0.010, sorted(delays)


def test_a_foreign_programs_commit_wakes_too(file: DatabaseFile):
    seen = file.wait(file.changes(), 0.05)
    foreign = sqlite3.connect(file.path)
    foreign.execute("create table theirs (a)")
    foreign.commit()
    foreign.close()
    assert file.wait(seen, 10) != seen


def test_notify_wakes_every_waiter(file: DatabaseFile):
    seen = file.wait(file.changes(), 0.05)
    woken = []
    waiters = [
        threading.Thread(target=lambda: woken.append(file.wait(seen, 10) != seen)) for _ in range(5)
    ]
    for waiter in waiters:
        waiter.start()
    file.notify()
    for waiter in waiters:
        waiter.join(10)
    assert woken == [True] * 5


def test_closing_wakes_who_waits(db_path: Path):
    file = DatabaseFile.open(db_path)
    seen = file.wait(file.changes(), 0.05)
    waiter = threading.Thread(target=lambda: file.wait(seen, 60))
    waiter.start()
    file.close()
    waiter.join(10)
    assert not waiter.is_alive()


def test_waiting_is_one_cheap_statement_every_five_milliseconds(file: DatabaseFile):
    # What it costs of a core is in the benchmark's row of idle latency.
    seen = file.wait(file.changes(), 0.05)
    assert file._changes._connection is not None
    polled: list[str] = []
    file._changes._connection.set_trace_callback(polled.append)
    began = time.monotonic()
    file.wait(seen, 0.5)
    passed_s = time.monotonic() - began
    file._changes._connection.set_trace_callback(None)
    assert set(polled) == {"pragma data_version"}
    assert len(polled) <= passed_s / 0.005 + 2


def test_nobody_waiting_costs_nothing(file: DatabaseFile):
    file.wait(file.changes(), 0.05)
    assert file._changes._connection is not None
    polled: list[str] = []
    file._changes._connection.set_trace_callback(polled.append)
    threading.Event().wait(0.1)
    assert len(polled) <= 1
    file._changes._connection.set_trace_callback(None)

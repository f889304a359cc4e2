"""Checkpoints: from the writer that holds the turn, often enough, and never a failure."""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from duly.sql.sqlite import DatabaseFile
from duly.sql.sqlite.wal import Checkpoints
from tests.sqlite.test_file_write import put, stored

PAGES = 50


@pytest.fixture
def file(db_path: Path) -> Iterator[DatabaseFile]:
    file = DatabaseFile.open(db_path)
    file._checkpoints._pages = PAGES
    file._checkpoints._look_s = 0.0
    yield file
    file.close()


def wal_bytes(file: DatabaseFile) -> int:
    return Path(f"{file.path}-wal").stat().st_size


def grow(file: DatabaseFile, times: int) -> None:
    for n in range(times):
        file.write(put(f"{n}", b"x" * 20_000), durable=False)


def test_the_log_does_not_grow_without_bound(file: DatabaseFile):
    grow(file, 300)
    assert file._checkpoints.count >= 10
    assert wal_bytes(file) < 3 * PAGES * 4200
    assert len(stored(file)) == 300


def test_few_pages_are_not_checkpointed(file: DatabaseFile):
    grow(file, 3)
    assert file._checkpoints.count == 0


def test_whoever_is_to_know_before_is_called_where_one_is_due(file: DatabaseFile):
    called: list[int] = []
    before_release = file._writer._before_release

    def look(before_long: Callable[[], None]) -> None:
        def note() -> None:
            called.append(file._checkpoints.count)
            before_long()

        before_release(note)

    file._writer._before_release = look
    grow(file, 30)
    assert called == [*range(file._checkpoints.count)]
    assert called


def test_an_idle_writer_does_not_checkpoint_again_and_again(file: DatabaseFile):
    grow(file, 20)
    before = file._checkpoints.count
    for n in range(10):
        file.write(put(f"small-{n}"), durable=False)
    assert file._checkpoints.count <= before + 2


def test_a_reader_that_stays_delays_the_reset_and_loses_nothing(file: DatabaseFile):
    reader = file.connect(sqlite3.Connection)
    grow(file, 3)
    reader.execute("begin")
    assert reader.execute("select count(*) from duly_outbox").fetchone() == (3,)
    grow(file, 60)
    grown = wal_bytes(file)
    assert grown > 3 * PAGES * 4200
    assert reader.execute("select count(*) from duly_outbox").fetchone() == (3,)
    reader.execute("commit")
    count = file._checkpoints.count
    grow(file, 60)
    assert file._checkpoints.count > count
    assert wal_bytes(file) < grown + 2 * PAGES * 4200
    assert len(stored(file)) == 123
    reader.close()


def test_a_log_grown_long_behind_a_reader_shrinks_once_it_is_gone(
    file: DatabaseFile, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("duly.sql.sqlite.wal._PATIENCE_PAGES", 2 * PAGES)
    reader = file.connect(sqlite3.Connection)
    reader.execute("begin")
    reader.execute("select count(*) from duly_outbox").fetchone()
    grow(file, 60)
    grown = wal_bytes(file)
    reader.execute("commit")
    grow(file, 30)
    assert wal_bytes(file) < grown / 2
    reader.close()


def test_a_checkpoint_that_fails_is_logged_and_the_commit_stands(
    file: DatabaseFile, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fail() -> None:
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(file._checkpoints, "_run", fail)
    with caplog.at_level(logging.WARNING):
        grow(file, 20)
    assert "disk I/O error" in caplog.text
    assert len(stored(file)) == 20


def test_connections_do_not_checkpoint_by_themselves(file: DatabaseFile):
    connection = file.connect(sqlite3.Connection)
    assert connection.execute("pragma wal_autocheckpoint").fetchone() == (0,)
    connection.close()


def test_there_is_nothing_to_do_without_a_log(tmp_path: Path):
    def connect() -> sqlite3.Connection:
        raise AssertionError("nothing to checkpoint")

    (tmp_path / "x-wal").touch()
    Checkpoints(tmp_path / "x", connect).run_when_due()


def test_closing_lets_a_checkpoint_end(file: DatabaseFile):
    inside, go_on = threading.Event(), threading.Event()

    class Slow(sqlite3.Connection):
        def execute(self, *args: Any) -> sqlite3.Cursor:
            inside.set()
            assert go_on.wait(10)
            return super().execute(*args)

    def connect() -> sqlite3.Connection:
        return sqlite3.connect(file.path, check_same_thread=False, factory=Slow)

    checkpoints = Checkpoints(file.path, connect, pages=1, look_s=0.0)
    file.write(put("one"))
    with ThreadPoolExecutor(2) as threads:
        runs = threads.submit(checkpoints.run_when_due)
        assert inside.wait(10)
        closes = threads.submit(checkpoints.close)
        with pytest.raises(TimeoutError):
            closes.result(0.2)
        go_on.set()
        runs.result(10)
        closes.result(10)
    assert checkpoints.count == 1
    checkpoints.run_when_due()
    assert checkpoints.count == 1, "none after it was closed"

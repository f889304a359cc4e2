"""An application in a directory of its own, and ``duly`` as a real process beside it."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.servers.postgres import Schema
from tests.waiting import alive, eventually

SHOP = """
import logging, os, sqlite3, time
from dataclasses import dataclass
import duly

@dataclass
class Order:
    order: str
    cents: int
    note: str | None = None
    tip: int | None = None

orders = duly.Topic("orders", Order, guarantee="exactly-once")
pings = duly.Topic("pings", dict, guarantee="at-most-once")
events = duly.Topic("events", dict, guarantee="at-least-once")
app = duly.App("shop", broker="sqlite:///shop.db")
log = logging.getLogger("shop")

@app.consumer(orders, name="billing", guarantee="exactly-once")
def charge(order: Order, tx: duly.Transaction[sqlite3.Connection]) -> None:
    tx.connection.execute("create table if not exists charges (n, cents, note, tip, pid)")
    row = (order.order, order.cents, order.note, order.tip, os.getpid())
    tx.connection.execute("insert into charges values (?, ?, ?, ?, ?)", row)
    if order.note == "log":
        log.info("charged %s", order.order)
"""


def shop_on(url: str) -> str:
    """The same application with its broker there."""
    here = "sqlite:///shop.db"
    assert here in SHOP
    return SHOP.replace(here, url)


def url_of(schema: Schema) -> str:
    """A broker of a test's own, as a URL."""
    mark = "&" if "?" in schema.url else "?"
    return f"{schema.url}{mark}schema={schema.duly}"


@pytest.fixture(params=["sqlite", "postgres"])
def shop_source(request: pytest.FixtureRequest) -> str:
    """The application on each database: what its commands say is the same."""
    if request.param == "sqlite":
        return SHOP
    return shop_on(url_of(request.getfixturevalue("pg_schema")))


@dataclass
class Place:
    """A directory with an application in it."""

    path: Path
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def write(self, name: str, text: str) -> Path:
        (self.path / name).write_text(text)
        return self.path / name

    def environment(self, **more: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return {**kept, "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "100", **more}

    def start(self, *arguments: str, **more: Any) -> subprocess.Popen[str]:
        given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **more}
        process = subprocess.Popen(
            [sys.executable, "-m", "duly", *arguments],
            cwd=self.path,
            env=self.environment(),
            **given,
        )
        self.started.append(process)
        return process

    def duly(self, *arguments: str, input: str | None = None) -> Ended:
        """Run it to its end."""
        process = self.start(*arguments, stdin=None if input is None else subprocess.PIPE)
        out, err = process.communicate(input, timeout=60)
        assert "Traceback" not in err, err
        return Ended(process.returncode, out, err)

    def rows(self, sql: str, *, database: str = "shop.db") -> list[tuple[Any, ...]]:
        """What a query gives; nothing while its table is not there."""
        connection = sqlite3.connect(self.path / database, timeout=30)
        try:
            return connection.execute(sql).fetchall()
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):
                return []
            raise
        finally:
            connection.close()

    def await_rows(self, sql: str, count: int) -> None:
        eventually(lambda: len(self.rows(sql)) >= count, f"{count} rows of {sql}", timeout_s=60)


@dataclass(frozen=True)
class Ended:
    status: int
    out: str
    err: str


def children(pid: int) -> list[int]:
    """The processes that this one has started."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def end(process: subprocess.Popen[str], number: int = signal.SIGTERM) -> Ended:
    """Signal it, and wait for its end."""
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return Ended(process.returncode, out, err)


def records(err: str) -> list[dict[str, Any]]:
    """Standard error as log records."""
    return [json.loads(line) for line in err.splitlines()]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """A directory; whatever is still running in it at the end is killed."""
    here = Place(tmp_path)
    yield here
    for process in here.started:
        workers = children(process.pid) if process.poll() is None else []
        for pid in [process.pid, *workers]:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=30)


@pytest.fixture
def shop(place: Place) -> Place:
    """A directory with the application ``shop:app``."""
    place.write("shop.py", SHOP)
    return place

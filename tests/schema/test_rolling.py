"""An upgrade while messages are in flight, in the three orders in which people do it."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from pathlib import Path

import pytest

from duly.sql.migrations import SCHEMA_VERSION
from tests.schema.versions import NOW, WITH_CODE, meta, older_code, rows
from tests.sqlite.programs import Program, running
from tests.waiting import eventually

APP = f"""
{WITH_CODE}
import random, sqlite3, threading
import duly
from duly.sql.migrations import SCHEMA_VERSION
from duly.worker import Worker

orders = duly.Topic("orders", int, guarantee="exactly-once")
receipts = duly.Topic("receipts", int, guarantee="at-least-once")
app = duly.App("shop", broker="sqlite:///" + sys.argv[2])
retry = duly.RetryPolicy(attempts=50, first_s=0.05, longest_s=0.1)

@app.consumer(orders, name="billing", guarantee="exactly-once", batch=5, retry=retry)
def charge(n: int, tx: duly.Transaction[sqlite3.Connection]) -> None:
    if n % 7 == 0 and random.random() < 0.5:
        raise ValueError("try again")
    tx.connection.execute("create table if not exists charges (n, schema)")
    tx.connection.execute("insert into charges values (?, ?)", (n, SCHEMA_VERSION))
    tx.publish(receipts, n, id=str(n))

@app.consumer(receipts, name="mail", guarantee="at-least-once")
def send(n: int) -> None:
    pass

told = threading.Event()
threading.Thread(target=lambda: (sys.stdin.readline(), told.set()), daemon=True).start()
"""

WORKER = f"""
{APP}
worker = Worker(app)
worker.start()
print("working with schema", SCHEMA_VERSION)
told.wait()
worker.drain()
print("drained")
"""

# Some are due later: they are parked while the tables change.
PUBLISHER = f"""
{APP}
n = int(sys.argv[3])
while not told.wait(0.002):
    app.publish(orders, n, id=str(n), delay_s=0.3 if n % 10 == 0 else None)
    print(n)
    n += 1
print("done")
"""


class Crowd:
    """The workers and publishers of one file."""

    def __init__(self, path: Path, older: Path, stack: ExitStack) -> None:
        self.path = path
        self._older = older
        self._stack = stack
        self._published = 0

    def worker(self, version: int) -> Program:
        program = self._start(WORKER, version)
        program.expect(f"working with schema {version}")
        return program

    def publisher(self, version: int) -> Program:
        self._published += 1_000_000
        return self._start(PUBLISHER, version, self._published)

    def _start(self, source: str, version: int, *args: object) -> Program:
        code = NOW if version == SCHEMA_VERSION else self._older
        return self._stack.enter_context(running(source, code, self.path, *args))

    def charged(self) -> list[int]:
        return [n for (n,) in rows(self.path, "select n from charges")]

    def charged_by(self, version: int) -> int:
        return len(rows(self.path, f"select n from charges where schema = {version}"))

    def more_by(self, version: int) -> None:
        """Wait until workers of this version have done some more."""
        already = self.charged_by(version)
        eventually(
            lambda: self.charged_by(version) >= already + 40, f"work done by schema {version}"
        )


def end(program: Program) -> list[str]:
    program.tell("that is all")
    said = program.rest()
    assert program.process.returncode == 0, "\n".join(said[-20:])
    return said


def confirmed(*publishers: list[str]) -> set[int]:
    return {int(line) for said in publishers for line in said if line.isdigit()}


@pytest.mark.parametrize("first", ["workers", "publishers", "all at once"])
def test_nothing_is_lost_or_charged_twice(first: str, tmp_path: Path, db_path: Path):
    with ExitStack() as stack:
        crowd = Crowd(db_path, older_code(tmp_path / "older"), stack)
        old_worker, old_publisher = crowd.worker(1), crowd.publisher(1)
        crowd.more_by(1)
        assert meta(db_path)["schema"] == 1
        if first == "all at once":
            old_publisher.signal(signal.SIGKILL)
            old_worker.signal(signal.SIGKILL)
            published = [old_publisher.rest()]
            worker, publisher = crowd.worker(SCHEMA_VERSION), crowd.publisher(SCHEMA_VERSION)
        elif first == "workers":
            worker = crowd.worker(SCHEMA_VERSION)
            crowd.more_by(1)  # side by side
            crowd.more_by(SCHEMA_VERSION)
            assert end(old_worker)[-1] == "drained"
            publisher = crowd.publisher(SCHEMA_VERSION)
            published = [end(old_publisher)]
        else:
            publisher = crowd.publisher(SCHEMA_VERSION)
            eventually(lambda: meta(db_path)["schema"] == SCHEMA_VERSION, "the new tables")
            crowd.more_by(1)  # what both published
            published = [end(old_publisher)]
            worker = crowd.worker(SCHEMA_VERSION)
            assert end(old_worker)[-1] == "drained"
        crowd.more_by(SCHEMA_VERSION)
        assert meta(db_path)["schema"] == SCHEMA_VERSION
        published.append(end(publisher))
        acknowledged = confirmed(*published)
        eventually(lambda: acknowledged <= set(crowd.charged()), "every message charged")
        assert end(worker)[-1] == "drained"
    charged = crowd.charged()
    assert len(charged) == len(set(charged)), "charged twice"
    # What was being published as its publisher was killed may be there.
    assert len(set(charged) - acknowledged) <= (first == "all at once")
    assert rows(db_path, "select * from duly_dead") == []

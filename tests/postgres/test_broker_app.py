"""An application on PostgreSQL alone: workers are killed, and every order is charged once."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

import duly
from duly.brokers.postgres import PostgresBroker
from tests.postgres.brokers import opened, topic
from tests.servers.postgres import Schema
from tests.waiting import eventually

SHOP = """
import os
import duly
import psycopg

app = duly.App("shop", broker=os.environ["SHOP_DATABASE"])
orders = duly.Topic("orders", int, guarantee="exactly-once", partitions=4)
receipts = duly.Topic("receipts", int, guarantee="exactly-once")



@app.consumer(orders, name="billing", guarantee="exactly-once", order_by_key=True)
def charge(order: int, tx: duly.Transaction[psycopg.Connection]) -> None:
    tx.connection.execute("insert into charges values (%s)", (order,))
    tx.publish(receipts, order)


@app.consumer(receipts, name="mail", guarantee="exactly-once", batch=50)
async def mail(order: int, tx: duly.Transaction[psycopg.AsyncConnection]) -> None:
    await tx.connection.execute("insert into mails values (%s)", (order,))


@app.consumer(orders, name="statistics", guarantee="at-least-once")
def count(order: int) -> None:
    pass
"""
ORDERS = 3_000


@contextlib.contextmanager
def running(folder: Path, database: str) -> Iterator[_Working]:
    """``duly run`` with two workers; the processes of those that work, as they come."""
    (folder / "shop.py").write_text(SHOP)
    log = folder / "log"
    with log.open("w") as out:
        supervisor = subprocess.Popen(
            [
                *(sys.executable, "-m", "duly", "run", "shop:app"),
                *("--processes", "2", "--log-format", "human"),
            ],
            cwd=folder,
            env={**os.environ, "SHOP_DATABASE": database},
            stdout=out,
            stderr=out,
        )
    try:
        yield _Working(log)
    finally:
        supervisor.send_signal(signal.SIGTERM)
        status = supervisor.wait(60)
    assert status == 0, log.read_text()


class _Working(list[int]):
    """The processes that have begun to work so far."""

    def __init__(self, log: Path) -> None:
        super().__init__()
        self._log = log

    def look(self) -> list[int]:
        self[:] = map(int, re.findall(r"pid (\d+)\) works", self._log.read_text()))
        return self


@pytest.mark.slow
def test_under_kills_every_order_is_charged_and_mailed_once(pg_schema: Schema, tmp_path: Path):
    mark = "&" if "?" in pg_schema.url else "?"
    database = f"{pg_schema.url}{mark}schema={pg_schema.duly}"
    orders = topic("orders", "exactly-once", partitions=4)
    with pg_schema.connect(autocommit=True) as watching:
        watching.execute("create table charges (number int); create table mails (number int)")
        with opened(pg_schema, orders) as broker, running(tmp_path, database) as working:
            for kill in range(6):
                _publish(broker, orders, range(kill * 500, kill * 500 + 500))
                _reaches(watching, "charges", kill * 400 + 1)
                _kill_one(working)
            for table in ("charges", "mails"):
                _reaches(watching, table, ORDERS)
            eventually(lambda: _is_drained(broker), "nothing is left to do", timeout_s=60)
            assert not broker.dead_letters()
        for table in ("charges", "mails"):
            found = watching.execute(f"select number from {table}".encode()).fetchall()
            assert sorted(number for (number,) in found) == list(range(ORDERS)), table


def _kill_one(working: _Working) -> None:
    os.kill(working.look()[-1], signal.SIGKILL)
    seen = len(working)
    eventually(lambda: len(working.look()) > seen, "another works", timeout_s=60)


def _reaches(connection: psycopg.Connection[tuple[int]], table: str, count: int) -> None:
    eventually(lambda: _count(connection, table) >= count, f"{count} {table}", timeout_s=90)


def _is_drained(broker: PostgresBroker) -> bool:
    return all(state.is_drained for state in broker.subscriptions())


def _publish(broker: PostgresBroker, orders: duly.Topic[str], numbers: range) -> None:
    messages = [
        orders.message(str(n), source="tests", id=f"o-{n}", key=str(n % 40)) for n in numbers
    ]
    kinds = {type(outcome).__name__ for outcome in broker.publish(messages)}
    assert kinds == {"Published"}


def _count(connection: psycopg.Connection[tuple[int]], table: str) -> int:
    [(count,)] = connection.execute(f"select count(*) from {table}".encode()).fetchall()
    return count

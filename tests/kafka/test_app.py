"""An application with Kafka as its broker: workers are killed, every order is charged once."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import duly
from duly.contract import Run, contract_of, render
from duly.errors import ConfigurationError, ContractRefused
from tests.waiting import eventually

SHOP = """
import os
import sqlite3
import duly

app = duly.App("shop", broker=os.environ["SHOP_BROKER"], store="sqlite:///effects.db")
orders = duly.Topic("orders", int, guarantee="at-least-once", partitions=4)
receipts = duly.Topic("receipts", int, guarantee="exactly-once")
retry = duly.RetryPolicy(first_s=0.1)
failed = set()


@app.consumer(
    orders, name="billing", guarantee="exactly-once", retry=retry, batch=30, order_by_key=True
)
def charge(order: int, tx: duly.Transaction[sqlite3.Connection]) -> None:
    tx.connection.execute("create table if not exists charges (at integer primary key, id)")
    tx.connection.execute("insert into charges (id) values (?)", (order,))
    tx.publish(receipts, order, id=str(order))
    if order % 50 == 7 and order not in failed:
        failed.add(order)
        raise RuntimeError("the first time in each process")


@app.consumer(receipts, name="mail", guarantee="exactly-once", batch=20)
def mail(order: int, tx: duly.Transaction[sqlite3.Connection]) -> None:
    tx.connection.execute("create table if not exists mails (at integer primary key, id)")
    tx.connection.execute("insert into mails (id) values (?)", (order,))
"""
ORDERS = 400
KEYS = 5


@contextlib.contextmanager
def running(folder: Path, broker: str) -> Iterator[Path]:
    """``duly run`` with two workers; its log."""
    log = folder / "log"
    with log.open("w") as out:
        supervisor = subprocess.Popen(
            [
                *(sys.executable, "-m", "duly", "run", "shop:app"),
                *("--processes", "2", "--log-format", "human"),
            ],
            cwd=folder,
            env={**os.environ, "SHOP_BROKER": broker},
            stdout=out,
            stderr=out,
        )
    try:
        yield log
    finally:
        supervisor.send_signal(signal.SIGTERM)
        status = supervisor.wait(60)
    assert status == 0, log.read_text()


def rows(folder: Path, table: str) -> list[int]:
    """What took effect, in the order in which it did."""
    with contextlib.closing(sqlite3.connect(folder / "effects.db", timeout=30)) as connection:
        try:
            return [row[0] for row in connection.execute(f"select id from {table} order by at")]
        except sqlite3.OperationalError:
            return []  # nothing was charged yet


def has(folder: Path, table: str, count: int) -> bool:
    return len(rows(folder, table)) >= count


def contract(app: duly.App) -> str:
    broker, store = app.backends()
    try:
        told = None if store is None else store.capabilities
        found = contract_of(broker.capabilities, told, app.topics, app.consumers, Run())
        return " ".join(render(found).split())
    finally:
        app.close()


@pytest.mark.slow
def test_workers_are_killed_and_every_order_is_charged_once(
    tmp_path: Path, kafka_url: str, monkeypatch: pytest.MonkeyPatch
):
    """By cursor, in the order of each key; what they publish goes by outbox and inbox."""
    broker = f"{kafka_url}&session.timeout.ms=2000&heartbeat.interval.ms=500"
    (tmp_path / "shop.py").write_text(SHOP)
    monkeypatch.setenv("SHOP_BROKER", broker)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(SHOP, scope)
    app, orders = scope["app"], scope["orders"]
    assert isinstance(app, duly.App)
    assert isinstance(orders, duly.Topic)
    numbers = list(range(ORDERS))
    # Published before any worker was ever started.
    with app:
        app.publish_many(orders, numbers, keys=[str(number % KEYS) for number in numbers])
    with running(tmp_path, broker) as log:
        for some in (20, ORDERS // 2):
            eventually(partial(has, tmp_path, "charges", some), "some are charged", log.read_text)
            pids = re.findall(r"worker.*?pid (\d+)", log.read_text())
            assert pids, log.read_text()
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pids[-1]), signal.SIGKILL)
        for table in ("charges", "mails"):
            eventually(partial(has, tmp_path, table, ORDERS), f"all {table}", log.read_text, 90)
    charged = rows(tmp_path, "charges")
    assert sorted(charged) == sorted(rows(tmp_path, "mails")) == numbers
    for key in range(KEYS):
        mine = [number for number in charged if number % KEYS == key]
        assert all(before < after for before, after in pairwise(mine)), "in order by key"


@pytest.mark.parametrize(
    ("topic", "admission", "retry"),
    [
        ("at-least-once", "by cursor", "a retry waits in SQLite, parked there"),
        ("exactly-once", "by inbox", "a retry holds up everything behind it in its partition"),
    ],
)
def test_the_contract_says_who_keeps_what(
    kafka_url: str, tmp_path: Path, topic: Any, admission: str, retry: str
):
    """Nothing but an inbox drops a publish that was repeated."""
    app = duly.App("shop", broker=kafka_url, store=f"sqlite:///{tmp_path}/effects.db")
    orders = duly.Topic("orders", int, guarantee=topic)

    @app.consumer(orders, name="billing", guarantee="exactly-once")
    def charge(order: int, tx: duly.Transaction[sqlite3.Connection]) -> None: ...

    text = contract(app)
    assert f"admission {admission}" in text
    assert retry in text


def test_what_cannot_be_kept_is_refused(kafka_url: str):
    app = duly.App("shop", broker=kafka_url)
    orders = duly.Topic("orders", int, guarantee="at-least-once", partitions=2)

    @app.consumer(
        orders, name="held", guarantee="at-least-once", order_by_key=True, hold_key_on_dead=True
    )
    def handle(order: int) -> None: ...

    with pytest.raises(ContractRefused, match="hold_key_on_dead"):
        contract(app)
    with app, pytest.raises(ConfigurationError, match="cannot delay"):
        app.publish(orders, 1, delay_s=5.0)


def test_status_shows_the_lag(tmp_path: Path, kafka_url: str, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "shop.py").write_text(SHOP)
    environment = {**os.environ, "SHOP_BROKER": kafka_url}

    def told(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "duly", *command],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    told("init", "shop:app")
    scope: dict[str, object] = {}
    monkeypatch.setenv("SHOP_BROKER", kafka_url)
    monkeypatch.chdir(tmp_path)
    exec(SHOP, scope)
    app, orders = scope["app"], scope["orders"]
    assert isinstance(app, duly.App)
    assert isinstance(orders, duly.Topic)
    with app:
        app.publish_many(orders, list(range(37)))
    assert re.search(r"billing\s.*orders\s.*\b37\b", told("status", "shop:app"))
    assert "nobody works on them" in told("doctor", "shop:app")

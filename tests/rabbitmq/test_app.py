"""An application with RabbitMQ as its broker: workers are killed, every order is charged once."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import cast

import pytest

import duly
from duly.brokers.rabbitmq import RabbitMQBroker
from duly.contract import Run, contract_of, render
from duly.errors import ContractRefused
from duly.worker import Worker
from tests.servers.rabbitmq import with_option
from tests.waiting import eventually

SHOP = """
import os
import sqlite3
import duly

app = duly.App("shop", broker=os.environ["SHOP_BROKER"], store="sqlite:///effects.db")
orders = duly.Topic("orders", int, guarantee="exactly-once")
receipts = duly.Topic("receipts", int, guarantee="at-least-once")
retry = duly.RetryPolicy(first_s=0.1)


@app.consumer(orders, name="billing", guarantee="exactly-once", retry=retry)
def charge(order: int, tx: duly.Transaction[sqlite3.Connection]) -> None:
    tx.connection.execute("create table if not exists charges (id)")
    tx.connection.execute("insert into charges values (?)", (order,))
    tx.publish(receipts, order)
    if order % 50 == 7:
        tx.connection.execute("create table if not exists once (id primary key)")


@app.consumer(receipts, name="mail", guarantee="exactly-once", batch=20)
def mail(order: int, tx: duly.Transaction[sqlite3.Connection]) -> None:
    tx.connection.execute("create table if not exists mails (id)")
    tx.connection.execute("insert into mails values (?)", (order,))
"""
ORDERS = 400


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
    with contextlib.closing(sqlite3.connect(folder / "effects.db", timeout=30)) as connection:
        try:
            return sorted(row[0] for row in connection.execute(f"select id from {table}"))
        except sqlite3.OperationalError:
            return []  # nothing was charged yet


def has(folder: Path, table: str, count: int) -> bool:
    return len(rows(folder, table)) >= count


def contract(app: duly.App) -> str:
    broker, store = app.backends()
    try:
        return render(
            contract_of(
                broker.capabilities,
                None if store is None else store.capabilities,
                app.topics,
                app.consumers,
                Run(),
            )
        )
    finally:
        app.close()


@pytest.mark.slow
def test_workers_are_killed_and_every_order_is_charged_once(
    tmp_path: Path, rabbit_url: str, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "shop.py").write_text(SHOP)
    monkeypatch.setenv("SHOP_BROKER", rabbit_url)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(SHOP, scope)
    app, orders = scope["app"], scope["orders"]
    assert isinstance(app, duly.App)
    assert isinstance(orders, duly.Topic)
    # Published before any worker was ever started, and each order twice.
    with app:
        for _ in range(2):
            ids = [str(n) for n in range(ORDERS)]
            app.publish_many(orders, list(range(ORDERS)), ids=ids)
    with running(tmp_path, rabbit_url) as log:
        for some in (20, ORDERS // 2):
            eventually(partial(has, tmp_path, "charges", some), "some are charged", log.read_text)
            pids = re.findall(r"worker.*?pid (\d+)", log.read_text())
            assert pids, log.read_text()
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pids[-1]), signal.SIGKILL)
        for table in ("charges", "mails"):
            eventually(partial(has, tmp_path, table, ORDERS), f"all {table}", log.read_text, 90)
    assert rows(tmp_path, "charges") == rows(tmp_path, "mails") == list(range(ORDERS))


def test_without_a_store_exactly_once_is_refused(rabbit_url: str):
    app = duly.App("shop", broker=rabbit_url)
    orders = duly.Topic("orders", int, guarantee="exactly-once")

    @app.consumer(orders, name="billing", guarantee="exactly-once")
    def charge(order: int, tx: duly.Transaction[sqlite3.Connection]) -> None: ...

    with pytest.raises(ContractRefused, match="no store to commit its effects in"):
        contract(app)


def test_the_contract_says_who_keeps_what(rabbit_url: str, tmp_path: Path):
    app = duly.App("shop", broker=rabbit_url, store=f"sqlite:///{tmp_path}/effects.db")
    orders = duly.Topic("orders", int, guarantee="exactly-once")

    @app.consumer(orders, name="billing", guarantee="exactly-once")
    def charge(order: int, tx: duly.Transaction[sqlite3.Connection]) -> None: ...

    text = " ".join(contract(app).split())
    assert "admission by inbox" in text
    assert "a message that no subscription takes is refused" in text


def test_a_handler_runs_for_many_heartbeats(rabbit_url: str):
    """It blocks its thread, and the connection has one of its own."""
    app = duly.App("shop", broker=with_option(rabbit_url, "heartbeat", 1))
    orders = duly.Topic("orders", int, guarantee="at-least-once")
    runs: list[int] = []
    ended = threading.Event()

    @app.consumer(orders, name="slow", guarantee="at-least-once")
    def handle(order: int) -> None:
        runs.append(order)
        link = cast("RabbitMQBroker", app.backends()[0]).link
        heard: set[int] = set()

        def several_heartbeats() -> bool:
            heard.add(link.call(lambda connection: int(connection.bytes_recv)))
            return len(heard) > 6

        eventually(several_heartbeats, "heartbeats came meanwhile")
        ended.set()

    with app:
        app.publish(orders, 1)
        with Worker(app) as worker:
            assert ended.wait(60)
            eventually(lambda: worker.counts()["slow"].handled == 1, "it is settled")
        assert runs == [1]

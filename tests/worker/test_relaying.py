"""Effects in one SQLite file, messages in another: what handlers publish gets there."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from duly import App, InvalidMessage, RetryPolicy, Transaction
from duly.brokers.memory import MemoryLog
from duly.message import Topic
from duly.relay import Relay
from duly.worker import Worker
from tests.waiting import eventually

orders: Topic[int] = Topic("orders", int, guarantee="exactly-once")
receipts: Topic[int] = Topic("receipts", int, guarantee="exactly-once")


def shop(folder: Path, seen: list[int] | None = None) -> App:
    app = App("shop", broker=f"sqlite:///{folder}/log.db", store=f"sqlite:///{folder}/money.db")

    @app.consumer(orders, name="billing", guarantee="exactly-once")
    def charge(order: int, tx: Transaction[sqlite3.Connection]) -> None:
        tx.connection.execute("create table if not exists charges (id integer)")
        tx.connection.execute("insert into charges values (?)", (order,))
        tx.publish(receipts, order, id=f"r-{order}")

    if seen is not None:

        @app.consumer(receipts, name="mail", guarantee="at-least-once")
        def mail(receipt: int) -> None:
            seen.append(receipt)

    return app


def test_the_worker_relays_what_its_transactions_publish(tmp_path: Path) -> None:
    seen: list[int] = []
    with shop(tmp_path, seen) as app:
        app.publish_many(orders, range(50))
        with Worker(app) as worker:
            eventually(lambda: len(seen) == 50, "fifty receipts")
            assert worker.counts()["billing"].commits >= 1
    assert sorted(seen) == list(range(50))
    with sqlite3.connect(tmp_path / "money.db") as money:
        assert money.execute("select count(*), count(distinct id) from charges").fetchone() == (
            50,
            50,
        )


def test_an_outbox_left_by_a_dead_worker_is_relayed_by_one_that_knows_only_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = shop(tmp_path)
    dead.publish_many(orders, range(5))
    worker = Worker(dead)
    monkeypatch.setattr(Relay, "run", lambda *_: None)
    worker.start()
    eventually(lambda: worker.counts()["billing"].handled == 5, "charged")
    worker.drain()
    dead.close()
    monkeypatch.undo()

    other = App(
        "shop", broker=f"sqlite:///{tmp_path}/log.db", store=f"sqlite:///{tmp_path}/money.db"
    )

    @other.consumer(orders, name="billing", guarantee="exactly-once")
    def charge(order: int, tx: Transaction[sqlite3.Connection]) -> None: ...

    with other, Worker(other):
        broker, _ = other.backends()
        eventually(
            lambda: _published(tmp_path / "log.db") == 5, "relayed without knowing the topic"
        )
    assert broker.capabilities.name == "SQLite"


def _published(path: Path) -> int:
    with sqlite3.connect(path) as log:
        [(count,)] = log.execute("select count(*) from duly_messages where id like 'r-%'")
    return int(count)


def test_what_the_broker_cannot_deliver_later_is_refused_with_its_effects(tmp_path: Path) -> None:
    """After the commit it would stay in the outbox for ever: an effect without its output."""
    app = App("shop", broker=MemoryLog(), store=f"sqlite:///{tmp_path}/money.db")

    @app.consumer(orders, name="billing", guarantee="exactly-once", retry=RetryPolicy(attempts=1))
    def charge(order: int, tx: Transaction[sqlite3.Connection]) -> None:
        tx.connection.execute("insert into charges values (?)", (order,))
        tx.publish(receipts, order, delay_s=60 if order == 2 else None)

    def remind() -> None:
        with app.transaction() as tx:
            tx.connection.execute("insert into charges values (9)")
            app.publish(receipts, 9, delay_s=60, within=tx)

    app.declare(receipts)
    with app, sqlite3.connect(tmp_path / "money.db") as money:
        with app.transaction() as tx:
            tx.connection.execute("create table charges (id integer)")
        app.publish_many(orders, range(1, 4))
        with Worker(app) as worker:
            eventually(lambda: worker.counts()["billing"].handled == 3, "all have ended")
        [letter] = app.dead_letters("billing")
        assert letter.message.body == b"2"
        assert "cannot delay" in letter.error
        with pytest.raises(InvalidMessage, match="cannot delay"):
            remind()
        assert money.execute("select id from charges order by id").fetchall() == [(1,), (3,)]

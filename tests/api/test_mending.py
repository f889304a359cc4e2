"""Dead letters of an app: found, replayed into effect once, discarded; and what is refused."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import duly
from duly.brokers.memory import MemoryDatabase, MemoryLog, MemoryQueue
from duly.inspection import DeadLetter, Inspection
from duly.stores.memory import MemoryStore
from duly.worker import Worker
from tests.waiting import eventually

orders = duly.Topic("orders", dict, guarantee="exactly-once")


@contextmanager
def working(app: duly.App) -> Iterator[None]:
    worker = Worker(app)
    worker.start()
    try:
        yield
    finally:
        worker.drain()


@pytest.mark.parametrize("store", [None, "effects.db"])
def test_a_replay_takes_effect_once(tmp_path: Path, store: str | None):
    broken = [True]
    app = duly.App(
        "shop",
        broker=f"sqlite:///{tmp_path}/shop.db",
        store=None if store is None else f"sqlite:///{tmp_path}/{store}",
    )

    @app.consumer(
        orders, name="billing", guarantee="exactly-once", retry=duly.RetryPolicy(attempts=1)
    )
    def charge(order: dict[str, Any], tx: duly.Transaction[sqlite3.Connection]) -> None:
        tx.connection.execute("create table if not exists charges (n)")
        tx.connection.execute("insert into charges values (?)", (order["n"],))
        if broken[0]:
            raise ValueError("no card")

    with app:
        for n in range(3):
            app.publish(orders, {"n": n}, id=f"o-{n}")
        with working(app):
            eventually(lambda: len(app.dead_letters()) == 3, "three dead letters")
            letters = app.dead_letters("billing", error="no card")
            assert sorted(letter.message.id for letter in letters) == ["o-0", "o-1", "o-2"]
            assert app.replay(letters[:1]) == 1
            eventually(lambda: len(app.dead_letters()) == 3, "it died again")
            assert max(letter.replays for letter in app.dead_letters()) == 1
            broken[0] = False
            assert app.discard(app.dead_letters(id="o-1")) == 1
            assert app.replay(app.dead_letters()) == 2
            assert app.replay(letters) == 0
            inside, _ = app.backends()
            assert isinstance(inside, Inspection)
            eventually(lambda: all(s.is_drained for s in inside.subscriptions()), "drained")
        assert app.dead_letters() == []
    rows = sqlite3.connect(tmp_path / (store or "shop.db")).execute("select n from charges")
    assert sorted(rows.fetchall()) == [(0,), (2,)]


def test_when_it_was_given_up_on_narrows(tmp_path: Path):
    app = duly.App("shop", broker=MemoryDatabase())
    plain = duly.Topic("plain", dict, guarantee="at-least-once")

    @app.consumer(plain, name="c", guarantee="at-least-once")
    def fail(payload: dict[str, Any]) -> None:
        raise duly.Reject("never")

    app.publish(plain, {})
    with working(app):
        eventually(lambda: len(app.dead_letters(topic="plain")) == 1, "a dead letter")
    soon = datetime.now(UTC) + timedelta(minutes=1)
    assert len(app.dead_letters(before=soon)) == 1
    assert app.dead_letters(since=soon) == []


def test_the_oldest_are_replayed_first(monkeypatch: pytest.MonkeyPatch):
    broker = MemoryDatabase()
    app = duly.App("shop", broker=broker)
    plain = duly.Topic("plain", dict, guarantee="at-least-once")

    @app.consumer(plain, name="c", guarantee="at-least-once")
    def fail(payload: dict[str, Any]) -> None:
        raise duly.Reject("never")

    app.publish_many(plain, [{}] * 3)
    with working(app):
        eventually(lambda: len(app.dead_letters()) == 3, "three dead letters")
    replayed: list[int] = []

    def replay(letters: Sequence[DeadLetter]) -> Sequence[DeadLetter]:
        replayed.extend(letter.number for letter in letters)
        return ()

    monkeypatch.setattr(broker, "replay", replay)
    letters = app.dead_letters()
    assert app.replay([*letters, *reversed(letters)]) == 3
    assert len(replayed) == 3
    assert replayed == sorted(replayed)


def test_a_replay_that_can_have_no_effect_is_refused():
    broker = MemoryLog()
    app = duly.App("shop", broker=broker, store=MemoryStore())
    lines = duly.Topic("lines", dict, guarantee="at-least-once", partitions=1)

    @app.consumer(lines, name="c", guarantee="exactly-once", order_by_key=True)
    def fail(payload: dict[str, Any], tx: duly.Transaction[Any]) -> None:
        raise duly.Reject("never")

    app.publish(lines, {}, key="k")
    with working(app):
        eventually(lambda: len(app.dead_letters()) == 1, "a dead letter")
        with pytest.raises(duly.ConfigurationError, match="cursor has passed it"):
            app.replay(app.dead_letters())
        assert app.discard(app.dead_letters()) == 1


def test_by_cursor_a_replay_comes_out_of_the_store():
    store = MemoryStore()
    app = duly.App("shop", broker=MemoryLog(), store=store)
    plain = duly.Topic("plain", dict, guarantee="at-least-once")
    broken = [True]

    @app.consumer(plain, name="c", guarantee="exactly-once")
    def fail(payload: dict[str, Any], tx: duly.Transaction[Any]) -> None:
        tx.connection.insert("effects", payload["n"], True)
        if broken[0]:
            raise duly.Reject("never")

    app.publish_many(plain, [{"n": 1}, {"n": 2}])
    with working(app):
        eventually(lambda: len(app.dead_letters()) == 2, "two dead letters")
        letters = app.dead_letters()
        assert app.replay(letters) == 2
        assert app.replay(letters) == 0, "they are no dead letters any more"
        eventually(lambda: len(app.dead_letters()) == 2, "they died again, out of the store")
        assert {letter.replays for letter in app.dead_letters()} == {1}
        broken[0] = False
        assert app.replay(app.dead_letters()) == 2
        eventually(lambda: len(store.rows("effects")) == 2, "they took effect")
        assert (app.dead_letters(), store.parked.waiting()) == ([], [])


def test_a_broker_that_keeps_none_says_so():
    class Silent:
        def __init__(self) -> None:
            self._inner = MemoryQueue()

        capabilities = property(lambda self: self._inner.capabilities)

        def subscribe(self) -> None: ...

        def declare(self, topics: Any) -> None:
            self._inner.declare(topics)

    with pytest.raises(duly.ConfigurationError, match="keeps no dead letters"):
        duly.App("shop", broker=Silent()).dead_letters()


async def _on_loop(app: duly.App) -> None:
    app.replay([])


def test_not_on_an_event_loop():
    import asyncio

    with pytest.raises(duly.ConfigurationError, match="to_thread"):
        asyncio.run(_on_loop(duly.App("shop", broker=MemoryDatabase())))

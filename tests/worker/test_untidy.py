"""What untidy handlers do to the worker: nothing but fail themselves."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest

import duly
from duly.brokers.sqlite.lane import Lane as SQLiteLane
from duly.errors import BrokerUnavailable
from duly.logs import install
from duly.worker import Worker
from tests.waiting import eventually

numbers: duly.Topic[int] = duly.Topic("numbers", int, guarantee="at-least-once")
keyed: duly.Topic[int] = duly.Topic(
    "keyed", int, guarantee="at-least-once", partitions=2, key=lambda n: "one"
)
ONCE = duly.RetryPolicy(attempts=1)


class Unspeakable(Exception):
    """Its own text fails."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.fixture
def app(db_url: str) -> Any:
    with duly.App("shop", broker=db_url) as app:
        yield app


def dead(app: duly.App) -> list[Any]:
    broker: Any = app.backends()[0]
    return list(broker.dead_letters())


@pytest.mark.parametrize("concurrency", [1, 5])
@pytest.mark.parametrize("error", [ValueError("file \ud800.txt"), Unspeakable()])
def test_an_exception_that_cannot_be_shown_is_a_failure_like_any_other(
    app: duly.App, error: Exception, concurrency: int
) -> None:
    done: list[int] = []

    @app.consumer(numbers, name="c", guarantee="at-least-once", retry=ONCE, concurrency=concurrency)
    async def handle(number: int) -> None:
        if number == 1:
            raise error
        done.append(number)

    app.publish_many(numbers, range(3))
    with Worker(app) as worker:
        eventually(lambda: worker.counts()["c"].handled == 3, "all three have ended")
    assert done == [0, 2]
    assert [type(error).__name__ in letter.error for letter in dead(app)] == [True]


def test_at_most_once_handlers_that_log_and_fail_lose_nothing(
    app: duly.App, caplog: pytest.LogCaptureFixture
) -> None:
    install()
    log, done = logging.getLogger("shop"), []

    @app.consumer(numbers, name="c", guarantee="at-most-once")
    def handle(number: int) -> None:
        done.append(number)
        if number % 50 == 0:
            log.warning("a fiftieth")
        if number % 70 == 0:
            raise ValueError("a seventieth")

    app.publish_many(numbers, range(12_000))
    with caplog.at_level(logging.WARNING), Worker(app):
        eventually(lambda: len(done) == 12_000, "all", lambda: f"{len(done)} handled")
    ours = [record for record in caplog.records if record.name == "shop"]
    assert len(ours) == 240
    assert all(getattr(record, "duly_message_id", None) for record in ours)


def test_a_key_that_waits_is_no_handler_that_runs(app: duly.App) -> None:
    done: list[int] = []

    @app.consumer(
        keyed,
        name="c",
        guarantee="at-least-once",
        concurrency=20,
        order_by_key=True,
        max_run_s=0.5,
        lease_s=0.5,
    )
    async def handle(number: int) -> None:
        await asyncio.sleep(0.1)
        done.append(number)

    app.publish_many(keyed, range(15))
    with Worker(app) as worker:
        eventually(lambda: worker.counts()["c"].handled == 15, "all in turn")
        assert worker.counts()["c"].refused == 0
    assert done == list(range(15))


def test_a_drain_starts_nothing_that_waits_behind_its_key(app: duly.App) -> None:
    started: list[int] = []
    go = asyncio.Event()

    @app.consumer(keyed, name="c", guarantee="at-least-once", concurrency=20, order_by_key=True)
    async def handle(number: int) -> None:
        started.append(number)
        await go.wait()

    app.publish_many(keyed, range(10))
    worker = Worker(app)
    worker.start()
    eventually(lambda: bool(started), "the first of the key runs")
    drain = threading.Thread(target=worker.drain)
    drain.start()
    lanes: list[Any] = worker._lanes
    eventually(lambda: all(driven.lane.stopping for driven in lanes), "told to stop")
    assert worker._loop is not None
    worker._loop.loop.call_soon_threadsafe(go.set)
    drain.join()
    assert started == [0]


def test_a_lost_answer_ends_no_concurrent_lane_and_no_keeper(app: duly.App, tmp_path: Path) -> None:
    done: list[int] = []

    @app.consumer(
        numbers, name="c", guarantee="at-least-once", concurrency=5, lease_s=0.3, max_run_s=30
    )
    async def handle(number: int) -> None:
        await asyncio.sleep(1.0)
        done.append(number)

    app.publish_many(numbers, range(3))
    worker = Worker(app)
    broker: Any = app.backends()[0]
    subscribe, left = broker.subscribe, ["claim", "extend"]

    def faulty(*args: Any) -> Any:
        subscription = subscribe(*args)
        for name in tuple(left):
            real = getattr(subscription, name)

            def once(*args: Any, name: str = name, real: Any = real) -> Any:
                if name in left:
                    left.remove(name)
                    raise duly.CommitUnknown("the answer was lost")
                return real(*args)

            setattr(subscription, name, once)
        return subscription

    broker.subscribe = faulty
    with worker:
        eventually(lambda: worker.counts()["c"].handled == 3, "all")
        assert worker.counts()["c"].refused == 0
    assert sorted(done) == [0, 1, 2]
    assert not left


async def never_awaited(number: int) -> None:
    raise AssertionError(f"{number} ran")


@pytest.mark.parametrize("concurrency", [0, 1, 5])
def test_a_handler_that_hands_back_its_work_has_not_done_it(
    app: duly.App, concurrency: int
) -> None:
    def answer(number: int) -> Any:
        if number == 0:
            return never_awaited(number)  # as a def around an async def does
        if number == 1:
            return (each for each in "abc")
        if number == 2:
            return duly.Reject("not raised")
        return number  # any other value means nothing

    async def answer_async(number: int) -> Any:
        return answer(number)

    handler = answer_async if concurrency else answer
    app.consumer(
        numbers, name="c", guarantee="at-least-once", retry=ONCE, concurrency=concurrency or 1
    )(handler)
    app.publish_many(numbers, range(4))
    with Worker(app) as worker:
        eventually(lambda: worker.counts()["c"].handled == 4, "all four have ended")
    assert sorted(letter.message.body for letter in dead(app)) == [b"0", b"1", b"2"]
    assert all("returned" in letter.error for letter in dead(app))


@pytest.mark.parametrize("concurrency", [1, 5])
def test_a_handler_that_blocks_the_loop_does_not_hold_up_a_drain(
    app: duly.App, concurrency: int
) -> None:
    started, go, waited = threading.Event(), threading.Event(), list[bool]()

    @app.consumer(numbers, name="c", guarantee="at-least-once", concurrency=concurrency)
    async def handle(number: int) -> None:
        started.set()
        waited.append(go.wait(20))

    app.publish(numbers, 1)
    worker = Worker(app)
    worker.start()
    assert started.wait(20)
    assert not worker.drain(0.2)
    assert waited == []
    go.set()
    eventually(lambda: waited, "the handler has ended")
    assert waited == [True]


def test_what_the_database_ended_is_settled_beside_the_loop(
    app: duly.App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others that have the file's turn may need the loop to come to an end."""
    orders: duly.Topic[int] = duly.Topic("orders", int, guarantee="exactly-once")
    on_loop: list[bool] = []
    inner = SQLiteLane.settle

    def settle(self: SQLiteLane, settlements: Any) -> Any:
        on_loop.append(asyncio._get_running_loop() is not None)
        return inner(self, settlements)

    monkeypatch.setattr(SQLiteLane, "settle", settle)

    @app.consumer(orders, name="c", guarantee="exactly-once", retry=ONCE)
    async def handle(number: int, tx: duly.Transaction[sqlite3.Connection]) -> None:
        tx.connection.execute("create table if not exists ones (one integer primary key)")
        tx.connection.execute("insert or rollback into ones values (1), (1)")

    app.publish(orders, 1)
    with Worker(app):
        eventually(lambda: dead(app), "the message is dead")
    assert on_loop
    assert not any(on_loop)


@pytest.mark.parametrize("concurrency", [1, 5])
def test_a_drain_does_not_spin_while_nothing_can_be_settled(
    app: duly.App, monkeypatch: pytest.MonkeyPatch, concurrency: int
) -> None:
    started, go, tries = threading.Event(), threading.Event(), list[float]()

    def settle(*_: Any) -> Any:
        tries.append(1)
        raise BrokerUnavailable("the disk is away")

    monkeypatch.setattr(SQLiteLane, "settle", settle)
    monkeypatch.setattr(SQLiteLane, "settle_and_claim", settle)

    @app.consumer(numbers, name="c", guarantee="at-least-once", concurrency=concurrency)
    async def handle(number: int) -> None:
        started.set()
        await asyncio.to_thread(go.wait, 20)

    app.publish(numbers, 1)
    worker = Worker(app)
    worker.start()
    assert started.wait(20)
    go.set()
    eventually(lambda: tries, "it was tried")
    assert not worker.drain(1.0)
    assert len(tries) < 50

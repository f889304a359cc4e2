"""A lane with many handlers in flight, stepped by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from duly import App
from duly.brokers.sqlite.lane import Lane as SQLiteLane
from duly.guarantees import Done
from duly.message import Topic
from duly.worker import Worker
from duly.worker.concurrent import ConcurrentLane
from duly.worker.keeper import Keeper
from duly.worker.loop import LoopThread
from tests.waiting import eventually
from tests.worker.lanes import Bench

numbers: Topic[int] = Topic("numbers", int, guarantee="at-least-once")


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    thread = LoopThread()
    yield thread
    thread.stop()


@pytest.mark.parametrize("guarantee", ["at-most-once", "at-least-once"])
def test_a_drain_forgets_nobody_who_waits_to_run_alone(loop: LoopThread, guarantee: str) -> None:
    """At-most-once, what waits so is settled: nothing but this lane will ever start it."""
    bench = Bench()
    gate = asyncio.Event()

    async def handle(number: int) -> None:
        bench.seen.append(number)
        if number == 9:
            await gate.wait()

    declare = bench.app.consumer
    declare(numbers, name="c", guarantee=guarantee, concurrency=5, batch=1)(handle)  # type: ignore[call-overload]
    bench.publish(numbers, 9)
    lane = ConcurrentLane(bench.lane("c"), loop.loop)

    def in_flight() -> bool:
        lane.step()
        return 9 in bench.seen

    eventually(in_flight, "one is in flight")
    bench.publish(numbers, 1, 2, 3)
    died = bench.lane("c")
    died.subscription.claim(3, 1 << 20, 0.0)
    bench.broker.crash(died.subscription)

    def waits_alone() -> bool:
        lane.step()
        return bool(lane._alone)

    eventually(waits_alone, "one waits until it can run alone")
    lane.lane.stop()
    loop.loop.call_soon_threadsafe(gate.set)

    def drained() -> bool:
        lane.step()
        return lane.idle()

    eventually(drained, "the lane drains")
    lane.close()
    other = ConcurrentLane(bench.lane("c"), loop.loop)

    def all_seen() -> bool:
        other.step()
        return len(bench.seen) >= 4

    eventually(all_seen, "everything ran", lambda: str(bench.seen))
    assert sorted(bench.seen) == [1, 2, 3, 9]
    other.lane.stop()
    other.close()


def test_a_busy_lane_claims_as_it_settles(db_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One commit in place of two, and never more in flight than may be."""
    app = App("bench", broker=db_url)
    seen: list[int] = []
    in_flight, most = 0, 0
    claimed_ahead: list[int] = []
    inner = SQLiteLane.settle_and_claim

    def settle_and_claim(self: SQLiteLane, settlements: Any, ahead: Any) -> Any:
        refused = inner(self, settlements, ahead)
        claimed_ahead.append(len(ahead.deliveries()))
        return refused

    monkeypatch.setattr(SQLiteLane, "settle_and_claim", settle_and_claim)

    @app.consumer(numbers, name="c", guarantee="at-least-once", concurrency=10, batch=5)
    async def handle(number: int) -> None:
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        await asyncio.sleep(0)
        in_flight -= 1
        seen.append(number)

    app.publish_many(numbers, range(200))
    with app, Worker(app):
        eventually(lambda: len(seen) >= 200, "all are handled")
    assert sorted(seen) == list(range(200))
    assert most <= 10
    assert any(claimed_ahead), "never with a settlement"


@pytest.mark.parametrize("kept", [True, False])
def test_what_waits_to_run_alone_is_kept_or_not_started(loop: LoopThread, kept: bool) -> None:
    """Its lease is extended as those of what runs are; where that was lost, another has it."""
    bench = Bench()
    gate = asyncio.Event()

    @bench.app.consumer(
        numbers, name="c", guarantee="at-least-once", concurrency=5, batch=1, lease_s=9
    )
    async def handle(number: int) -> None:
        bench.seen.append(number)
        if number == 9:
            await gate.wait()

    bench.publish(numbers, 9)
    driven = ConcurrentLane(bench.lane("c"), loop.loop)
    keeper = Keeper(bench.clock, lambda *_: None, None)
    keeper.watch(driven.lane, driven)

    def in_flight() -> bool:
        driven.step()
        return 9 in bench.seen

    eventually(in_flight, "one is in flight")
    bench.publish(numbers, 1)
    died = bench.lane("c")
    died.subscription.claim(1, 1 << 20, 0.0)
    bench.broker.crash(died.subscription)

    def waits_alone() -> bool:
        driven.step()
        return bool(driven._alone)

    eventually(waits_alone, "one waits until it can run alone")
    other = bench.lane("c").subscription
    if kept:
        for _ in range(5):
            bench.clock.now += 4
            keeper.look()
        assert not other.claim(5, 1 << 20, 0.0)
    else:
        bench.clock.now += 10
        for _ in range(2):
            [theirs] = other.claim(5, 1 << 20, 0.0)
            assert list(other.settle([Done(theirs.receipt)])) == []
        for _ in range(3):
            bench.clock.now += 4
            keeper.look()
    loop.loop.call_soon_threadsafe(gate.set)

    def drained() -> bool:
        driven.step()
        return driven.idle() and not driven._alone

    eventually(drained, "nothing is left to do")
    assert bench.seen == ([9, 1] if kept else [9])
    driven.lane.stop()
    driven.close()


@pytest.mark.parametrize(
    ("guarantee", "handled"), [("at-least-once", [1]), ("at-most-once", [1, 2])]
)
def test_behind_another_of_its_key_nothing_is_started_that_another_lane_has(
    loop: LoopThread, guarantee: str, handled: list[int]
) -> None:
    """At-most-once it is settled, and nobody else will ever start it."""
    bench = Bench()
    topic: Topic[int] = Topic(
        "keyed", int, guarantee="at-least-once", key=lambda _: "k", partitions=1
    )
    gate = asyncio.Event()

    async def handle(number: int) -> None:
        bench.seen.append(number)
        if number == 1:
            await gate.wait()

    options: dict[str, Any] = {"concurrency": 5, "order_by_key": True, "lease_s": 9}
    bench.app.consumer(topic, name="c", guarantee=guarantee, **options)(handle)  # type: ignore[call-overload]
    bench.publish(topic, 1, 2)
    driven = ConcurrentLane(bench.lane("c"), loop.loop)
    keeper = Keeper(bench.clock, lambda *_: None, None)
    keeper.watch(driven.lane, driven)

    def in_flight() -> bool:
        driven.step()
        return 1 in bench.seen

    eventually(in_flight, "one is in flight, and one waits behind it")
    if guarantee == "at-least-once":
        bench.clock.now += 10
        other = bench.lane("c").subscription
        for _ in range(2):
            [theirs] = other.claim(5, 1 << 20, 0.0)
            assert list(other.settle([Done(theirs.receipt)])) == []
    for _ in range(3):
        bench.clock.now += 4
        keeper.look()
    loop.loop.call_soon_threadsafe(gate.set)

    def drained() -> bool:
        driven.step()
        return driven.idle() and not driven._in_flight

    eventually(drained, "what was in flight has ended")
    assert bench.seen == handled
    driven.lane.stop()
    driven.close()

"""The keeper, driven by hand: leases are extended, and handlers past their time are reported."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest

from duly import events
from duly.message import Topic
from duly.worker.keeper import CANCEL_GRACE_S, Keeper
from tests.worker.lanes import Bench

numbers: Topic[int] = Topic("numbers", int, guarantee="at-least-once")


class Kept:
    """A lane whose keeper looks whenever a handler has let some time pass."""

    def __init__(self, *, is_async: bool = False) -> None:
        self.bench = Bench()
        self.pauses: list[float] = []
        self.between: list[Callable[[], object]] = []
        self.extended: list[float] = []
        self.overruns: list[tuple[str, float]] = []
        self.told: list[Any] = []
        options: dict[str, Any] = {"guarantee": "at-least-once", "lease_s": 9, "max_run_s": 30}
        decorate: Any = self.bench.app.consumer(numbers, name="c", **options)

        def handle(number: int) -> None:
            pauses, self.pauses = self.pauses, []
            for pause_s in pauses:
                self.bench.clock.now += pause_s
                while self.between:
                    self.between.pop()()
                self.keeper.look()
            self.bench.seen.append(number)

        async def ahandle(number: int) -> None:
            handle(number)

        decorate(ahandle if is_async else handle)
        self.lane = self.bench.lane("c", on_loop=asyncio.run)
        self.lane.around.watchers = [self.told.append]
        extend, began = self.lane.subscription.extend, self.bench.clock.now

        def noted(receipts: Iterable[Any], lease_s: float) -> Sequence[Any]:
            self.extended.append(self.bench.clock.now - began)
            return extend(receipts, lease_s)

        self.lane.subscription.extend = noted  # type: ignore[method-assign]
        self.keeper = Keeper(self.bench.clock, lambda *each: self.overruns.append(each), None)
        self.keeper.watch(self.lane, self.lane)

    def work(self, *pauses_s: float) -> None:
        """Handle one message, with these pauses."""
        self.pauses = [*pauses_s]
        self.bench.publish(numbers, 1)
        self.bench.drain(self.lane)

    @property
    def lost(self) -> list[Any]:
        return [event for event in self.told if isinstance(event, events.LeaseLost)]


@pytest.mark.parametrize("is_async", [False, True])
def test_a_handler_within_its_time_keeps_its_lease(is_async: bool):
    kept = Kept(is_async=is_async)
    kept.work(*[4] * 7)
    assert kept.lane.counts.refused == 0
    assert kept.overruns == kept.lost == []


@pytest.mark.parametrize("is_async", [False, True])
def test_one_past_its_time_is_reported_once_and_keeps_no_lease(is_async: bool):
    kept = Kept(is_async=is_async)
    limit_s = 30 + (CANCEL_GRACE_S if is_async else 0)
    kept.work(*[5] * 6, limit_s - 30, 1, 4, 4)
    assert kept.overruns == [("c", limit_s + 1)]
    assert max(kept.extended) <= limit_s, "another may have it"
    kept.keeper.look()
    kept.work(limit_s + 1)
    assert len(kept.overruns) == 2, "the next one anew"


def test_a_lease_that_is_lost_is_told_once_it_is_sure():
    kept = Kept()
    successor = kept.bench.lane("c")
    kept.between = [lambda: kept.bench.drain(successor)]
    kept.work(10, 4, 4, 4)
    [lost] = kept.lost
    assert len(lost.receipts) == 1
    assert kept.bench.seen == [1, 1]


@pytest.mark.parametrize("size", [1, 2])
def test_what_another_has_by_now_is_not_started_here_too(size: int):
    """The first of a claim is slow, and the keeper was kept from extending: one message a call, and
    a batch handler that went on to single calls after a failure.
    """
    bench = Bench()
    handled: dict[str, list[int]] = {"first": [], "second": []}
    who = ["first"]

    def handle(given: Any) -> None:
        taken = given if isinstance(given, list) else [given]
        if len(taken) > 1:
            raise ValueError("one at a time")
        handled[who[-1]] += taken
        if taken == [0] and who == ["first"]:
            bench.clock.now += 10
            who.append("second")
            bench.drain(second)
            who.pop()
            for _ in range(2):
                bench.clock.now += 4
                keeper.look()

    declare: Any = bench.app.consumer if size == 1 else bench.app.batch_consumer
    declare(numbers, name="c", guarantee="at-least-once", lease_s=9, max_run_s=30)(handle)
    first, second = bench.lane("c"), bench.lane("c")
    keeper = Keeper(bench.clock, lambda *_: None, None)
    keeper.watch(first, first)
    bench.publish(numbers, *range(5))
    bench.drain(first)
    assert handled == {"first": [0], "second": [0, 1, 2, 3, 4]}
    assert not first.pending

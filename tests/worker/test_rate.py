"""A limit on handler starts a second holds whatever becomes of what was claimed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import duly
from duly import Topic, errors
from duly.testing import Running, running
from duly.worker.permits import Permits
from tests.worker.lanes import Bench

RATE_PER_S = 50
# What may be saved up beforehand, and the start that is let through at once.
BURST = 5 + 1


class Starts:
    """When a consumer's handler was started, and for what."""

    def __init__(self) -> None:
        self.at: list[float] = []
        self.numbers: list[int] = []
        self.now: Callable[[], float] = lambda: 0.0

    def __call__(self, n: int) -> None:
        self.at.append(self.now())
        self.numbers.append(n)

    def worked(self, app: duly.App, folder: Path, publish: Callable[[Running], object]) -> None:
        """Work ``app`` to the end, with its clock."""
        with running(app, folder=folder) as t:
            self.now = t.clock
            publish(t)
            t.clock.advance(1.0)  # so that the first claim is of several
            t.drain(advance=True, failures="expected")

    def check(self) -> None:
        """At no time were there more than the limit allows, nor far fewer in all."""
        for first, at in enumerate(self.at):
            for seconds in (0.0, 0.05, 1.0):
                within = sum(1 for other in self.at[first:] if other <= at + seconds)
                assert within <= RATE_PER_S * seconds + BURST, self.at
        assert self.at[-1] - self.at[0] <= len(self.at) / RATE_PER_S + 1.5, "and no slower"


@pytest.fixture(params=["memory://", "sqlite:///a.db"])
def app(request: pytest.FixtureRequest) -> duly.App:
    return duly.App("theirs", request.param)


def consume(app: duly.App, topic: Topic[Any], handle: Any, guarantee: Any, **options: Any) -> None:
    options.setdefault("retry", duly.RetryPolicy(attempts=2, first_s=0.01))
    declare: Any = app.batch_consumer if "batch" in options else app.consumer
    declare(topic, name="c", guarantee=guarantee, rate_per_s=RATE_PER_S, **options)(handle)


def test_batches_that_are_rolled_back_start_their_messages_again(app: duly.App, tmp_path: Path):
    topic: Topic[int] = Topic("t", int, guarantee="exactly-once")
    starts = Starts()

    def handle(n: int, tx: duly.Transaction[Any]) -> None:
        starts(n)
        if n % 5 == 4:
            raise ValueError(n)

    consume(app, topic, handle, "exactly-once")
    starts.worked(app, tmp_path, lambda t: t.publish_many(topic, range(120)))
    assert set(starts.numbers) == set(range(120))
    starts.check()


@pytest.mark.parametrize("wished", ["one call", "many at once"])
def test_retries_are_starts(app: duly.App, tmp_path: Path, wished: str):
    topic: Topic[int] = Topic("t", int, guarantee="at-least-once")
    starts = Starts()

    async def handle(n: int) -> None:
        starts(n)
        raise ValueError(n)

    consume(app, topic, handle, "at-least-once", concurrency=1 if wished == "one call" else 8)
    starts.worked(app, tmp_path, lambda t: t.publish_many(topic, range(60)))
    assert sorted(starts.numbers) == sorted([*range(60)] * 2)
    starts.check()


def test_a_batch_handlers_failure_starts_each_of_its_messages_again(app: duly.App, tmp_path: Path):
    topic: Topic[int] = Topic("t", int, guarantee="at-least-once")
    starts = Starts()

    def handle(numbers: list[int]) -> None:
        for n in numbers:
            starts(n)
        if len(numbers) > 1:
            raise ValueError

    consume(app, topic, handle, "at-least-once", batch=5)
    starts.worked(app, tmp_path, lambda t: t.publish_many(topic, range(120)))
    starts.check()


@pytest.mark.parametrize("concurrency", [1, 8])
@pytest.mark.parametrize("guarantee", ["at-most-once", "at-least-once"])
def test_what_never_starts_uses_nothing_up(
    app: duly.App, tmp_path: Path, guarantee: Any, concurrency: int
):
    """Messages that cannot be decoded, and those that wait behind a failure of their key."""
    topic: Topic[int] = Topic("t", int, guarantee=guarantee, key=lambda _: "k", partitions=1)
    other: Topic[str] = Topic("t", str, guarantee=guarantee, partitions=1)
    starts = Starts()

    async def handle(n: int) -> None:
        starts(n)
        await asyncio.sleep(0)
        if n == 3 and starts.numbers.count(3) == 1:
            raise ValueError(n)

    ordered = {"order_by_key": True} if guarantee == "at-least-once" else {}
    consume(app, topic, handle, guarantee, concurrency=concurrency, **ordered)

    def publish(t: Running) -> None:
        for n in range(120):
            t.publish(topic, n)
            t.broker.publish([other.message("not a number", source="elsewhere", key="other")])

    starts.worked(app, tmp_path, publish)
    assert set(starts.numbers) == set(range(120))
    starts.check()


def test_a_claim_that_fails_uses_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    numbers: Topic[int] = Topic("numbers", int, guarantee="at-least-once")

    @bench.app.consumer(numbers, name="c", guarantee="at-least-once", batch=5)
    def handle(n: int) -> None:
        bench.seen.append(n)

    lane = bench.lane("c")
    lane.around.permits = Permits(50, bench.clock)
    bench.publish(numbers, *range(5))
    bench.clock.now += 1
    with monkeypatch.context() as patch:
        patch.setattr(lane.subscription, "claim", unavailable)
        lane.step()
    while not (lane.step() == 0.0 and lane.idle()):
        pass
    assert bench.seen == [*range(5)]


def unavailable(*_: Any) -> Any:
    raise errors.BrokerUnavailable("not now")

"""A worker with its real threads and loop, on the in-memory database."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pytest

from duly import App
from duly.brokers.memory import MemoryDatabase
from duly.errors import ConfigurationError, Reject
from duly.guarantees import RetryPolicy
from duly.logs import install
from duly.message import Message, Topic
from duly.store import Transaction
from duly.stores.memory.store import MemoryStore
from duly.stores.memory.tables import MemoryTables
from duly.worker import Worker

DEADLINE_S = 20.0

numbers: Topic[int] = Topic("numbers", int, guarantee="at-least-once")
keyed: Topic[int] = Topic(
    "keyed", int, guarantee="at-least-once", partitions=4, key=lambda n: str(n % 10)
)


class Place:
    """An app on a fresh in-memory database."""

    def __init__(self) -> None:
        self.broker = MemoryDatabase()
        self.store = MemoryStore(self.broker)
        self.app = App("place", broker=self.broker, store=self.store)

    def publish(self, topic: Topic[int], payloads: range) -> None:
        self.broker.declare([topic])
        self.broker.publish([topic.message(n, source="place") for n in payloads])

    @contextmanager
    def working(self, **options: Any) -> Iterator[Worker]:
        worker = Worker(self.app, **options)
        worker.start()
        try:
            yield worker
        finally:
            assert worker.drain(DEADLINE_S), "did not drain"


@pytest.fixture
def place() -> Place:
    return Place()


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition, looking at it often, up to a deadline."""
    waiting = threading.Event()
    for _ in range(int(DEADLINE_S / 0.005)):
        if condition():
            return
        waiting.wait(0.005)
    raise AssertionError(f"not within {DEADLINE_S} s: {what}")


def test_five_hundred_are_really_in_flight(place: Place) -> None:
    started: list[int] = []
    all_started = asyncio.Event()

    @place.app.consumer(numbers, name="c", guarantee="at-least-once", concurrency=500)
    async def handle(number: int) -> None:
        started.append(number)
        if len(started) == 500:
            all_started.set()
        await all_started.wait()  # nobody ends before five hundred have started

    place.publish(numbers, range(500))
    with place.working() as worker:
        until(lambda: worker.counts()["c"].handled == 500, "500 handled")


def test_a_slow_handler_does_not_hold_up_its_neighbours(place: Place) -> None:
    done: list[int] = []
    release = asyncio.Event()

    @place.app.consumer(numbers, name="c", guarantee="at-least-once", concurrency=10, batch=5)
    async def handle(number: int) -> None:
        if number == 0:
            await release.wait()
        done.append(number)

    place.publish(numbers, range(1000))
    with place.working() as worker:
        until(lambda: len(done) == 999, "all but the slow one")
        assert 0 not in done
        assert worker._loop is not None
        worker._loop.loop.call_soon_threadsafe(release.set)
        until(lambda: worker.counts()["c"].handled == 1000, "the slow one too")


@pytest.mark.parametrize("guarantee", ["at-most-once", "at-least-once"])
@pytest.mark.parametrize("concurrency", [1, 20])
def test_async_handlers_handle_all_once_without_faults(
    place: Place, guarantee: Literal["at-most-once", "at-least-once"], concurrency: int
) -> None:
    done: list[int] = []

    @place.app.consumer(numbers, name="c", guarantee=guarantee, concurrency=concurrency)
    async def handle(number: int) -> None:
        await asyncio.sleep(0)
        done.append(number)

    place.publish(numbers, range(300))
    with place.working():
        until(lambda: len(done) >= 300, "all")
    assert sorted(done) == list(range(300))


def test_async_failures_are_tried_again_and_dead_at_last(place: Place) -> None:
    tries: list[int] = []

    @place.app.consumer(
        numbers,
        name="c",
        guarantee="at-least-once",
        concurrency=10,
        retry=RetryPolicy(attempts=3, first_s=0.0, jitter=0),
    )
    async def handle(number: int) -> None:
        tries.append(number)
        if number == 3:
            raise ValueError("three")
        if number == 4:
            raise Reject("four")

    place.publish(numbers, range(10))
    with place.working():
        until(lambda: len(place.broker.dead_letters("c")) == 2, "two dead")
    assert tries.count(3) == 3
    assert tries.count(4) == 1
    assert len(tries) == 12


def test_an_async_handler_over_its_time_is_cancelled_and_retried(place: Place) -> None:
    tries: list[str] = []

    @place.app.consumer(
        numbers,
        name="c",
        guarantee="at-least-once",
        concurrency=2,
        max_run_s=0.05,
        retry=RetryPolicy(attempts=2, first_s=0.0, jitter=0),
    )
    async def handle(number: int) -> None:
        tries.append("start")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            tries.append("cancelled")
            raise

    place.publish(numbers, range(1))
    with place.working():
        until(lambda: len(place.broker.dead_letters("c")) == 1, "dead")
    assert tries == ["start", "cancelled"] * 2
    assert "max_run_s" in place.broker.dead_letters("c")[0].error


@pytest.mark.parametrize(
    ("guarantee", "concurrency"),
    [
        ("at-most-once", 1),
        ("at-most-once", 3),
        ("at-least-once", 1),
        ("at-least-once", 3),
        ("exactly-once", 1),
    ],
)
def test_what_a_drain_cancels_is_no_failure_and_settles_nothing(
    place: Place, guarantee: Any, concurrency: int
) -> None:
    topic: Topic[int] = Topic("hung", int, guarantee=guarantee)
    seen: list[str] = []

    async def hang(_: int) -> None:
        seen.append("started")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    async def hang_within(number: int, _: Transaction[MemoryTables]) -> None:
        await hang(number)

    declare: Any = place.app.consumer(
        topic, name="c", guarantee=guarantee, concurrency=concurrency, retry=RetryPolicy(attempts=1)
    )
    declare(hang_within if guarantee == "exactly-once" else hang)
    place.publish(topic, range(1))
    worker = Worker(place.app)
    worker.start()
    until(lambda: seen == ["started"], "it runs")
    assert not worker.drain(0.05)
    until(lambda: not any(thread.is_alive() for thread in worker._threads), "the lanes ended")
    assert seen == ["started", "cancelled"]
    assert worker.counts()["c"].failed == 0
    assert place.broker.dead_letters("c") == []
    [state] = place.broker.subscriptions()
    assert state.backlog == (guarantee != "at-most-once"), "given back, where it was not settled"


def test_concurrency_keeps_order_by_key(place: Place) -> None:
    done: list[int] = []
    running: set[int] = set()

    @place.app.consumer(
        keyed, name="c", guarantee="at-least-once", concurrency=50, order_by_key=True
    )
    async def handle(number: int) -> None:
        assert number % 10 not in running, "two of one key at once"
        running.add(number % 10)
        await asyncio.sleep(0)
        running.discard(number % 10)
        done.append(number)

    place.publish(keyed, range(400))
    with place.working():
        until(lambda: len(done) == 400, "all")
    for key in range(10):
        of_key = [number for number in done if number % 10 == key]
        assert of_key == sorted(of_key)
    assert not place.broker.dead_letters("c")


@pytest.mark.parametrize("is_async", [False, True])
def test_exactly_once_with_real_threads(place: Place, is_async: bool) -> None:
    if is_async:

        @place.app.consumer(numbers, name="c", guarantee="exactly-once")
        async def handle_async(number: int, tx: Transaction[MemoryTables]) -> None:
            await asyncio.sleep(0)
            tx.connection.insert("effects", number, number)

    else:

        @place.app.consumer(numbers, name="c", guarantee="exactly-once", lanes=3)
        def handle(number: int, tx: Transaction[MemoryTables]) -> None:
            tx.connection.insert("effects", number, number)

    place.publish(numbers, range(500))
    with place.working() as worker:
        until(lambda: worker.counts()["c"].handled == 500, "all")
    assert set(place.store.rows("effects")) == set(range(500))


def test_lifespan_surrounds_the_work(place: Place) -> None:
    happened: list[str] = []

    @contextmanager
    def lifespan(app: App) -> Iterator[None]:
        happened.append("up")
        yield
        happened.append("down")

    place.app.lifespan = lifespan

    @place.app.consumer(numbers, name="c", guarantee="at-least-once")
    def handle(number: int) -> None:
        happened.append("handled")

    place.publish(numbers, range(1))
    with place.working():
        until(lambda: "handled" in happened, "handled")
    assert happened == ["up", "handled", "down"]


def test_a_rate_limit_holds(place: Place) -> None:
    seen: list[int] = []

    @place.app.consumer(numbers, name="c", guarantee="at-least-once", rate_per_s=50, lanes=2)
    def handle(number: int) -> None:
        seen.append(number)

    place.publish(numbers, range(1000))
    with place.working():
        threading.Event().wait(1.0)
        after_a_second = len(seen)
    assert 20 <= after_a_second <= 70


def test_what_breaks_a_lane_is_raised_by_drain(place: Place) -> None:
    @place.app.consumer(numbers, name="c", guarantee="at-least-once")
    def handle(number: int) -> None:
        raise SystemExit(3)

    place.publish(numbers, range(1))
    worker = Worker(place.app)
    worker.start()
    assert worker.wait(DEADLINE_S)
    with pytest.raises(SystemExit):
        worker.drain(DEADLINE_S)


def test_records_a_handler_logs_say_which_message(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    install()
    log = logging.getLogger("shop")

    @place.app.consumer(numbers, name="sync", guarantee="at-least-once")
    def handle(message: Message[int]) -> None:
        log.info("sync %s", message.id)

    @place.app.consumer(numbers, name="async", guarantee="at-least-once", concurrency=5)
    async def handle_async(message: Message[int]) -> None:
        log.info("async %s", message.id)

    place.publish(numbers, range(5))
    with caplog.at_level(logging.INFO, "shop"), place.working():
        until(lambda: len(caplog.records) == 10, "ten records")
    for record in caplog.records:
        assert record.getMessage() == f"{record.duly_consumer} {record.duly_message_id}"  # type: ignore[attr-defined]
        assert record.duly_attempt == 1  # type: ignore[attr-defined]


def test_a_hung_handler_loses_its_lease(place: Place) -> None:
    hang, seen = threading.Event(), []

    @place.app.consumer(
        numbers, name="c", guarantee="at-least-once", lease_s=0.3, max_run_s=0.3, lanes=2
    )
    def handle(number: int) -> None:
        seen.append(number)
        if len(seen) == 1:
            hang.wait(DEADLINE_S)

    place.publish(numbers, range(1))
    with place.working() as worker:
        until(lambda: len(seen) == 2, "the other lane took it over")
        hang.set()
        until(lambda: worker.counts()["c"].refused == 1, "the late settlement was refused")


def test_a_long_handler_keeps_its_lease(place: Place) -> None:
    proceed, seen = threading.Event(), []

    @place.app.consumer(
        numbers, name="c", guarantee="at-least-once", lease_s=0.3, max_run_s=60, lanes=2
    )
    def handle(number: int) -> None:
        seen.append(number)
        proceed.wait(DEADLINE_S)

    place.publish(numbers, range(1))
    with place.working() as worker:
        until(lambda: bool(seen), "started")
        threading.Event().wait(1.0)  # three leases long
        assert len(seen) == 1
        proceed.set()
        until(lambda: worker.counts()["c"].handled == 1, "settled")
        assert worker.counts()["c"].refused == 0


def test_leases_that_are_due_together_are_extended_at_the_same_time(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, each waiting for its turn to write, the last would come too late."""
    together, proceed, started = threading.Barrier(2), threading.Event(), []
    subscribe = place.broker.subscribe

    def slow(*given: Any) -> Any:
        subscription = subscribe(*given)
        extend = subscription.extend

        def with_the_other(*given: Any) -> Any:
            together.wait(DEADLINE_S)
            return extend(*given)

        monkeypatch.setattr(subscription, "extend", with_the_other)
        return subscription

    monkeypatch.setattr(place.broker, "subscribe", slow)
    for name in ("a", "b"):

        @place.app.consumer(numbers, name=name, guarantee="at-least-once", lease_s=2, max_run_s=60)
        def handle(number: int) -> None:
            started.append(number)
            proceed.wait(DEADLINE_S)

    place.publish(numbers, range(1))
    with place.working() as worker:
        until(lambda: len(started) == 2, "both run")
        threading.Event().wait(2.5)  # longer than a lease
        proceed.set()
        until(lambda: sum(c.handled for c in worker.counts().values()) == 2, "both settled")
        assert sum(c.refused for c in worker.counts().values()) == 0
    assert not together.broken


@pytest.mark.parametrize("is_async", [False, True])
def test_publishing_past_the_transaction_is_refused_at_once(place: Place, is_async: bool) -> None:
    refusals: list[str] = []

    def publish() -> None:
        try:
            place.app.publish(numbers, 2)
        except ConfigurationError as error:
            refusals.append(str(error))

    if is_async:

        @place.app.consumer(numbers, name="c", guarantee="exactly-once")
        async def handle_async(number: int, tx: Transaction[MemoryTables]) -> None:
            publish()

    else:

        @place.app.consumer(numbers, name="c", guarantee="exactly-once")
        def handle(number: int, tx: Transaction[MemoryTables]) -> None:
            publish()

    place.publish(numbers, range(1))
    with place.working():
        until(lambda: bool(refusals), "refused")
    assert "tx.publish" in refusals[0] or "apublish" in refusals[0]

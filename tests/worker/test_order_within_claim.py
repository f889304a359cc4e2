"""What was claimed together keeps its order also where one of it fails in a round of its own."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import duly
from duly import errors
from duly.broker import SubscribeOptions
from duly.brokers.memory import MemoryLog
from duly.guarantees import Admission, Guarantee
from duly.message import Message, Topic
from duly.stores.memory import MemoryStore, MemoryTables
from duly.worker.lane import Lane
from duly.worker.steps import Surroundings
from tests.worker.lanes import Bench, Clock

RETRY = duly.RetryPolicy(attempts=3, first_s=1, jitter=0)
two_keys: Topic[int] = Topic(
    "two-keys", int, guarantee="at-least-once", key=lambda n: f"k{n % 2}", partitions=1
)
keyed: Topic[int] = Topic("keyed", int, guarantee="at-least-once", key=lambda _: "k", partitions=1)


class Log:
    """An exactly-once consumer of a log in memory, admitted by cursor."""

    def __init__(self, handle: Any, **options: Any) -> None:
        self.clock = Clock()
        self.broker = MemoryLog(clock=self.clock, wall_ms=self.clock.wall_ms)
        self.store = MemoryStore(wall_ms=self.clock.wall_ms)
        self.topic: Topic[int] = Topic("t", int, guarantee="exactly-once")
        self.app = duly.App("bench", broker=self.broker, store=self.store)
        self.app.consumer(self.topic, name="c", guarantee="exactly-once", retry=RETRY, **options)(
            handle
        )
        self.broker.declare([self.topic])
        consumer = self.app.consumers[0]
        self.lane = Lane(
            consumer,
            self.broker.subscribe([self.topic], "c", SubscribeOptions(Guarantee.EXACTLY_ONCE)),
            consumer.handler.function,
            Surroundings("bench", clock=self.clock, roll=lambda: 0.0, wait_s=0.0),
            store=self.store,
            admission=Admission.BY_CURSOR,
            retries_in_place=True,
        )

    def publish(self, *bodies: bytes) -> None:
        self.broker.publish(
            [Message("t", "bench", f"m{n}", body, 1) for n, body in enumerate(bodies, 1)]
        )

    def work(self, seconds: int = 120) -> list[Any]:
        for _ in range(seconds):
            for _ in range(20):
                self.lane.step()
            self.clock.now += 1
        return sorted(self.store.rows("effects"))


@pytest.mark.parametrize("unfit", [b"2", b"no number"])
def test_by_cursor_nothing_passes_a_failure_after_a_failed_commit(unfit: bytes) -> None:
    failed: list[int] = []

    def handle(number: int, tx: duly.Transaction[MemoryTables]) -> None:
        tx.connection.insert("effects", number, number)
        if number == 1 and len(failed) < 3:
            failed.append(number)
            raise ValueError

    log = Log(handle)
    log.publish(b"1", unfit, b"3")
    refused: list[str] = []

    def refuse(moment: str) -> None:
        if moment == "before" and len(refused) < 1:
            refused.append(moment)
            raise errors.TransactionFailed("a deferred constraint")

    log.store.on_commit = refuse
    found = log.work()
    dead = [letter.message.id for letter in log.store.dead_letters("c")]
    wanted = {1, 3} | ({2} if unfit == b"2" else set())
    assert set(found) | {1 for id in dead if id == "m1"} == wanted


@pytest.mark.parametrize("how", ["cancelled", "unknown"])
def test_by_cursor_nothing_passes_what_must_come_again(how: str) -> None:
    seen: list[int] = []
    trouble = ["singly", how]

    def handle(number: int, tx: duly.Transaction[MemoryTables]) -> None:
        seen.append(number)
        tx.connection.insert("effects", number, number)
        if how == "cancelled" and not trouble and seen.count(1) == 2 and number == 1:
            raise asyncio.CancelledError

    log = Log(handle)
    log.publish(b"1", b"2", b"3")

    def on_commit(moment: str) -> None:
        if moment == "before" and trouble:
            what = trouble.pop(0)
            if what == "singly":  # the whole batch fails to commit: one by one from here
                if how == "cancelled":
                    trouble.clear()
                raise errors.TransactionFailed("a deferred constraint")
            if what == "unknown":
                raise ConnectionError("cut before the commit")

    log.store.on_commit = on_commit
    assert log.work() == [1, 2, 3]


def test_what_time_left_over_does_not_overtake_a_retry() -> None:
    bench = Bench()
    done: list[int] = []

    @bench.app.consumer(
        two_keys, name="c", guarantee="at-least-once", order_by_key=True, tx_s=1.0, retry=RETRY
    )
    def handle(number: int) -> None:
        bench.clock.now += 2  # over the time of a round
        if number == 1 and not bench.seen:
            bench.seen.append(number)
            raise ValueError
        done.append(number)

    lane = bench.lane("c")
    bench.publish(two_keys, 1, 2, 3)
    for _ in range(60):
        lane.step()
        bench.clock.now += 0.2
    assert done == [2, 1, 3]


@pytest.mark.parametrize("guarantee", ["at-least-once", "exactly-once"])
@pytest.mark.parametrize("batch", [False, True])
def test_what_cannot_be_decoded_holds_its_key_too(guarantee: Any, batch: bool) -> None:
    bench = Bench()
    options = {"name": "c", "guarantee": guarantee, "order_by_key": True, "hold_key_on_dead": True}

    def note(given: Any) -> None:
        bench.seen.extend(given if isinstance(given, list) else [given])

    def handle(number: int) -> None:
        note(number)

    def handle_batch(numbers: list[int]) -> None:
        note(numbers)

    def handle_tx(number: int, tx: duly.Transaction[MemoryTables]) -> None:
        note(number)

    def handle_batch_tx(numbers: list[int], tx: duly.Transaction[MemoryTables]) -> None:
        note(numbers)

    exactly = guarantee == "exactly-once"
    declare: Any = bench.app.batch_consumer if batch else bench.app.consumer
    plain, with_tx = (handle_batch, handle_batch_tx) if batch else (handle, handle_tx)
    declare(keyed, **options)(with_tx if exactly else plain)
    lane = bench.lane("c")
    bench.publish(keyed, 1)
    bench.broker.publish([Message("keyed", "bench", "bad", b"no number", 1, "k")])
    bench.publish(keyed, 3)
    for _ in range(40):
        lane.step()
    assert bench.seen == [1]
    assert len(bench.dead("c")) == 1


def test_what_cannot_be_decoded_waits_behind_a_retry() -> None:
    bench = Bench()

    @bench.app.consumer(keyed, name="c", guarantee="at-least-once", order_by_key=True, retry=RETRY)
    def handle(number: int) -> None:
        raise ValueError

    lane = bench.lane("c")
    bench.publish(keyed, 1)
    bench.broker.publish([Message("keyed", "bench", "bad", b"no number", 1, "k")])
    for _ in range(10):
        lane.step()
    assert bench.dead("c") == []

"""Processes of one consumer: partitions change hands, and who lost them is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException

from duly.brokers.kafka import KafkaBroker
from duly.brokers.kafka.assigned import Beginnings
from duly.brokers.kafka.client import consuming
from duly.errors import BrokerUnavailable
from duly.guarantees import Done, Retry
from duly.message import Topic, now_ms
from tests.kafka.work import (
    A_LOT,
    OPTIONS,
    ORDERS,
    awaited,
    bodies,
    broker_at,
    publish,
    work_off,
)
from tests.waiting import eventually

EAGER = "&partition.assignment.strategy=range"
NEW = "&group.protocol=consumer"
QUICK = "&session.timeout.ms=2000&heartbeat.interval.ms=400"
POLLS_MS = 3000
"""So rarely a member may ask for more; as the driver has it, not less than its session."""

NUMBERS = [str(number) for number in range(60)]


def owned(broker: KafkaBroker) -> set[int]:
    """The partitions of the topic that this process has."""
    [intake] = broker._intakes.values()
    with intake.changed:
        return {number for name, number in intake.shares if name.endswith("orders")}


@pytest.mark.parametrize(
    "protocol",
    ["", pytest.param(EAGER, marks=pytest.mark.long), pytest.param(NEW, marks=pytest.mark.long)],
    ids=["cooperative", "eager", "kip-848"],
)
def test_partitions_are_dealt_anew_and_nothing_is_handled_twice(kafka_url: str, protocol: str):
    url = kafka_url + protocol
    with broker_at(url) as one, broker_at(url) as two:
        publish(one, *NUMBERS)
        first = one.subscribe([ORDERS], "sub", OPTIONS)
        handled = bodies(held := awaited(first, 7, limit=7))
        assert list(first.settle([Done(each.receipt) for each in held])) == []
        second = two.subscribe([ORDERS], "sub", OPTIONS)
        eventually(lambda: owned(one) and owned(two), "both have partitions")
        assert owned(one) | owned(two) == {0, 1, 2, 3}
        got: dict[Any, list[str]] = {first: [], second: []}
        stop = threading.Event()

        def work(lane: Any) -> None:
            while not stop.is_set():
                deliveries = lane.claim(3, A_LOT, 0.1)
                got[lane] += bodies(deliveries)
                assert list(lane.settle([Done(each.receipt) for each in deliveries])) == []

        threads = [threading.Thread(target=work, args=(lane,)) for lane in got]
        for thread in threads:
            thread.start()
        eventually(lambda: len(got[first]) + len(got[second]) >= 53, "all are handled")
        stop.set()
        for thread in threads:
            thread.join(30)
        assert Counter([*handled, *got[first], *got[second]]) == Counter(NUMBERS)
        assert got[second]


def test_what_moved_is_refused_and_comes_again(kafka_url: str, monkeypatch: pytest.MonkeyPatch):
    """A handler that outlasts the time that a rebalance waits for it."""
    monkeypatch.setattr("duly.brokers.kafka.intake.DRAINS_S", 0.2)
    with broker_at(kafka_url) as one, broker_at(kafka_url) as two:
        publish(one, *NUMBERS)
        first = one.subscribe([ORDERS], "sub", OPTIONS)
        held = awaited(first, 60, limit=60)
        second = two.subscribe([ORDERS], "sub", OPTIONS)
        eventually(lambda: owned(two), "the second has partitions")
        refused = set(first.settle([Done(each.receipt) for each in held]))
        moved = {each.message_id for each in held if each.receipt in refused}
        stayed = set(NUMBERS) - moved
        assert moved
        assert stayed, "partitions that stay are not touched"
        again = awaited(second, len(moved), limit=100)
        assert {each.message_id for each in again} == moved
        assert all(each.repeated and not each.alone for each in again), "nobody died"


@pytest.mark.long
def test_a_rebalance_waits_for_what_runs(kafka_url: str):
    with broker_at(kafka_url) as one, broker_at(kafka_url) as two:
        publish(one, *NUMBERS)
        first = one.subscribe([ORDERS], "sub", OPTIONS)
        held = awaited(first, 60, limit=60)
        joining = threading.Thread(target=lambda: two.subscribe([ORDERS], "sub", OPTIONS))
        joining.start()
        [intake] = one._intakes.values()
        eventually(
            lambda: any(share.leaving for share in list(intake.shares.values())),
            "it is to hand over",
        )
        assert list(first.settle([Done(each.receipt) for each in held])) == []
        joining.join(30)
        eventually(lambda: owned(two), "the second has partitions")
        [lane] = two._lanes.values()
        assert list(lane.claim(100, A_LOT, 0.0)) == []


@pytest.mark.parametrize(
    "protocol",
    [
        QUICK,
        pytest.param(QUICK + EAGER, marks=pytest.mark.long),
        pytest.param(NEW, marks=pytest.mark.long),
    ],
    ids=["cooperative", "eager", "kip-848"],
)
def test_positions_that_nobody_tells_for_long_are_waited_for(
    kafka_url: str, monkeypatch: pytest.MonkeyPatch, protocol: str
):
    """As of brokers whose leader has just died; even for longer than who starts waits, and than
    the group waits for who does not ask for more.
    """
    of = Beginnings.of
    silent, asked = threading.Event(), Counter[str]()

    def impatient(*args: Any) -> dict[str, Any]:
        return {**consuming(*args), "max.poll.interval.ms": POLLS_MS}

    def silent_for_long(self: Beginnings, consumer: Any, given: Any) -> Any:
        if silent.is_set():
            asked["in vain"] += 1
            raise KafkaException(KafkaError(KafkaError._TIMED_OUT))
        return of(self, consumer, given)

    monkeypatch.setattr("duly.brokers.kafka.intake._JOINS_S", 1.5 * POLLS_MS / 1000)
    monkeypatch.setattr("duly.brokers.kafka.intake.consuming", impatient)
    monkeypatch.setattr(Beginnings, "of", silent_for_long)
    with broker_at(kafka_url + protocol) as one, broker_at(kafka_url + protocol) as two:
        publish(one, *NUMBERS)
        first = one.subscribe([ORDERS], "sub", OPTIONS)
        held = awaited(first, 7, limit=7)
        assert list(first.settle([Done(each.receipt) for each in held])) == []
        silent.set()
        lanes: list[Any] = []

        def join() -> None:
            while not lanes:
                with suppress(BrokerUnavailable):
                    lanes.append(two.subscribe([ORDERS], "sub", OPTIONS))

        joining = threading.Thread(target=join)
        joining.start()
        eventually(lambda: asked["in vain"], "a rebalance asks in vain")
        threading.Event().wait(2 * POLLS_MS / 1000)
        silent.clear()
        joining.join(60)
        [second] = lanes
        handled = Counter(bodies(held))

        def all_is_handled() -> bool:
            for lane in (first, second):
                got = lane.claim(10, A_LOT, 0.1)
                # What one of them lost meanwhile is refused, and comes again.
                refused = set(lane.settle([Done(each.receipt) for each in got]))
                handled.update(bodies([each for each in got if each.receipt not in refused]))
            return handled.keys() == set(NUMBERS)

        eventually(all_is_handled, "all is handled", lambda: str(handled), 60.0)
        assert handled == Counter(NUMBERS)


def test_attempts_and_delays_outlive_the_process(kafka_url: str):
    """In order by key a retry waits in its place, and who takes over knows of it."""
    options = OPTIONS.__class__(OPTIONS.guarantee, order_by_key=True)
    with broker_at(kafka_url) as one:
        publish(one, "a")
        lane = one.subscribe([ORDERS], "sub", options)
        [held] = awaited(lane)
        assert list(lane.settle([Retry(held.receipt, 2.0, "no")])) == []
        one.abandon()
    with broker_at(kafka_url) as two:
        lane = two.subscribe([ORDERS], "sub", options)
        assert list(lane.claim(1, A_LOT, 0.0)) == []
        [again] = awaited(lane)
        assert (again.attempt, again.repeated) == (2, True)


def test_a_clock_that_was_set_back_makes_no_retry_wait_for_it(kafka_url: str):
    options = OPTIONS.__class__(OPTIONS.guarantee, order_by_key=True)
    with broker_at(kafka_url) as one:
        publish(one, "a")
        lane = one.subscribe([ORDERS], "sub", options)
        [held] = awaited(lane)
        assert list(lane.settle([Retry(held.receipt, 1.0, "no")])) == []
        one.abandon()
    with broker_at(kafka_url, wall_ms=lambda: now_ms() - 3_600_000) as two:
        lane = two.subscribe([ORDERS], "sub", options)
        [again] = awaited(lane)
        assert (again.attempt, again.repeated) == (2, True)


def test_hundreds_that_wait_in_their_place_are_settled_and_remembered(kafka_url: str):
    """More than it is claimed beside, for they were claimed together."""
    options = OPTIONS.__class__(OPTIONS.guarantee, order_by_key=True)
    numbers = [str(number) for number in range(2000)]
    with broker_at(kafka_url) as one:
        publish(one, *numbers)
        lane = one.subscribe([ORDERS], "sub", options)
        for _ in range(2):
            held = awaited(lane, 2000, limit=2000)
            assert list(lane.settle([Retry(each.receipt, 0.0, "no") for each in held])) == []
        one.abandon()
    with broker_at(kafka_url) as two:
        again = awaited(two.subscribe([ORDERS], "sub", options), 2000, limit=2000)
        assert {each.attempt for each in again} == {3}


@pytest.mark.long
def test_what_is_given_again_and_settled_is_deleted(
    kafka_url: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("duly.brokers.kafka.broker.WATCH_S", 0.1)
    with broker_at(kafka_url) as broker:
        lane = broker.subscribe([ORDERS], "sub", OPTIONS)
        publish(broker, "a", "b")
        for held in awaited(lane, 2):
            assert list(lane.settle([Retry(held.receipt, 0.1, "no")])) == []
        for attempt in (2, 3):
            again = awaited(lane, 2)
            assert {each.attempt for each in again} == {attempt}
            ends = [Retry(e.receipt, 0.1, "no") if attempt < 3 else Done(e.receipt) for e in again]
            assert list(lane.settle(ends)) == []
        name = (broker._names.again("sub"), 0)
        eventually(lambda: broker._admin.starts([name], "earliest")[name] == 4, "all are deleted")
        publish(broker, "c")
        assert bodies(awaited(lane)) == ["c"]


@pytest.mark.long
@pytest.mark.parametrize("protocol", ["", EAGER], ids=["cooperative", "eager"])
def test_who_cannot_begin_at_once_joins_again(
    kafka_url: str, protocol: str, monkeypatch: pytest.MonkeyPatch
):
    """The cluster does not answer while partitions are dealt out."""
    tries = []
    begin = Beginnings.of

    def failing_once(*given: Any) -> Any:
        tries.append(given)
        if len(tries) == 1:
            raise BrokerUnavailable("no answer")
        return begin(*given)

    monkeypatch.setattr(Beginnings, "of", failing_once)
    with broker_at(kafka_url + protocol) as broker:
        publish(broker, "a", "b", "c")
        lane = broker.subscribe([ORDERS], "sub", OPTIONS)
        assert sorted(work_off(lane, lambda seen: len(seen) == 3)) == ["a", "b", "c"]
    assert len(tries) > 1


@pytest.mark.parametrize(
    "protocol",
    ["", pytest.param(EAGER, marks=pytest.mark.long), pytest.param(NEW, marks=pytest.mark.long)],
    ids=["cooperative", "eager", "kip-848"],
)
def test_what_was_given_and_not_taken_is_given_again(
    kafka_url: str, protocol: str, monkeypatch: pytest.MonkeyPatch
):
    """Nobody else has it, and as long as this process stays a member nobody is given it."""
    tries = []
    at_last = Beginnings.at_last

    def taking_none_at_first(self: Beginnings, consumer: Any, given: Any, *rest: Any) -> Any:
        tries.append(given)
        return [] if len(tries) == 1 else at_last(self, consumer, given, *rest)

    monkeypatch.setattr(Beginnings, "at_last", taking_none_at_first)
    with broker_at(kafka_url + protocol) as broker:
        publish(broker, "a", "b", "c")
        lane = broker.subscribe([ORDERS], "sub", OPTIONS)
        assert sorted(work_off(lane, lambda seen: len(seen) == 3)) == ["a", "b", "c"]
        assert owned(broker) == {0, 1, 2, 3}
    assert len(tries) > 1


# --- other processes

WORKER = """
import sys
from duly.broker import SubscribeOptions
from duly.brokers.kafka import KafkaBroker
from duly.errors import CommitUnknown
from duly.guarantees import Done, Guarantee
from duly.message import Topic

orders = Topic("orders", str, guarantee="at-least-once", partitions=int(sys.argv[4]))
broker = KafkaBroker(sys.argv[1])
broker.declare([orders])
lane = broker.subscribe([orders], "sub", SubscribeOptions(Guarantee(sys.argv[2])))
held = []
while not held:
    held = lane.claim(int(sys.argv[3]), 1 << 30, 1.0)
print("claimed", *(each.message_id for each in held), flush=True)
sys.stdin.readline()
def settle():
    try:
        refused = lane.settle([Done(each.receipt) for each in held])
    except CommitUnknown:
        return settle()  # it was sent before it heard that its partitions are others', as lanes do
    return f"refused {len(refused)} of {len(held)}"
try:
    print(settle(), flush=True)
except Exception as error:
    print(type(error).__name__, error, flush=True)
sys.stdin.readline()
held = lane.claim(int(sys.argv[3]), 1 << 30, 0.0)
print("claimed", *(each.message_id for each in held), flush=True)
sys.stdin.readline()
"""


class Process:
    """A worker of another process, which claims and settles when told to."""

    def __init__(self, url: str, guarantee: str, limit: int, partitions: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER, url, guarantee, str(limit), str(partitions)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.claimed = self.says().split()[1:]

    def says(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def goes_on(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def end(self) -> None:
        self._process.kill()
        self._process.communicate(timeout=30)


@contextmanager
def process(
    url: str, guarantee: str = "at-least-once", limit: int = 100, partitions: int = 4
) -> Iterator[Process]:
    started = Process(url, guarantee, limit, partitions)
    try:
        yield started
    finally:
        started.end()


@pytest.mark.parametrize("guarantee", ["at-least-once", "at-most-once", "exactly-once"])
def test_a_zombie_is_refused_when_it_wakes(dealt_url: str, guarantee: str):
    """It is stopped with messages in hand, its group goes on without it, and then it settles."""
    options = OPTIONS.__class__(type(OPTIONS.guarantee)(guarantee))
    with broker_at(dealt_url) as broker:
        publish(broker, *NUMBERS[:8])
        with process(dealt_url, guarantee) as zombie:
            zombie.signal(signal.SIGSTOP)
            lane = broker.subscribe([ORDERS], "sub", options)
            done = work_off(lane, lambda seen: seen >= set(NUMBERS[:8]))
            zombie.signal(signal.SIGCONT)
            zombie.goes_on()
            told = zombie.says()
            count = len(zombie.claimed)
            assert told == f"refused {count} of {count}", told
        publish(broker, "new")
        assert work_off(lane, lambda seen: "new" in seen) == ["new"], "it moved nothing back"
        assert Counter(done) == Counter(NUMBERS[:8])


@pytest.mark.parametrize("guarantee", ["at-least-once", "exactly-once"])
def test_a_zombie_that_wakes_is_given_nothing_that_is_others(dealt_url: str, guarantee: str):
    """It has fetched messages, and has announced that it starts them, before it is stopped."""
    options = OPTIONS.__class__(type(OPTIONS.guarantee)(guarantee))
    one = Topic(ORDERS.name, str, guarantee="at-least-once", partitions=1)
    with broker_at(dealt_url, one) as broker:
        publish(broker, *NUMBERS)
        with process(dealt_url, guarantee, 4, partitions=1) as zombie:
            zombie.goes_on()
            assert zombie.says().startswith("refused 0 ")
            zombie.signal(signal.SIGSTOP)
            lane = broker.subscribe([one], "sub", options)
            rest = {*NUMBERS} - {*zombie.claimed}
            done = work_off(lane, lambda seen: seen >= rest)
            zombie.goes_on()  # it claims as soon as it wakes
            zombie.signal(signal.SIGCONT)
            assert zombie.says() == "claimed"
        assert Counter(done) == Counter(rest)


def test_a_killed_process_is_charged_with_what_was_alone(dealt_url: str):
    with broker_at(dealt_url) as broker:
        publish(broker, "poison")
        for _ in range(2):
            with process(dealt_url):
                pass
        lane = broker.subscribe([ORDERS], "sub", OPTIONS)
        [held] = awaited(lane)
        # The first death charged nobody, since it may have been any of the batch.
        assert (held.alone, held.attempt, held.repeated) == (True, 2, True)


def test_what_a_killed_process_had_settled_stays_settled(dealt_url: str):
    with broker_at(dealt_url) as broker:
        publish(broker, *NUMBERS)
        with process(dealt_url, limit=30) as worker:
            worker.goes_on()
            assert worker.says().startswith("refused 0 ")
            settled = set(worker.claimed)
        lane = broker.subscribe([ORDERS], "sub", OPTIONS)
        left = set(NUMBERS) - settled
        assert Counter(work_off(lane, lambda seen: seen >= left)) == Counter(left)

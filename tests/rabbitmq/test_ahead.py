"""How much of what waits a process has at hand: bounded in bytes, whatever came before."""

from __future__ import annotations

import threading
import time
from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from amqp import spec

from duly.brokers.rabbitmq import RabbitMQBroker, ready
from duly.brokers.rabbitmq.intake import Intake
from duly.brokers.rabbitmq.lane import Lane
from duly.guarantees import Done
from duly.message import Topic
from tests.rabbitmq.work import OPTIONS, ORDERS, bodies, broker_at, lane_of, message
from tests.waiting import eventually

MIB = 1024 * 1024
AT_HAND = 64 * MIB
# When the server is told to stop, it takes back what is on its way.
LARGE = {f"large-{n:06}" for n in range(150)}


def publish(broker: RabbitMQBroker, prefix: str, count: int, size: int) -> None:
    for first in range(0, count, 20):
        texts = [f"{prefix}-{n:06}" for n in range(first, min(count, first + 20))]
        broker.publish([message(text.ljust(size, "."), id=text) for text in texts])


def at_hand(lane: Lane) -> int:
    with lane.intake.changed:
        return sum(len(item.body) for item in lane.intake.ready)


def waiting(broker: RabbitMQBroker) -> int:
    [state] = broker.queued()
    return state.backlog


def work_off(
    lane: Lane, count: int, limit: int = 100, may_come_again: Container[str] = ()
) -> tuple[list[str], int]:
    """The ids of all, and the most that was at hand meanwhile."""
    seen: list[str] = []
    most = 0
    ended = threading.Event()

    def look() -> None:
        nonlocal most
        while not ended.wait(0.002):
            most = max(most, at_hand(lane))

    def all_come() -> bool:
        held = lane.claim(limit, AT_HAND, 0.2)
        seen.extend(each.message.id for each in held)
        again = {each.message.id for each in held if each.alone or each.repeated}
        assert all(id in may_come_again for id in again), "nobody died with it"
        assert list(lane.settle([Done(each.receipt) for each in held])) == []
        return len(seen) >= count

    looking = threading.Thread(target=look)
    looking.start()
    try:
        eventually(all_come, "all come", lambda: f"{len(seen)} came", 120.0)
    finally:
        ended.set()
        looking.join()
    return seen, most


def test_large_ones_behind_small_ones_are_not_all_taken_at_once(rabbit_url: str):
    """The process waits for so many small ones as two claims are."""
    with broker_at(rabbit_url) as broker:
        lane = lane_of(broker)
        publish(broker, "small", 400, 10)
        work_off(lane, 400)
        publish(broker, "large", 150, MIB)
        eventually(lambda: at_hand(lane) > 4 * MIB, "what comes is taken")
        left = waiting(broker)
        assert left > 50, "the rest stays where it is"
        # Nothing more comes by itself; and nothing of this is lost, or comes twice.
        assert at_hand(lane) <= AT_HAND, f"{at_hand(lane) / MIB:.0f} MiB, {left} left"
        assert broker.queued()[0].workers == 1, "it is at work all the same"
        seen, most = work_off(lane, 150, may_come_again=LARGE)
        assert sorted(seen) == [f"large-{n:06}" for n in range(150)]
        assert most <= AT_HAND, f"{most / MIB:.0f} MiB"


def test_one_that_claims_many_large_ones_is_given_them_in_parts(rabbit_url: str):
    """Neither the first time, when nobody knows how large they are, nor later."""
    with broker_at(rabbit_url) as broker:
        publish(broker, "large", 150, MIB)
        lane = lane_of(broker)
        seen, most = work_off(lane, 150, limit=500)
        assert seen == [f"large-{n:06}" for n in range(150)]
        assert most <= AT_HAND, f"{most / MIB:.0f} MiB"


def test_a_backlog_that_turns_large_is_taken_up_to_what_was_asked_for_already(rabbit_url: str):
    with broker_at(rabbit_url) as broker:
        publish(broker, "small", 400, 10)
        publish(broker, "large", 150, MIB)
        lane = lane_of(broker)
        seen, most = work_off(lane, 550, may_come_again=LARGE)
        assert len(seen) == len(set(seen)) == 550
        assert most <= AT_HAND + 100 * MIB, f"{most / MIB:.0f} MiB"


def test_what_one_topic_fills_the_others_do_not_go_on_to_fill(
    rabbit_url: str, monkeypatch: pytest.MonkeyPatch
):
    """The first is consumed, and brings more than there is room for, before the second is."""
    monkeypatch.setattr(ready, "BYTES_AHEAD", 5_000)
    monkeypatch.setattr(ready, "_UNSEEN_BYTES", 1)
    more: Topic[str] = Topic("parcels", str, guarantee="at-least-once")
    with broker_at(rabbit_url) as broker:
        broker.declare([more])
        lane = broker.subscribe([ORDERS, more], "both", OPTIONS)
        assert isinstance(lane, Lane)
        intake = lane.intake
        publish(broker, "first", 20, 1_000)
        texts = [f"second-{n}" for n in range(40)]
        broker.publish([more.message(each, source="tests", id=each) for each in texts])
        with filled_by_the_first(intake) as (consumed, cancelled):
            seen = {each.message.id for each in lane.claim(10, 5_000, 5.0)}
        assert len(consumed) == 2
        assert cancelled == consumed, "none of them goes on"

        def all_come() -> bool:
            held = lane.claim(10, 5_000, 0.2)
            seen.update(each.message.id for each in held)
            assert list(lane.settle([Done(each.receipt) for each in held])) == []
            return seen == {*texts, *(f"first-{n:06}" for n in range(20))}

        eventually(all_come, "all come", lambda: str(len(seen)))


@contextmanager
def filled_by_the_first(intake: Intake) -> Iterator[tuple[list[str], list[str]]]:
    """Let the second consumer of an intake begin when the first has brought too much; gets the
    tags of both, and of those that the server was told to end.
    """
    channel = intake._channel
    consume, send = channel.basic_consume, channel.send_method
    consumed, cancelled = list[str](), list[str]()

    def later(queue: str, **more: Any) -> str:
        until = time.monotonic() + 10.0
        while consumed and not intake.ready.is_full and time.monotonic() < until:
            channel.queue_declare(queue, passive=True)
        tag: str = consume(queue, **more)
        consumed.append(tag)
        return tag

    def seen(method: Any, *args: Any, **more: Any) -> Any:
        if method == spec.Basic.Cancel:
            cancelled.append(args[1][0])
        return send(method, *args, **more)

    channel.basic_consume, channel.send_method = later, seen
    try:
        yield consumed, cancelled
    finally:
        del channel.basic_consume, channel.send_method


def test_small_ones_are_as_many_as_two_claims_again(rabbit_url: str):
    """A few large ones do not make all that come later slow."""
    with broker_at(rabbit_url) as broker:
        lane = lane_of(broker)
        publish(broker, "large", 70, MIB)
        work_off(lane, 70)
        publish(broker, "small", 3000, 10)
        work_off(lane, 2000)
        eventually(lambda: len(lane.intake.ready) >= 100, "a whole claim is at hand")
        assert bodies(lane.claim(1, AT_HAND, 1.0))[0].startswith("small")


@pytest.mark.parametrize("body_bytes", [10, 20_000])
def test_what_is_on_its_way_to_a_lane_that_is_closed_is_nobodys_death(
    rabbit_url: str, body_bytes: int
):
    """The server takes back what it was about to deliver, and counts that."""
    with broker_at(rabbit_url) as broker:
        publish(broker, "one", 600, body_bytes)
        again: dict[str, bool] = {}
        for _ in range(6):
            lane = lane_of(broker)
            held = lane.claim(100, AT_HAND, 5.0)
            # Acknowledged, so that as many more are on their way.
            assert list(lane.settle([Done(each.receipt) for each in held])) == []
            again.update((each.message.id, each.alone or each.repeated) for each in held)
            lane.close()
        assert not any(again.values()), f"{sum(again.values())} of {len(again)}"
        assert waiting(broker) == 600 - len(again)

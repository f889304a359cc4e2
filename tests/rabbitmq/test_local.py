"""What befalls one channel or one queue is no matter of the others of its process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from duly.broker import SubscribeOptions, Subscription
from duly.brokers.rabbitmq import RabbitMQBroker
from duly.brokers.rabbitmq.topology import Names
from duly.errors import BrokerError
from duly.guarantees import Done, Guarantee
from duly.message import Topic
from tests.rabbitmq.work import A_LOT, OPTIONS, awaited, bodies
from tests.servers.rabbitmq import channel
from tests.waiting import eventually

PLAIN: Topic[str] = Topic("plain", str, guarantee="at-least-once")
LINES: Topic[str] = Topic("lines", str, guarantee="at-least-once", partitions=2, key=str)
IN_ORDER = SubscribeOptions(Guarantee.AT_LEAST_ONCE, order_by_key=True)
ONCE = SubscribeOptions(Guarantee.AT_MOST_ONCE)
UNKNOWN_TAG = 987_654_321


@pytest.fixture
def broker(rabbit_url: str) -> Iterator[RabbitMQBroker]:
    broker = RabbitMQBroker(rabbit_url)
    broker.declare([PLAIN, LINES])
    yield broker
    broker.close()


@pytest.fixture
def names(rabbit_url: str) -> Names:
    return Names(rabbit_url.partition("namespace=")[2])


def publish(broker: RabbitMQBroker, topic: Topic[str], *texts: str) -> None:
    broker.publish([topic.message(each, source="tests", id=each) for each in texts])


class Working:
    """Lanes of one process, and which channels each of them has."""

    def __init__(self, broker: RabbitMQBroker) -> None:
        self._broker = broker

    def lane(self, name: str, topic: Topic[str], options: SubscribeOptions) -> Subscription:
        return self._broker.subscribe([topic], name, options)

    def first(self, lane: Subscription) -> set[int]:
        """The channels by which it consumes: those that were none before it claimed."""
        before = self._consuming()
        lane.claim(10, A_LOT, 0.0)
        return self._consuming() - before

    def _consuming(self) -> set[int]:
        return set(
            self._broker.link.call(
                lambda connection: [
                    number
                    for number, each in connection.channels.items()
                    if any(getattr(each, "callbacks", {}).values())
                ]
            )
        )

    def end(self, number: int) -> None:
        """Let the server close a channel: it answers a precondition that failed."""
        self._broker.link.call(
            lambda connection: connection.channels[number].basic_ack(UNKNOWN_TAG)
        )


def settled(lane: Subscription, held: Any) -> list[Any]:
    """The refused."""
    return list(lane.settle([Done(each.receipt) for each in held]))


def test_a_channel_that_the_server_closes_is_opened_again_alone(broker: RabbitMQBroker):
    working = Working(broker)
    one, two, three = (working.lane(name, PLAIN, OPTIONS) for name in ("one", "two", "three"))
    [number] = working.first(one)
    for lane in (two, three):
        lane.claim(10, A_LOT, 0.0)
    publish(broker, PLAIN, "a", "b")
    held = {lane: awaited(lane, 2) for lane in (one, two, three)}
    working.end(number)
    eventually(
        lambda: len(one.extend([each.receipt for each in held[one]], 60.0)) == 2,
        "the claims of the one are lost",
    )
    assert settled(one, held[one]) == [each.receipt for each in held[one]]
    for lane in (two, three):
        assert list(lane.extend([each.receipt for each in held[lane]], 60.0)) == []
        assert settled(lane, held[lane]) == []
    # Taken back by the server: each comes again, alone.
    again: list[str] = []

    def come() -> bool:
        came = one.claim(10, A_LOT, 0.5)
        assert all(each.repeated for each in came)
        assert settled(one, came) == []
        again.extend(bodies(came))
        return len(again) >= 2

    eventually(come, "both come again")
    publish(broker, PLAIN, "c")
    for lane in (one, two, three):
        assert bodies(awaited(lane)) == ["c"], "nothing but what is new"
    assert sorted(again) == ["a", "b"]


def test_of_an_ordered_one_only_the_partition_of_the_channel_is_lost(broker: RabbitMQBroker):
    working = Working(broker)
    ordered = working.lane("ordered", LINES, IN_ORDER)
    numbers = working.first(ordered)
    keys = [f"k{n}" for n in range(8)]
    publish(broker, LINES, *keys)
    held = awaited(ordered, 8)
    assert {*bodies(held)} == {*keys}
    lost: set[str] = set()
    for number in sorted(numbers):
        if not lost:
            working.end(number)
            eventually(lambda: bool(_lost(ordered, held)), "the claims of a partition are lost")
            lost.update(each.id for each in _lost(ordered, held))
    assert 0 < len(lost) < 8
    refused = settled(ordered, held)
    assert {each.message.id for each in held if each.receipt in refused} == lost
    again: set[str] = set()

    def come() -> bool:
        came = ordered.claim(10, A_LOT, 0.5)
        assert settled(ordered, came) == []
        again.update(bodies(came))
        return again >= lost

    eventually(come, "they come again")
    assert again == lost
    publish(broker, LINES, "new")
    assert bodies(awaited(ordered)) == ["new"]


def _lost(lane: Subscription, held: Any) -> list[Any]:
    lost = lane.extend([each.receipt for each in held], 60.0)
    return [each.message for each in held if each.receipt in lost]


@pytest.mark.parametrize("options", [OPTIONS, ONCE], ids=["plain", "once"])
def test_a_queue_that_is_deleted_takes_no_claim_of_others_along(
    broker: RabbitMQBroker, names: Names, rabbit_url: str, options: SubscribeOptions
):
    working = Working(broker)
    other = working.lane("other", PLAIN, OPTIONS)
    lane = working.lane("one", PLAIN, options)
    lane.claim(10, A_LOT, 0.0)
    publish(broker, PLAIN, "a")
    held = awaited(other)
    assert bodies(awaited(lane)) == ["a"]
    with channel(rabbit_url) as operator:
        for queue in (names.queue("plain", "one"), names.present("plain", "one")):
            operator.queue_delete(queue)
    came: list[str] = []

    def works_again() -> bool:
        publish(broker, PLAIN, f"b-{len(came)}")
        try:
            came.extend(bodies(lane.claim(10, A_LOT, 0.1)))
        except BrokerError:
            return False  # the first to ask for it is told
        return bool(came)

    eventually(works_again, "the queue is there again")
    assert list(other.extend([each.receipt for each in held], 60.0)) == []
    assert settled(other, held) == []


def test_the_queue_of_a_partition_that_is_deleted_is_made_again_alone(
    broker: RabbitMQBroker, names: Names, rabbit_url: str
):
    working = Working(broker)
    ordered, other = working.lane("ordered", LINES, IN_ORDER), working.lane("o", PLAIN, OPTIONS)
    publish(broker, PLAIN, "a")
    held = awaited(other)
    publish(broker, LINES, *(f"k{n}" for n in range(8)))
    lines = awaited(ordered, 8)
    with channel(rabbit_url) as operator:
        operator.queue_delete(names.partition("lines", "ordered", 0))
        operator.queue_delete(names.present("lines", "ordered"))
    eventually(lambda: bool(_lost(ordered, lines)), "those of the partition are gone")
    assert len(_lost(ordered, lines)) < 8
    came: set[str] = set()

    def all_come() -> bool:
        publish(broker, LINES, *(f"n{n}" for n in range(8)))
        again = ordered.claim(100, A_LOT, 0.2)
        assert settled(ordered, again) == []
        came.update(bodies(again))
        return len(came) == 8

    eventually(all_come, "both partitions are worked", lambda: str(came))
    assert settled(other, held) == []

    def is_seen() -> bool:
        ordered.claim(100, A_LOT, 0.1)
        return broker.queued()[-1].workers == 1

    eventually(is_seen, "the others see it again")


@pytest.mark.parametrize(("topic", "options"), [(PLAIN, OPTIONS), (LINES, IN_ORDER)])
def test_who_cannot_be_seen_by_the_others_works_all_the_same(
    broker: RabbitMQBroker,
    names: Names,
    rabbit_url: str,
    topic: Topic[str],
    options: SubscribeOptions,
    caplog: pytest.LogCaptureFixture,
):
    here = names.present(topic.name, "one")
    with channel(rabbit_url) as stranger:
        stranger.queue_declare(here, exclusive=True, auto_delete=False)
        lane = broker.subscribe([topic], "one", options)
        publish(broker, topic, "a", "b")
        claimed = awaited(lane, 2)
        assert sorted(bodies(claimed)) == ["a", "b"]
        assert settled(lane, claimed) == []
        assert f"{here}: not seen as a worker for now" in caplog.text
        stranger.queue_delete(here)

    def is_seen() -> bool:
        lane.claim(10, A_LOT, 0.1)
        broker.look()
        return broker.queued()[-1].workers == 1

    eventually(is_seen, "it is seen later")


def test_while_one_claim_waits_for_a_server_that_is_silent_hangs_are_looked_for(
    broker: RabbitMQBroker,
):
    """By another thread than the one that asks whether consumers are seen."""
    looked = threading.Event()
    asks, goes_on = threading.Event(), threading.Event()

    def wait(_: object) -> None:
        asks.set()
        goes_on.wait(20)

    broker.look = lambda: broker.link.call(wait)  # type: ignore[method-assign]
    look = broker.link.look

    def looks() -> None:
        if asks.is_set():
            looked.set()
        look()

    broker.link.look = looks  # type: ignore[method-assign]
    try:
        assert asks.wait(20), "it asks every 10 s"
        assert looked.wait(10), "hangs are looked for meanwhile"
    finally:
        goes_on.set()

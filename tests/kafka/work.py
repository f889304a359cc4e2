"""A topic, a lane and what tests do with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

from confluent_kafka import Consumer, Producer, TopicPartition

from duly.broker import Delivery, Published, SubscribeOptions, Subscription
from duly.brokers.kafka import KafkaBroker
from duly.errors import BrokerError, CommitUnknown
from duly.guarantees import Done, Guarantee
from duly.message import Message, Topic
from tests.waiting import eventually

ORDERS: Topic[str] = Topic("orders", str, guarantee="at-least-once", partitions=4)
OPTIONS = SubscribeOptions(Guarantee.AT_LEAST_ONCE)
A_LOT = 1 << 30


@contextmanager
def broker_at(url: str, topic: Topic[Any] = ORDERS, **more: Any) -> Iterator[KafkaBroker]:
    """A broker that knows the topic; as if it were alone in its process."""
    broker = KafkaBroker(url, **more)
    try:
        broker.declare([topic])
        yield broker
    finally:
        broker.close()


def message(body: str, **more: Any) -> Message[Any]:
    return ORDERS.message(body, source="tests", **more)


def publish(broker: KafkaBroker, *bodies: str) -> None:
    """Each under its own id, and keyed by it."""
    outcomes = broker.publish([message(body, id=body, key=body) for body in bodies])
    assert [type(outcome) for outcome in outcomes] == [Published] * len(bodies)


def bodies(deliveries: Sequence[Delivery]) -> list[str]:
    return [delivery.message.body.decode() for delivery in deliveries]


def awaited(lane: Subscription, count: int = 1, limit: int = 10) -> list[Delivery]:
    """So many claimed messages, or more, as soon as they come."""
    got: list[Delivery] = []

    def come() -> bool:
        got.extend(lane.claim(limit, A_LOT, 1.0))
        return len(got) >= count

    eventually(come, f"{count} messages come")
    return got


def work_off(lane: Subscription, wanted: Callable[[set[str]], bool], limit: int = 50) -> list[str]:
    """Handle what comes, whatever fails meanwhile, until the set of what was is as wanted."""
    handled: list[str] = []

    def some() -> bool:
        try:
            deliveries = lane.claim(limit, A_LOT, 0.2)
            handled.extend(bodies(deliveries))
            lane.settle([Done(delivery.receipt) for delivery in deliveries])
        except (BrokerError, CommitUnknown):
            return False
        return wanted(set(handled))

    eventually(some, "everything was handled", lambda: f"handled {len(set(handled))}", 90.0)
    return handled


@contextmanager
def stranger(url: str, **settings: Any) -> Iterator[Any]:
    """A producer that knows nothing of duly."""
    producer = Producer({"bootstrap.servers": host_of(url), **settings})
    yield producer
    assert producer.flush(30) == 0


def settled(url: str, topic: str) -> None:
    """Wait until readers of what is committed are shown all that is there: Kafka answers the end of
    a transaction a moment before.
    """
    eventually(lambda: not open_in(url, topic), "nothing is open", timeout_s=60.0)


def open_in(url: str, topic: str) -> int:
    """In how many partitions there is more than readers of what is committed are shown."""
    shown, there = (ends_in(url, topic, level) for level in ("read_committed", "read_uncommitted"))
    return sum(one < other for one, other in zip(shown, there, strict=True))


def ends_in(url: str, topic: str, level: str) -> list[int]:
    """Where its partitions end, for a reader of this isolation level."""
    name = f"{namespace_of(url)}.{topic}"
    reader: Any = Consumer(
        {"bootstrap.servers": host_of(url), "group.id": "ends", "isolation.level": level}
    )
    with closing(reader):
        numbers = sorted(reader.list_topics(name, 30).topics[name].partitions)
        places = [TopicPartition(name, number) for number in numbers]
        return [reader.get_watermark_offsets(place, 30)[1] for place in places]


def host_of(url: str) -> str:
    return url.removeprefix("kafka://").partition("?")[0]


def namespace_of(url: str) -> str:
    return url.partition("namespace=")[2].partition("&")[0]

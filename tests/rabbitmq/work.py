"""A topic, a lane and what tests do with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from duly.broker import Delivery, Published, SubscribeOptions, Subscription
from duly.brokers.rabbitmq import RabbitMQBroker
from duly.brokers.rabbitmq.lane import Lane
from duly.errors import BrokerError, CommitUnknown
from duly.guarantees import Done, Guarantee
from duly.message import Message, Topic
from tests.waiting import eventually

ORDERS: Topic[str] = Topic("orders", str, guarantee="at-least-once")
OPTIONS = SubscribeOptions(Guarantee.AT_LEAST_ONCE)
A_LOT = 1 << 30


@contextmanager
def broker_at(url: str, **more: Any) -> Iterator[RabbitMQBroker]:
    """A broker that knows the topic, and its subscription ``sub``."""
    broker = RabbitMQBroker(url, **more)
    try:
        broker.declare([ORDERS])
        broker.prepare([ORDERS], "sub", OPTIONS)
        yield broker
    finally:
        broker.close()


def message(body: str, **more: Any) -> Message[Any]:
    return ORDERS.message(body, source="tests", **more)


def publish(broker: RabbitMQBroker, *bodies: str) -> None:
    outcomes = broker.publish([message(body, id=body) for body in bodies])
    assert [type(outcome) for outcome in outcomes] == [Published] * len(bodies)


def lane_of(broker: RabbitMQBroker) -> Lane:
    lane = broker.subscribe([ORDERS], "sub", OPTIONS)
    assert isinstance(lane, Lane)
    return lane


def bodies(deliveries: Sequence[Delivery]) -> list[str]:
    return [delivery.message.body.decode() for delivery in deliveries]


def awaited(lane: Subscription, count: int = 1) -> list[Delivery]:
    """So many claimed messages, or more, as soon as they come."""
    got: list[Delivery] = []

    def come() -> bool:
        got.extend(lane.claim(10, A_LOT, 1.0))
        return len(got) >= count

    eventually(come, f"{count} messages come")
    return got


def work_off(lane: Lane, wanted: Callable[[set[str]], bool], limit: int = 50) -> list[str]:
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

"""What the tests of the PostgreSQL broker share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import psycopg

from duly.broker import Delivery, SubscribeOptions
from duly.brokers.postgres import PostgresBroker
from duly.brokers.postgres.lane import Lane
from duly.guarantees import Done, Guarantee
from duly.message import Message, Topic
from duly.sql import arrivals, log
from duly.sql.postgres import OwnLine
from tests.servers.postgres import Schema

LEASE_S = 30.0


def topic(name: str = "t", guarantee: Any = "at-least-once", **more: Any) -> Topic[Any]:
    return Topic(name, str, guarantee=guarantee, **more)


class Place(Protocol):
    """Where a broker is opened: a `Schema`, or one by way of something."""

    @property
    def url(self) -> str:
        """The database."""
        ...

    @property
    def duly(self) -> str:
        """The schema for duly's own tables."""
        ...


@contextmanager
def opened(schema: Place, *topics: Topic[Any], **more: Any) -> Iterator[PostgresBroker]:
    broker = PostgresBroker(schema.url, schema=schema.duly, **more)
    try:
        broker.declare(topics)
        yield broker
    finally:
        broker.close()


def ahead_of(lane: Any, limit: int) -> Any:
    """A claim of this lane to be made ahead; not the time to look after the dead first."""
    lane._looked_s = lane._clock.monotonic_s()
    ahead = lane.ahead(limit, 1 << 30)
    assert ahead is not None
    return ahead


def message(of: Topic[Any], body: str, **more: Any) -> Message[Any]:
    return of.message(body, source="tests", **more)


def publish(broker: PostgresBroker, of: Topic[Any], *bodies: str, **more: Any) -> None:
    outcomes = broker.publish([message(of, body, **more) for body in bodies])
    assert {type(outcome).__name__ for outcome in outcomes} == {"Published"}, outcomes


def publish_in(
    connection: psycopg.Connection[Any], schema: Schema, of: Topic[Any], *bodies: str, **more: Any
) -> None:
    """Publish as part of the transaction that is open on this connection."""
    line = OwnLine(connection, schema.duly)
    catalog = line.run(log.find([of.name]))
    line.run(arrivals.publish(catalog, [message(of, body, **more) for body in bodies], 0))


def lane(broker: PostgresBroker, *topics: Topic[Any], name: str = "sub", **more: Any) -> Lane:
    options = {"guarantee": Guarantee.AT_LEAST_ONCE, "lease_s": LEASE_S, **more}
    return broker.subscribe(topics, name, SubscribeOptions(**options))


def claim(of: Lane, limit: int = 100, wait_s: float = 0.0) -> Sequence[Delivery]:
    return of.claim(limit, 1 << 30, wait_s)


def bodies(deliveries: Sequence[Delivery]) -> list[str]:
    return [delivery.message.body.decode() for delivery in deliveries]


def take(of: Lane, limit: int = 100, wait_s: float = 0.0) -> list[str]:
    """Claim once and settle."""
    deliveries = claim(of, limit, wait_s)
    assert list(of.settle([Done(delivery.receipt) for delivery in deliveries])) == []
    return bodies(deliveries)


def drain(of: Lane, limit: int = 100) -> list[str]:
    handled: list[str] = []
    while some := take(of, limit):
        handled += some
    return handled

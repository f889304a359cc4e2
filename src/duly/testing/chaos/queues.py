"""A namespace on a RabbitMQ node, as every process of a run uses it, and what is in its queues.

How many messages are in a queue, claimed ones among them, only the node's own control program
tells. Who has that writes the counts into the folder of a round (`COUNTS`); who looks takes them
from there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from duly.broker import Broker
from duly.brokers.rabbitmq.address import address_of
from duly.brokers.rabbitmq.link import Link
from duly.brokers.rabbitmq.wire import ATTEMPTS, DEAD_MS, ERROR, message_in
from duly.inspection import DeadLetter, SubscriptionState
from duly.message import Topic
from duly.testing.chaos.node import COUNTS

_DEAD = "/dead"
# What was given up on, and what is known of messages; both stay.
_NO_WORK = (_DEAD, "/notes")


@dataclass
class QueueSite:
    """A namespace, which ``url`` names as duly does. Messages wait there by the server's clock."""

    url: str
    errors: tuple[type[Exception], ...] = ()
    tells_time: bool = True

    def leaks(self) -> Sequence[str]:
        """See `Site`. What still waits is told by `looked_into`."""
        return []

    def drop(self) -> None:
        """See `Site`. The node drops it, which alone knows what is there."""

    def looked_into(self, broker: Broker, folder: Path) -> _Queues:
        """See `LooksInto`."""
        del broker  # it tells nothing of them
        counts: Mapping[str, int] = msgspec.json.decode((folder / COUNTS).read_bytes())
        return _Queues(self.url, counts)


@dataclass(frozen=True, slots=True)
class _Queues:
    """What is in the queues of a namespace, when they were counted."""

    url: str
    counts: Mapping[str, int]

    def subscriptions(self) -> Sequence[SubscriptionState]:
        """See `Looked`. What is on its way between queues is nobody's: without a name."""
        waiting: dict[tuple[str, str], int] = {}
        for queue, count in self.counts.items():
            if not queue.endswith(_NO_WORK):
                topic, consumer = _parts(queue)
                waiting[topic, consumer] = waiting.get((topic, consumer), 0) + count
        return [
            SubscriptionState(consumer, topic, count, 0, 0, 0)
            for (topic, consumer), count in waiting.items()
        ]

    def dead_letters(
        self, subscription: str | None = None, limit: int = 100
    ) -> Sequence[DeadLetter]:
        """See `Looked`. They are looked at and stay where they are."""
        link = Link(address_of(self.url, self.url), "looking", lambda _: None, lambda: None)
        link.start()
        try:
            found: list[DeadLetter] = []
            for queue, count in self.counts.items():
                topic, consumer = _parts(queue)
                if queue.endswith(_DEAD) and count and subscription in (None, consumer):
                    got = link.call(partial(_all_in, queue=queue))
                    found += [_letter(topic, consumer, each) for each in got]
            return found[:limit]
        finally:
            link.close()


def _parts(queue: str) -> tuple[str, str]:
    """The topic and the consumer that a queue is for; that of a delay is no consumer's."""
    _, topic, *more = queue.split("/")
    return ("/".join((topic, *more)), "") if topic.startswith("_") else (topic, more[0])


def _all_in(connection: Any, queue: str) -> list[Any]:
    channel = connection.channel()
    got = []
    while (message := channel.basic_get(queue)) is not None:
        got.append(message)
    channel.close()  # and with it back they go
    return got


def _letter(topic: str, consumer: str, given: Any) -> DeadLetter:
    body = given.body if isinstance(given.body, bytes) else str(given.body).encode()
    headers = given.properties.get("application_headers") or {}
    return DeadLetter(
        consumer,
        message_in(Topic(topic, bytes, guarantee="at-least-once"), body, given.properties),
        # Without one the server has given it up.
        str(headers.get(ERROR, "")),
        int(headers.get(ATTEMPTS, 0)),
        int(headers.get(DEAD_MS, 0)),
    )

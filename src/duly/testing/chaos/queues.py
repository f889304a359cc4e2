"""A namespace on a RabbitMQ node, as every process of a run uses it, and what is in its queues.

How many messages are in a queue, claimed ones among them, only the node's own control program
tells. Who has that writes the counts into the folder of a round (`COUNTS`); who looks takes them
from there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from duly.broker import Broker
from duly.inspection import SubscriptionState
from duly.testing.chaos.node import COUNTS

# What was given up on, and what is known of messages; both stay.
_NO_WORK = ("/dead", "/notes")


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
        del broker  # it tells nothing of what is claimed
        counts: Mapping[str, int] = msgspec.json.decode((folder / COUNTS).read_bytes())
        return _Queues(counts)


@dataclass(frozen=True, slots=True)
class _Queues:
    """What is in the queues of a namespace, when they were counted."""

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


def _parts(queue: str) -> tuple[str, str]:
    """The topic and the consumer that a queue is for; that of a delay is no consumer's."""
    _, topic, *more = queue.split("/")
    return ("/".join((topic, *more)), "") if topic.startswith("_") else (topic, more[0])

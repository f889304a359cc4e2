"""`Delays`: queues in which a message waits before it goes on.

One quorum queue for each length of time, since a queue with a time of each message's own gives up
only its first. A length is rounded up, by less than a quarter. The route is the message's routing
key, which names the queue that it goes on to; dead-lettering at least once confirms the way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from duly.brokers.rabbitmq.link import Connection, Link
from duly.brokers.rabbitmq.topology import KEPT_UNTIL_TAKEN, Names, declare_queue

_SHORTEST_MS = 64
_LONGEST_MS = 366 * 86_400_000
_DELIVERY_LIMIT = 1_000_000


def rounded_ms(delay_s: float) -> int:
    """The length of the queue for a delay: no shorter, and less than a quarter longer."""
    wanted = max(_SHORTEST_MS, math.ceil(delay_s * 1000))
    step = 1 << max(0, wanted.bit_length() - 3)
    return -(-wanted // step) * step


class Delays:
    """Where to publish what has to wait."""

    def __init__(self, names: Names) -> None:
        self._names = names
        self._made: set[str] = set()

    def exchange_for(self, delay_s: float, link: Link) -> str:
        """The exchange to publish to, with the name of the queue to go on to as routing key."""
        delay_ms = rounded_ms(delay_s)
        name = self._names.delay(delay_ms)
        if name not in self._made:
            link.call(lambda connection: _declare(connection, name, delay_ms))
            self._made.add(name)
        return name

    def queues(self) -> Iterator[str]:
        """Every queue that there may be, for delays of up to a year."""
        delay_ms = _SHORTEST_MS
        while delay_ms < _LONGEST_MS:
            yield self._names.delay(delay_ms)
            delay_ms = rounded_ms((delay_ms + 1) / 1000)

    def forget(self) -> None:
        """Declare again what is needed: it may have been deleted while nobody was connected."""
        self._made.clear()


def _declare(connection: Connection, name: str, delay_ms: int) -> None:
    arguments = {
        "x-message-ttl": delay_ms,
        "x-dead-letter-exchange": "",
        "x-delivery-limit": _DELIVERY_LIMIT,
        **KEPT_UNTIL_TAKEN,
    }
    declare_queue(connection, name, arguments)
    channel = connection.channel()
    channel.exchange_declare(name, "fanout", durable=True, auto_delete=False)
    channel.queue_bind(name, name)
    channel.close()

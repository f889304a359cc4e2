"""`Delays`: where messages wait on the server before they go on.

There is a level for each power of two milliseconds from 64 on: an exchange, and a quorum queue from
which messages go on after so long. A message names by headers the levels whose lengths add up to
its delay; a level's exchange has its queue for those that name it, and hands all others, and the
queue when their time is over, to the level below. So a message enters at the top, is written once
for each level that it names, and comes out at the exchange from which it goes to where its header
`TO` says, with the routing key that it had.

All messages of a queue wait equally long, so none is behind one that waits longer. Dead-lettering
at least once confirms the way: a server that dies in the middle may double a message, not lose it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from duly.brokers.rabbitmq.link import Connection, Link
from duly.brokers.rabbitmq.topology import (
    DROP,
    IF_UNHEARD,
    KEEP,
    KEPT_UNTIL_TAKEN,
    LONGEST_MS,
    TO,
    Names,
    declare_exchange,
    declare_queue,
)

SHORTEST_MS = 64
_DELIVERY_LIMIT = 1_000_000
_EVERY_LEVEL = [
    SHORTEST_MS << n for n in range(LONGEST_MS.bit_length() - SHORTEST_MS.bit_length() + 1)
]


def levels_for(delay_s: float, *, exactly: bool) -> Sequence[int]:
    """The levels, in milliseconds, that add up to a delay: no less, and less than 64 ms more.

    Not ``exactly``: up to a quarter more, and at most three levels, each of which is a write.
    """
    units = max(1, math.ceil(delay_s * 1000 / SHORTEST_MS))
    if not exactly:
        step = 1 << max(0, units.bit_length() - 3)
        units = -(-units // step) * step
    return [SHORTEST_MS << n for n in range(units.bit_length()) if units >> n & 1]


def way(levels: Iterable[int], target: str, *, keep: bool = True) -> Mapping[str, Any]:
    """The headers of a message that waits at these levels and goes on to ``target``, an exchange or
    a queue. Where nobody is there by then it is kept, or dropped.
    """
    waits = {f"duly-wait-{level}": True for level in levels}
    return {**waits, TO: target, IF_UNHEARD: KEEP if keep else DROP}


class Delays:
    """The levels of one namespace, made when they are first needed."""

    def __init__(self, names: Names) -> None:
        self.names = names
        self._has_exchanges = False
        self._made: set[int] = set()

    @property
    def entry(self) -> str:
        """The exchange to publish to what has to wait."""
        return self.names.delay(LONGEST_MS)

    def levels_for(self, delay_s: float, *, exactly: bool = False) -> Sequence[int]:
        """As the function."""
        return levels_for(delay_s, exactly=exactly)

    def make(self, levels: Iterable[int], link: Link) -> None:
        """Make what of these is missing. Raises `BrokerError`."""
        if not self._has_exchanges:
            link.call(self._declare_exchanges)
            self._has_exchanges = True
        for level in set(levels) - self._made:
            link.call(partial(self.declare, level=level))
            self._made.add(level)

    def _declare_exchanges(self, connection: Connection) -> None:
        below = self.names.onward
        for level in _EVERY_LEVEL:
            declare_exchange(connection, self.names.delay(level), "headers", below)
            below = self.names.delay(level)

    def declare(self, connection: Connection, level: int) -> None:
        """Make the queue of a level."""
        name = self.names.delay(level)
        below = self.names.delay(level // 2) if level > SHORTEST_MS else self.names.onward
        arguments = {
            "x-message-ttl": level,
            "x-dead-letter-exchange": below,
            "x-delivery-limit": _DELIVERY_LIMIT,
            **KEPT_UNTIL_TAKEN,
        }
        declare_queue(connection, name, arguments)
        bind_level(connection, name, name, level)

    def queues(self) -> Iterator[str]:
        """Every queue that there may be."""
        return map(self.names.delay, _EVERY_LEVEL)

    def ask_again(self) -> None:
        """Declare again each queue that is needed: what names a level that has none goes on at
        once, and its publisher is told nothing.
        """
        self._made.clear()

    def forget(self) -> None:
        """Declare again what is needed: it may have been deleted while nobody was connected."""
        self._has_exchanges = False
        self._made.clear()


def bind_level(connection: Connection, queue: str, exchange: str, level: int) -> None:
    """Let a queue have the messages that name a level."""
    channel = connection.channel()
    channel.queue_bind(queue, exchange, arguments={f"duly-wait-{level}": True})
    channel.close()

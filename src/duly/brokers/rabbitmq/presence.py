"""`Presence`: who works a subscription, as others can see it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from duly.brokers.rabbitmq.link import Connection
from duly.brokers.rabbitmq.topology import Names, declare_queue
from duly.message import Topic


class Presence:
    """Lets others see that this process works a subscription. Consumers of its queue say nothing:
    a process has several, or fetches and has none. So it consumes another, to which nobody
    publishes, as long as somebody here `enter`s. All of it is called on the link's thread.
    """

    def __init__(self, names: Names, topics: Sequence[Topic[Any]], subscription: str) -> None:
        self._queues = [names.here(topic.name, subscription) for topic in topics]
        self._those: set[object] = set()
        self._channel: Any = None

    def enter(self, connection: Connection, who: object) -> None:
        """This one works it, by this connection."""
        self._those.add(who)
        if self._channel is None or self._channel.connection is not connection:
            channel = connection.channel()
            channel.on_lost = gone = partial(self._gone, connection, channel)
            for queue in self._queues:
                declare_queue(connection, queue, {})
                channel.basic_consume(queue, on_cancel=gone)
            self._channel = channel

    def _gone(self, connection: Connection, channel: Any, _: object) -> None:
        """The others do not see this process any more; the next claim lets them."""
        if channel is self._channel:
            self._channel = None
            connection.later(lambda _: channel.close())

    def leave(self, who: object) -> None:
        """This one does not any more."""
        self._those.discard(who)
        channel = self._channel
        if not self._those and channel is not None:
            self._channel = None
            if channel.connection is not None:
                channel.close()

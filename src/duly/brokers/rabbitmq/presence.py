"""`Presence`: who works a subscription, as others can see it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

from duly.brokers.rabbitmq.link import Connection
from duly.brokers.rabbitmq.rest import Rest
from duly.brokers.rabbitmq.topology import Names
from duly.brokers.rabbitmq.transport import ChannelLost
from duly.message import Topic

log = logging.getLogger("duly.rabbitmq")


class Presence:
    """Lets others see that this process works a subscription. Consumers of its queue say nothing:
    a process has several, or fetches and has none. So it consumes another, to which nobody
    publishes, as long as somebody here `enter`s. All of it is called on the link's thread.
    """

    def __init__(self, names: Names, topics: Sequence[Topic[Any]], subscription: str) -> None:
        self._queues = [names.present(topic.name, subscription) for topic in topics]
        self._those: set[object] = set()
        self._channel: Any = None
        self._rest = Rest()

    @property
    def is_seen(self) -> bool:
        """Whether the others see this process."""
        return self._channel is not None and self._channel.connection is not None

    @property
    def is_to_enter(self) -> bool:
        """Whether the others do not, and it is time to try."""
        return not self.is_seen and self._rest.is_over

    def enter(self, connection: Connection, who: object) -> None:
        """This one works it, by this connection. Whatever is wrong with being seen, it works."""
        self._those.add(who)
        there = self._channel is not None and self._channel.connection is connection
        if there or not self._rest.is_over:
            return
        channel = connection.channel()
        channel.on_lost = gone = partial(self._gone, connection, channel)
        self._channel = channel
        try:
            for queue in self._queues:
                # No quorum queue: a server that is killed soon may forget that it is there. And a
                # transient one: when its node goes down it is gone, and made anew on another; a
                # durable one could not even be declared until then.
                channel.queue_declare(
                    queue,
                    durable=False,
                    auto_delete=True,
                    arguments={"x-queue-type": "classic"},
                )
                channel.basic_consume(queue, on_cancel=gone)
        except ChannelLost:
            return
        self._rest.end()

    def _gone(self, connection: Connection, channel: Any, why: object) -> None:
        """The others do not see this process any more; the next claim lets them."""
        if channel is self._channel:
            log.warning("%s: not seen as a worker for now: %s", self._queues[0], why)
            self._channel = None
            self._rest.begin()
            connection.later(lambda _: channel.close())

    def leave(self, who: object) -> None:
        """This one does not any more."""
        self._those.discard(who)
        channel = self._channel
        if not self._those and channel is not None:
            self._channel = None
            if channel.connection is not None:
                channel.close()

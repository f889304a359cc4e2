"""`Intake`: what the server has delivered to this process for one subscription, on one channel.

The lanes of a subscription share it: they compete for what has come, and what one gives back the
next takes, without a turn to the server. All of it is locked by ``changed``; what talks to the
server does so without holding that.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import msgspec

from duly.brokers.rabbitmq.link import Connection, explained, stem
from duly.brokers.rabbitmq.presence import Presence
from duly.brokers.rabbitmq.ready import MOST_AHEAD, Ready
from duly.brokers.rabbitmq.rest import Rest
from duly.brokers.rabbitmq.tags import Tags, acknowledge
from duly.brokers.rabbitmq.topology import Names, count, declare_subscription
from duly.brokers.rabbitmq.transport import ChannelLost
from duly.brokers.rabbitmq.wire import (
    History,
    body_of,
    deliveries_in,
    history_in,
    message_in,
    replays_in,
)
from duly.errors import BrokerUnavailable, InvalidMessage
from duly.message import Message, Topic

log = logging.getLogger("duly.rabbitmq")


class Receipt(msgspec.Struct, frozen=True, gc=False):
    """The receipt of a claim: ``token`` is given out once, ``generation`` counts the channels on
    which the subscription was consumed in this process. A tag means nothing on another channel.
    """

    intake: int
    generation: int
    token: int


class Item:
    """A delivered message that is not settled. ``tag`` is the channel's name for it; ``came_s``:
    when, in real time.
    """

    __slots__ = (
        *("alone", "body", "came_s", "history", "message", "properties", "replays", "tag"),
        *("taken_back", "topic"),
    )

    def __init__(
        self, topic: Topic[Any], tag: int, body: bytes, properties: Any, *, alone: bool
    ) -> None:
        self.topic = topic
        self.came_s = time.monotonic()
        self.tag = tag
        self.body = body
        self.properties = properties
        self.alone = alone
        self.message: Message[Any] | None = None
        # What the server counts is somebody's death with the message in hand.
        self.taken_back = deliveries_in(properties)
        self.history = history_in(properties)
        self.replays = replays_in(properties)
        if alone:
            charged = self.history.charged + self.taken_back
            self.history = History(charged, repeated=True)

    @property
    def uncounted(self) -> History:
        """Of one that nobody has started; what was taken back from somebody who died stays marked
        as repeated.
        """
        return History(self.history.charged, self.history.repeated or self.taken_back > 0)

    def read(self) -> Message[Any]:
        """The message. Raises `InvalidMessage` where it is none that duly would carry."""
        if self.message is None:
            self.message = message_in(self.topic, self.body, self.properties)
        return self.message


class Held:
    """An item that a lane has claimed, until its lease ends. Not while it is being ``settled``:
    that may wait for the server.
    """

    __slots__ = ("item", "lane", "settled", "until")

    def __init__(self, item: Item, lane: int, until: float) -> None:
        self.item = item
        self.lane = lane
        self.until = until
        self.settled = False


# Nobody tells that there is something to fetch, so who waits for it asks this often.
FETCH_S = 0.05

numbers = itertools.count(1)
"""What receipts name an intake by."""


class Intake:
    """One subscription of some topics, as this process consumes it.

    ``looks_alone`` says that there may be suspects in the queues of those; ``suspects`` are here
    and nobody's yet.
    """

    def __init__(self, names: Names, topics: Sequence[Topic[Any]], subscription: str) -> None:
        self.number = next(numbers)
        self.topics = topics
        self.subscription = subscription
        self.changed = threading.Condition()
        self.generation = 0
        self.ready = Ready()
        self.held: dict[int, Held] = {}
        self.suspects: deque[Item] = deque()
        self.looks_alone = True
        self.looked_s = -math.inf
        self._names = names
        self._presence = Presence(names, topics, subscription)
        self._channel: Any = None
        self._consumers: list[str] = []
        self._prefetch = 0
        self._wanted = 0
        self._tags = Tags()
        # Of those so many were delivered to a consumer of before, or rather more.
        self._uncounted = 0
        self._rest = Rest()
        # When all queues were found empty; and with which of them to begin the next time.
        self._empty_s = -math.inf
        self._turn = 0

    @property
    def queues(self) -> Sequence[str]:
        """The queues that are consumed."""
        return [self._names.queue(topic.name, self.subscription) for topic in self.topics]

    # --- on the link's thread

    def open(self, connection: Connection) -> None:
        """Consume on a new channel; nothing that was delivered before counts any more. A channel
        that is still there ends, or the server would go on giving it what nobody takes.
        """
        self.close(connection)
        if not self._rest.is_over:
            raise BrokerUnavailable(
                f"subscription {self.subscription!r}: its queue did not answer, and is asked again "
                "later"
            )
        for topic in self.topics:
            declare_subscription(connection, self._names, topic.name, self.subscription)
        channel = connection.channel()
        channel.on_lost = partial(self._lost_alone, self.generation)
        self._channel = channel
        if self._wanted:
            self._consume(connection, self._wanted)

    def _lost_alone(self, generation: int, lost: ChannelLost) -> None:
        """The server closed the channel, or does not answer; the next claim opens another."""
        if lost.silent:
            self._rest.begin()
        if generation == self.generation:
            log.warning("subscription %r: %s", self.subscription, explained(lost))
            self.lost()

    def lost(self) -> None:
        """The channel is gone, and the server gives to others what it had delivered there."""
        with self.changed:
            self._channel = None
            self._prefetch = 0
            self._consumers.clear()
            self.generation += 1
            self.ready.clear()
            self.held.clear()
            self.suspects.clear()
            self._tags.clear()
            self._uncounted = 0
            self.looks_alone = True
            self.changed.notify_all()

    def _consume(self, connection: Connection, prefetch: int) -> None:
        """Have so many ahead. More are had by another consumer: the server takes back what is on
        its way to one that is cancelled, and counts that as if somebody had died with it.
        """
        channel = self._channel
        if prefetch < self._prefetch:
            self._end_consumers(channel)
            with self.changed:
                self._prefetch, self._uncounted = 0, len(self._tags)
        more, self._prefetch = prefetch - self._prefetch, prefetch
        channel.basic_qos(0, more, False)
        for topic, queue in zip(self.topics, self.queues, strict=True):
            tag = channel.basic_consume(
                queue,
                callback=lambda message, topic=topic: self._deliver(topic, message),
                on_cancel=partial(self._cancelled, connection, self.generation),
            )
            self._consumers.append(tag)
        if self.ready.is_full:
            # By what the first of them brought: the others are not to go on either.
            stem(channel, self._consumers)
            self._consumers.clear()
        self._rest.end()
        self._presence.enter(connection, self)

    def _end_consumers(self, channel: Any) -> None:
        """What comes of them all the same is not rejected, as the driver would do."""
        while self._consumers:
            tag = self._consumers.pop()
            callback = channel.callbacks[tag]
            channel.basic_cancel(tag)
            channel.callbacks[tag] = callback

    @property
    def _credit(self) -> int:
        """How many may be on their way, or rather more. Each topic has a consumer of its own."""
        most = len(self.topics) * self._prefetch
        return max(0, most - max(0, len(self._tags) - self._uncounted))

    def _deliver(self, topic: Topic[Any], message: Any) -> None:
        item = Item(topic, message.delivery_tag, body_of(message), message.properties, alone=False)
        with self.changed:
            self._tags.add(item.tag)
            is_full = self.ready.come(item, self._credit)
            if len(self.ready) == 1:
                self.changed.notify_all()
            if is_full:
                # Nothing more is to come, but what is on its way. The server is told at once,
                # before further acknowledgements, which would call for as many messages more.
                self._prefetch, self._uncounted = 0, len(self._tags)
        if is_full:
            stem(self._channel, self._consumers)
            self._consumers.clear()

    def _cancelled(self, connection: Connection, generation: int, _tag: str) -> None:
        """The server ended the consumer: its queue was deleted, or its leader is gone."""
        log.warning(
            "subscription %r: the server cancelled its consumer; subscribing again",
            self.subscription,
        )
        connection.later(partial(self._open_again, generation))

    def _open_again(self, generation: int, connection: Connection) -> None:
        if generation == self.generation:
            self.open(connection)

    def fit(self, connection: Connection) -> None:
        """Consume with as many messages ahead as are wanted now."""
        if self._channel is None:
            self.open(connection)
        elif self._prefetch != self._wanted and not self.ready.is_full:
            self._consume(connection, self._wanted)

    def get_one(self, connection: Connection) -> None:
        """Have the next message of any topic ready, if there is one, and none is."""
        if self._channel is None:
            self.open(connection)
        channel: Any = self._channel
        self._presence.enter(connection, self)
        if self.ready:
            return
        self._turn = (self._turn + 1) % len(self.topics)
        queues = list(zip(self.topics, self.queues, strict=True))
        for topic, queue in queues[self._turn :] + queues[: self._turn]:
            message = channel.basic_get(queue)
            if message is not None:
                self._deliver(topic, message)
                with self.changed:
                    self._uncounted = len(self._tags)
                return
        self._rest.end()
        self._empty_s = time.monotonic()

    def get_alone(self, _: Connection) -> None:
        """Have the next suspect among ``suspects``, if there is one: there it is found also where
        who asked has given up waiting.
        """
        if self._channel is None:
            return  # lost since; the claim goes on, and opens another
        for topic in self.topics:
            message = self._channel.basic_get(self._names.alone(topic.name, self.subscription))
            if message is not None:
                item = Item(
                    topic, message.delivery_tag, body_of(message), message.properties, alone=True
                )
                with self.changed:
                    self._tags.add(item.tag)
                    self.suspects.append(item)
                return

    def waiting(self, connection: Connection) -> int:
        """How many messages the server could deliver. On the channel that consumes, so that what
        it has delivered before is here when this is.
        """
        if self._channel is None:
            self.open(connection)
        return sum(map(self._waiting_in, self.queues))

    def is_to_be_given(self, connection: Connection) -> bool:
        """Whether the server may deliver something, and has it."""
        return bool(self._credit and self.waiting(connection))

    def _waiting_in(self, queue: str) -> int:
        return int(self._channel.queue_declare(queue, passive=True).message_count)

    def is_consumed(self, connection: Connection) -> bool:
        """Whether the server sees a consumer of every queue, and the queues at all."""
        if not self._prefetch:
            return True
        self._presence.enter(connection, self)
        told = count(connection, self.queues)
        return len(told) == len(self.topics) and all(consumers for _, consumers in told.values())

    def mend(self, connection: Connection) -> None:
        """Consume again, where the server sees nobody who does."""
        self.open(connection)

    def acknowledge(self, generation: int, tags: Iterable[int]) -> bool:
        """Tell the server what is settled; False: the channel is gone, and with it the claims."""
        with self.changed:
            if generation != self.generation or self._channel is None:
                return False
            told = self._tags.settle(list(tags))
            self._uncounted = min(self._uncounted, len(self._tags))
        acknowledge(self._channel, *told)
        return True

    def close(self, _: Connection) -> None:
        """End the consumers, and the channel: what is not settled goes back to the queue."""
        channel = self._channel
        self.lost()
        if channel is not None:
            channel.close()

    def stop(self, _: Connection) -> None:
        """End the consumers: nothing more is delivered."""
        self._presence.leave(self)
        if self._channel is not None:
            self._end_consumers(self._channel)

    # --- for lanes

    def wants(self, limit: int, max_bytes: int, lanes: int) -> bool:
        """Reckon how many messages to have ahead; whether that calls for `fit`.

        A lane that takes one at a time gets no other beforehand: it may keep that for an hour.
        """
        if not self.ready.has_room(max_bytes):
            return False
        ahead = lanes if limit == 1 else 2 * limit * lanes
        held = len(self.held)
        ready = min(MOST_AHEAD, max(ahead - held, limit))
        if (more := self.ready.more(ready)) is not None:
            return self._wants_few(self._of_each(more, 1))
        wanted = self._of_each(held + ready, limit * lanes)
        if wanted > self._prefetch or self._is_far_below(wanted):
            self._wanted = wanted
            return True
        return False

    def _of_each(self, wanted: int, least: int) -> int:
        """Of each topic so many, for together as many as are wanted; and at least so many, for
        others may have nothing.
        """
        return min(wanted, max(least, math.ceil(wanted / len(self.topics))))

    def fetches(self, limit: int) -> bool:
        """Whether messages are fetched when a lane wants one: consumers, of which each topic needs
        its own, would have one of each beforehand.
        """
        return limit == 1 and len(self.topics) > 1 and not self._prefetch

    @property
    def is_to_fetch(self) -> bool:
        """Whether there may be something to fetch, as far as is known."""
        return not self.ready and time.monotonic() >= self._empty_s + FETCH_S

    def _is_far_below(self, wanted: int) -> bool:
        """And nothing is on its way, so that consumers may be cancelled."""
        return 4 * wanted < self._prefetch and not self._credit

    def _wants_few(self, more: int) -> bool:
        """As `wants`, of such large ones that bytes are the limit. What is here does not count for
        a consumer that is made anew.
        """
        is_starved = not self.ready and len(self.held) >= self._prefetch
        if is_starved or self._is_far_below(more):
            self._wanted = more + self._prefetch * is_starved
            return True
        return False

    def take(self, limit: int, max_bytes: int) -> tuple[list[Item], list[tuple[Item, str | None]]]:
        """Up to ``limit`` items for a lane, and what was on the way to them and is not for it:
        suspects, and, with the reason, what cannot be read. Call it with ``changed`` held.
        """
        taken: list[Item] = []
        aside: list[tuple[Item, str | None]] = []
        size = 0
        while self.ready and len(taken) < limit:
            item = self.ready.first
            size += len(item.body)
            if taken and size > max_bytes:
                break
            self.ready.pop()
            if item.taken_back:
                aside.append((item, None))
            elif (wrong := unreadable(item)) is not None:
                aside.append((item, wrong))
            else:
                taken.append(item)
        return taken, aside

    def give_back(self, items: Sequence[Item]) -> None:
        """Before all others, in the order delivered. Call it with ``changed`` held."""
        for item in sorted(items, key=lambda each: each.tag, reverse=True):
            self.ready.give_back(item)
        self.changed.notify_all()


def unreadable(item: Item) -> str | None:
    """Why a message is none that duly would carry; None: it is one."""
    try:
        item.read()
    except InvalidMessage as error:
        return f"{type(error).__name__}: {error}"
    return None

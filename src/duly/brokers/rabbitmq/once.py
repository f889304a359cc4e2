"""`OnceLane`: claims of an at-most-once subscription, which take messages off the server for good.

AMQP confirms no acknowledgement, so a message that waits for one can come again, whatever its
handler did. Here none is waited for: a message leaves the queue as it is fetched, and the queue is
transient and classic, which a restarted server does not bring back with what was taken from it.
Fetched is what a claim asks for and no more, since a consumer that acknowledges nothing would be
sent everything: what a crash can lose is what its lanes had claimed.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import msgspec

from duly.broker import Delivery
from duly.brokers.rabbitmq.intake import Item
from duly.brokers.rabbitmq.lane import Move
from duly.brokers.rabbitmq.link import Connection, Link, explained
from duly.brokers.rabbitmq.presence import Presence
from duly.brokers.rabbitmq.topology import Names, declare_subscription
from duly.brokers.rabbitmq.transport import ChannelLost, fetch
from duly.brokers.rabbitmq.wire import History, body_of
from duly.errors import BrokerError, BrokerUnavailable, ConfigurationError, InvalidMessage
from duly.guarantees import Dead, Release, Retry, Settlement
from duly.message import Topic

log = logging.getLogger("duly.rabbitmq")

# Nobody tells that a message has come: an idle lane asks, first soon and then this often.
_LOOK_S = (0.005, 0.05)
# Of messages of which nobody knows how large they are.
_AT_FIRST = 16

_tokens = itertools.count(1)


class Taken(msgspec.Struct, frozen=True, gc=False):
    """The receipt of a claim; ``token`` is given out once in a process."""

    token: int


class Surroundings(Protocol):
    """What a lane needs of its broker."""

    link: Link

    def move(self, moves: Sequence[Move]) -> None:
        """Publish these elsewhere; returns when the server has them. Raises `BrokerError`."""
        ...


class OnceLane:
    """One lane's view of an at-most-once subscription; see `duly.broker.Subscription`.

    ``closed`` is called with the lane when it is closed.
    """

    def __init__(
        self,
        broker: Surroundings,
        names: Names,
        topics: Sequence[Topic[Any]],
        subscription: str,
        presence: Presence,
        closed: Callable[[OnceLane], None],
    ) -> None:
        self.subscription = subscription
        self._broker = broker
        self._names = names
        self._topics = deque(topics)
        self._presence = presence
        self._on_closed = closed
        self._channel: Any = None
        self._changed = threading.Condition()
        self._closed = False
        self._ready: deque[Item] = deque()
        self._held: dict[int, Item] = {}

    # --- on the link's thread

    def open(self, connection: Connection) -> None:
        """Fetch on a new channel. What was fetched before is still this lane's."""
        self._channel = None
        for topic in self._topics:
            declare_subscription(connection, self._names, topic.name, self.subscription, once=True)
        self._channel = connection.channel()
        self._channel.on_lost = self._lost_alone
        self._presence.enter(connection, self)

    def _lost_alone(self, lost: ChannelLost) -> None:
        """The server closed the channel, or does not answer; the next claim opens another."""
        log.warning("subscription %r: %s", self.subscription, explained(lost))
        self._channel = None

    def lost(self) -> None:
        """The channel is gone."""
        self._channel = None

    def _fetch(self, connection: Connection, limit: int, max_bytes: int) -> None:
        """Take up to so many off the queues, beginning with another topic each time."""
        if self._closed:
            return
        if self._channel is None:
            self.open(connection)
        self._presence.enter(connection, self)
        self._topics.rotate(-1)
        for topic in self._topics:
            queue = self._names.queue(topic.name, self.subscription)
            there = True
            while there and (few := self._left(limit, max_bytes)):
                before = len(self._ready)
                # As each comes: what came before the connection is lost was taken.
                fetch(self._channel, queue, few, self._keeper(topic))
                there = len(self._ready) == before + few

    def _left(self, limit: int, max_bytes: int) -> int:
        """How many more to ask for at once, by the size of those that came; what is asked for is
        taken, and lost with this process.
        """
        count, size = len(self._ready), sum(len(item.body) for item in self._ready)
        few = _AT_FIRST if not count else int((max_bytes - size) * count / max(1, size))
        return max(0, min(limit - count, few))

    def _keeper(self, topic: Topic[Any]) -> Callable[[Any], None]:
        def keep(message: Any) -> None:
            self._ready.append(Item(topic, 0, body_of(message), message.properties, alone=False))

        return keep

    # --- claiming

    def claim(self, limit: int, max_bytes: int, wait_s: float) -> Sequence[Delivery]:
        """As `Subscription.claim`. Nothing brings back what it returns."""
        deadline = time.monotonic() + wait_s
        pause_s = _LOOK_S[0]
        while not self._closed:
            if deliveries := self._hand_out(limit, max_bytes):
                return deliveries
            if not self._ready:
                self._broker.link.call(lambda connection: self._fetch(connection, limit, max_bytes))
            if self._ready:
                continue
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                break
            with self._changed:
                self._changed.wait(min(left_s, pause_s))
            pause_s = min(2 * pause_s, _LOOK_S[1])
        return ()

    def _hand_out(self, limit: int, max_bytes: int) -> Sequence[Delivery]:
        deliveries: list[Delivery] = []
        unreadable: list[Move] = []
        size = 0
        with self._changed:
            while self._ready and len(deliveries) < limit:
                item = self._ready[0]
                size += len(item.body)
                if deliveries and size > max_bytes:
                    break
                self._ready.popleft()
                try:
                    deliveries.append(self._delivery(item))
                except InvalidMessage as error:
                    wrong = f"{type(error).__name__}: {error}"
                    unreadable.append(Move(self, item, item.history, error=wrong))
        if unreadable:
            self._set_aside(unreadable)
        return deliveries

    def _delivery(self, item: Item) -> Delivery:
        message, token = item.read(), next(_tokens)
        self._held[token] = item
        return Delivery(message, Taken(token), item.history.charged + 1, item.history.repeated)

    def _set_aside(self, moves: Sequence[Move]) -> None:
        """Dead letters, though their handler cannot run; what was claimed beside them can."""
        try:
            self._broker.move(moves)
        except BrokerError as error:
            self._tell_lost(len(moves), error)

    # --- settling

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[Any]:
        """As `Subscription.settle`. What is done was settled by its claim."""
        with self._changed:
            accepted = [s for s in settlements if self._holds(s.receipt)]
            refused = [s.receipt for s in settlements if not self._holds(s.receipt)]
            items = {s.receipt: self._held.pop(s.receipt.token) for s in accepted}
        moves = [move for s in accepted if (move := self._move(s, items[s.receipt])) is not None]
        try:
            if moves:
                self._broker.move(moves)
        except BaseException as error:
            with self._changed:
                self._held.update((receipt.token, item) for receipt, item in items.items())
            if isinstance(error, BrokerError | ConfigurationError):
                raise BrokerUnavailable(f"nothing was settled: {error}") from error
            raise
        with self._changed:
            back = [items[s.receipt] for s in accepted if isinstance(s, Release)]
            self._ready.extendleft(reversed(back))
            self._changed.notify_all()
        return refused

    def _holds(self, receipt: Any) -> bool:
        return isinstance(receipt, Taken) and receipt.token in self._held

    def _move(self, settlement: Settlement, item: Item) -> Move | None:
        charged = History(item.history.charged + 1, repeated=True)
        match settlement:
            case Retry(delay_s=delay_s, charged=was_started):
                history = charged if was_started else item.history
                return Move(self, item, history, delay_s=delay_s)
            case Dead(error=error):
                return Move(self, item, charged, error=error)
            case _:
                return None

    def extend(self, receipts: Iterable[Any], lease_s: float) -> Sequence[Any]:  # noqa: ARG002
        """As `Subscription.extend`. No lease ends: nobody else can be given these messages."""
        with self._changed:
            return [receipt for receipt in receipts if not self._holds(receipt)]

    def close(self) -> None:
        """As `Subscription.close`; what was not settled has not started, and is published again."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        self._on_closed(self)
        try:
            if self._broker.link.is_up:
                self._broker.link.call(self._end)  # after what is being fetched
        except BrokerError as error:
            log.debug("subscription %r: the connection ends it: %s", self.subscription, error)
        finally:
            self._give_back()

    def _give_back(self) -> None:
        with self._changed:
            items = [*self._held.values(), *self._ready]
            self._held.clear()
            self._ready.clear()
        moves = [Move(self, item, item.history) for item in items]
        try:
            if moves and not self._broker.link.is_up:
                raise BrokerUnavailable("there is no connection")
            if moves:
                self._broker.move(moves)
        except BrokerError as error:
            self._tell_lost(len(moves), error)

    def _end(self, _: Connection) -> None:
        self._presence.leave(self)
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def _tell_lost(self, count: int, error: BrokerError) -> None:
        log.warning(
            "subscription %r (at-most-once): %d messages were taken, not handled, and may be lost: "
            "%s",
            self.subscription, count, error,
        )  # fmt: skip

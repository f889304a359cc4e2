"""`Burial`: what a consumer or the server gave up on, brought to where dead letters are kept.

The server dead-letters by itself what comes back too often. It can move that to a queue and
nowhere else, so that queue is a place on the way: workers carry on what lies there now and then,
and whoever looks for dead letters does so first.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from duly.brokers.rabbitmq.lane import Move
from duly.brokers.rabbitmq.letters import letter_in, letter_of, replayed, unknown
from duly.brokers.rabbitmq.link import NOT_FOUND, Connection, Link, content
from duly.brokers.rabbitmq.publisher import Sending
from duly.brokers.rabbitmq.stream import LetterStream
from duly.brokers.rabbitmq.topology import Names, check_absent
from duly.brokers.rabbitmq.wire import body_of, moved, named
from duly.errors import BrokerError, CommitUnknown, ConfigurationError
from duly.inspection import DeadLetter
from duly.inspection.graves import Graveyard
from duly.message import Topic, partition_of

log = logging.getLogger("duly.rabbitmq")

EVERY_S = 10.0
# What is carried at once.
_MESSAGES, _BYTES = 200, 4 * 1024 * 1024
_UNWRITABLE = (
    "it cannot be published again, as a retry and a suspect are: its headers leave no room in a "
    "frame for what is added to them"
)


class Burial:
    """Where the dead letters of one broker go. ``topics`` are those declared so far; ``send`` as
    for `LetterStream`.
    """

    def __init__(
        self,
        link: Link,
        names: Names,
        topics: Mapping[str, Topic[Any]],
        send: Callable[[Sequence[Sending]], None],
    ) -> None:
        self.graveyard: Graveyard = LetterStream(link, names, send)
        self._link = link
        self._names = names
        self._topics = topics
        self._send = send

    def start(
        self, closed: threading.Event, worked: Callable[[], Iterable[tuple[str, str]]]
    ) -> None:
        """From now on carry now and then, until all is closed. On a thread of its own: a store may
        be slow.
        """

        def carry() -> None:
            while not closed.wait(EVERY_S):
                try:
                    if self._link.is_up:
                        self.carry(sorted(worked()))
                except BrokerError as error:
                    log.warning("what the server gave up on stays where it is: %s", error)
                except Exception:
                    log.exception("what the server gave up on stays where it is")

        threading.Thread(target=carry, name="duly-rabbitmq-burial", daemon=True).start()

    def prepare(self) -> None:
        """Make what is needed before anything is given up on. Raises `ConfigurationError`."""
        if isinstance(self.graveyard, LetterStream):
            self.graveyard.declare()

    def bury(self, letters: Sequence[DeadLetter]) -> None:
        """Keep these, durably on return. Raises `BrokerError`: then they are to come again."""
        if not letters:
            return
        try:
            self.graveyard.bury(letters)
        except (CommitUnknown, ConfigurationError) as error:
            raise BrokerError(f"dead letters may not be kept: {error}") from error

    def bury_those(self, moves: Iterable[Move]) -> Sequence[Move]:
        """Bury those that were given up on; returns the others."""
        moves = list(moves)
        self.bury([_letter(move, move.error) for move in moves if move.error is not None])
        return [move for move in moves if move.error is None]

    def bury_unwritable(self, moves: Iterable[Move]) -> None:
        """Bury those that cannot be published again."""
        self.bury([_letter(move, _UNWRITABLE) for move in moves])

    def carry(self, subscriptions: Iterable[tuple[str, str]]) -> int:
        """Bring on what the server gave up on for these (topic, subscription); how many. Raises
        the first `BrokerError` when all were tried: a queue that does not answer keeps no other.
        """
        total, failed = 0, list[BrokerError]()
        for topic, subscription in subscriptions:
            try:
                total += self._carry(topic, subscription)
            except BrokerError as error:
                failed.append(error)
        if failed:
            raise failed[0]
        return total

    def _carry(self, topic: str, subscription: str) -> int:
        hearse = _Hearse(self._names.dead(topic, subscription))
        total = 0
        try:
            while found := self._link.call(hearse.load):
                of = self._topics.get(topic) or unknown(topic)
                self.bury([letter_in(of, subscription, body_of(m), m.properties) for m in found])
                self._link.call(hearse.unload)
                total += len(found)
        finally:
            self._link.post(hearse.close)
        return total

    def redeliver(
        self, letters: Sequence[DeadLetter], partitions: Mapping[tuple[str, str], int]
    ) -> None:
        """Into the queues of their subscriptions, as new but for how often they were replayed.
        ``partitions``: see `duly.brokers.rabbitmq.health.Known`.
        """
        self._send(
            [
                Sending(content(letter.message.body, replayed(letter)), "", self._queue(letter, n))
                for letter in letters
                for n in (partitions.get((letter.message.topic, letter.subscription), 0),)
            ]
        )

    def _queue(self, letter: DeadLetter, partitions: int) -> str:
        message, of = letter.message, (letter.message.topic, letter.subscription)
        if not partitions:
            return self._names.queue(*of)
        return self._names.partition(*of, partition_of(message, partitions))


def _letter(move: Move, error: str) -> DeadLetter:
    item = move.item
    # One that had no identity keeps what it was given.
    properties = moved(item.properties, move.history, named(item.properties, item.message))
    return letter_of(
        item.topic, move.intake.subscription, item.body, properties, error, move.history.charged
    )


class _Hearse:
    """Takes some from a queue, and only what was unloaded does not go back."""

    def __init__(self, queue: str) -> None:
        self._queue = queue
        self._channel: Any = None
        self._last: int | None = None

    def load(self, connection: Connection) -> Sequence[Any]:
        """The next of the queue."""
        if self._channel is None:
            self._channel = connection.channel()
        self._check(connection)
        found: list[Any] = []
        size = 0
        while len(found) < _MESSAGES and size < _BYTES:
            try:
                message = self._channel.basic_get(self._queue)
            except NOT_FOUND as error:
                check_absent(error, self._queue)
                break  # nobody has worked this subscription yet
            if message is None:
                break
            found.append(message)
            size += len(message.body)
            self._last = message.delivery_tag
        return found

    def unload(self, connection: Connection) -> None:
        """They are kept elsewhere now."""
        self._check(connection)
        if self._last is not None:
            self._channel.basic_ack(self._last, multiple=True)
            self._last = None

    def close(self, connection: Connection) -> None:
        """What is still here goes back."""
        if self._channel is not None and self._channel.connection is connection:
            self._channel.close()

    def _check(self, connection: Connection) -> None:
        if self._channel.connection is not connection:
            raise BrokerError("the connection was lost while dead letters were carried")

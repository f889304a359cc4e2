"""`SQLiteBroker`: publishing, declaring and looking inside; `Lane` claims and settles."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack
from typing import Any

from duly.broker import Capabilities, Outcome, SubscribeOptions
from duly.brokers.sqlite.clock import Clock, StepWatch
from duly.brokers.sqlite.lane import Lane
from duly.brokers.sqlite.sweeper import Sweeper
from duly.errors import (
    BrokerError,
    CommitUnknown,
    ConfigurationError,
    MessageTooLarge,
    PublishFailed,
    PublishUnknown,
)
from duly.guarantees import Guarantee
from duly.inspection import DeadLetter, Holder, Incident, Selection, SubscriptionState
from duly.message import Message, Topic
from duly.sql import log, looking, mending
from duly.sql.sqlite import DatabaseFile, is_alive
from duly.sql.steps import Steps, statements

# SQLite's own limit on a row is 1,000,000,000 bytes; half of it leaves room for the rest.
MAX_MESSAGE_BYTES = 512 * 1024 * 1024

SCHEMA = statements("sqlite")["log_schema"]


class SQLiteBroker:
    """A broker in one SQLite file. Safe to use from any thread; not across fork().

    Raises on opening what `DatabaseFile.open` raises.
    """

    def __init__(self, path: str | os.PathLike[str], *, clock: Clock | None = None) -> None:
        self._clock = clock or Clock()
        self._file = DatabaseFile.open(path)
        self._file.ensure([SCHEMA])
        self._topics: dict[str, log.TopicRecord] = {}
        self._lanes: set[Lane] = set()
        self._lane_numbers = itertools.count(1)
        self._sweeper = Sweeper(self._file, self._clock)
        self._steps = StepWatch(self._clock)
        self._closed = False
        self._capabilities = Capabilities(
            name="SQLite",
            database=self._file.identity,
            one_writer=True,
            max_message_bytes=MAX_MESSAGE_BYTES,
        )

    @property
    def capabilities(self) -> Capabilities:
        """What this broker provides."""
        return self._capabilities

    @property
    def file(self) -> DatabaseFile:
        """The database file, shared with a store on it."""
        return self._file

    def declare(self, topics: Iterable[Topic[Any]]) -> None:
        """Make the topics known; see `Broker.declare`."""
        wanted = list(topics)
        self._topics |= self._file.write(lambda: log.declare(wanted))

    def publish(self, messages: Sequence[Message[Any]]) -> Sequence[Outcome]:
        """Store messages in one commit, together with those of other callers."""
        if not messages:
            return []
        largest = max([len(message.body) for message in messages])
        if largest > MAX_MESSAGE_BYTES:
            return self._publish_the_fitting(messages)
        try:
            self._find({message.topic for message in messages})
            return self._file.write_items(messages, self._publish_steps)
        except BrokerError as error:
            return [_failed(message, error) for message in messages]
        except CommitUnknown as error:
            return [_unknown(message, error) for message in messages]

    def _publish_steps(self, messages: Sequence[Message[Any]]) -> Steps[list[Outcome]]:
        return log.publish(self._topics, messages, self._clock.wall_ms())

    def _find(self, names: AbstractSet[str]) -> None:
        """Look up topics that another process declared: a relay knows only their names."""
        if unknown := names - self._topics.keys():
            self._topics |= self._file.read(lambda: log.find(unknown))

    def _publish_the_fitting(self, messages: Sequence[Message[Any]]) -> Sequence[Outcome]:
        fitting = [m for m in messages if len(m.body) <= MAX_MESSAGE_BYTES]
        stored = iter(self.publish(fitting))
        return [
            next(stored) if len(m.body) <= MAX_MESSAGE_BYTES else _too_large(m) for m in messages
        ]

    def subscribe(
        self, topics: Sequence[Topic[Any]], subscription: str, options: SubscribeOptions
    ) -> Lane:
        """One lane of the named subscription of these declared topics."""
        missing = [topic.name for topic in topics if topic.name not in self._topics]
        if missing:
            raise ConfigurationError(
                f"subscription {subscription!r}: topics {', '.join(missing)} are not declared "
                "at this broker; call declare first"
            )
        numbers = self._file.write(
            lambda: log.subscribe(self._topics, topics, subscription, options)
        )
        lane_no = next(self._lane_numbers)
        lane = Lane(
            self._file,
            self._clock,
            self._sweeper,
            self._steps,
            [
                log.Lane(
                    number,
                    self._file.worker.id,
                    lane_no,
                    self._clock.boot_id(),
                    options.order_by_key,
                    options.hold_key_on_dead,
                    options.bodies_only,
                    options.guarantee is Guarantee.AT_MOST_ONCE,
                    options.identities,
                )
                for number in numbers
            ],
            {s: topic.name for topic in topics for s in self._topics[topic.name].streams},
            options.lease_s,
            self._lanes.discard,
        )
        self._lanes.add(lane)
        return lane

    def record_drops(self, topic: str, count: int) -> None:
        """Make visible that ``count`` at-most-once publishes were never stored."""
        now_ms = self._clock.wall_ms()
        self._file.write(lambda: log.record_drops(topic, count, now_ms))

    def close(self) -> None:
        """Close every lane, giving back what it holds, and the file."""
        if self._closed:
            return
        self._closed = True
        with ExitStack() as closing:  # a lane that cannot give back does not keep the others open
            closing.callback(self._file.close)
            for lane in list(self._lanes):
                closing.callback(lane.close)

    # --- looking inside: `duly.inspection.Inspection`

    def subscriptions(self) -> Sequence[SubscriptionState]:
        """One state for each topic of each subscription, by name."""
        return self._file.read(looking.subscriptions)

    def dead_letters(
        self, subscription: str | None = None, limit: int = 100
    ) -> Sequence[DeadLetter]:
        """The latest dead letters, newest first."""
        return self.select(Selection(subscription), limit)

    def incidents(
        self, subscription: str | None = None, kind: str | None = None, limit: int = 100
    ) -> Sequence[Incident]:
        """The latest incidents, newest first."""
        return self._file.read(lambda: looking.incidents(subscription, kind, limit))

    def incident_counts(self) -> Mapping[tuple[str, str], int]:
        """How many messages met which kind of incident."""
        return self._file.read(looking.incident_counts)

    # --- what is being worked on: `duly.inspection.Observing`

    def holders(self) -> Sequence[Holder]:
        """Who has claimed messages; a dead process is known by the lock it has lost."""
        return [
            Holder(worker, is_alive(self._file.folder, worker), subscription, topic, count)
            for worker, subscription, topic, count in self._file.read(looking.holders)
        ]

    def oldest(self) -> Mapping[tuple[str, str], int]:
        """When the oldest message was made that (subscription, topic) has before it."""
        return self._file.read(looking.oldest)

    # --- mending: `duly.inspection.Mending`

    def select(self, which: Selection, limit: int) -> Sequence[DeadLetter]:
        """The dead letters that are meant, the highest number first."""
        return self._file.read(lambda: looking.dead_letters(which, limit))

    def replay(self, letters: Sequence[DeadLetter]) -> Sequence[DeadLetter]:
        """Deliver dead letters again, in one transaction; returns those that are gone."""
        return self._mend(letters, mending.replay)

    def discard(self, letters: Sequence[DeadLetter]) -> Sequence[DeadLetter]:
        """Remove dead letters for good, in one transaction; returns those that are gone."""
        return self._mend(letters, mending.discard)

    def _mend(
        self,
        letters: Sequence[DeadLetter],
        mend: Callable[[Sequence[int], int], Steps[list[int]]],
    ) -> Sequence[DeadLetter]:
        numbers = [letter.number for letter in letters]
        now_ms = self._clock.wall_ms()
        gone = set(self._file.write(lambda: mend(numbers, now_ms)))
        return [letter for letter in letters if letter.number in gone]


def _failed(message: Message[Any], error: BrokerError) -> PublishFailed:
    return PublishFailed(
        f"topic {message.topic!r}, message {message.id!r}: certainly not stored: {error}",
        message_id=message.id,
    )


def _unknown(message: Message[Any], error: CommitUnknown) -> PublishUnknown:
    return PublishUnknown(
        f"topic {message.topic!r}, message {message.id!r}: nobody can say whether it is "
        f"stored: {error} Publish it again under the same id.",
        message_id=message.id,
    )


def _too_large(message: Message[Any]) -> MessageTooLarge:
    return MessageTooLarge(
        f"topic {message.topic!r}, message {message.id!r}: the body has {len(message.body):,} "
        f"bytes, the SQLite broker carries {MAX_MESSAGE_BYTES:,}. Nothing was sent. Publish a "
        "reference to the data instead.",
        message_id=message.id,
    )

"""`SQLiteBroker`: publishing, declaring and looking inside; `Lane` claims and settles."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack
from typing import Any

from duly.broker import Capabilities, Outcome, SubscribeOptions
from duly.brokers.sqlite.clock import Clock, StepWatch
from duly.brokers.sqlite.ground import FileGround
from duly.brokers.sqlite.lane import Lane
from duly.brokers.sqlite.sweeper import Sweeper
from duly.inspection import Holder
from duly.inspection.erasing import Whose
from duly.inspection.health import Finding
from duly.message import Message, Topic, topics_of
from duly.sql import log, looking, outcomes
from duly.sql.operated import OperatedLog
from duly.sql.solitude import Solitude
from duly.sql.sqlite import DatabaseFile, is_alive
from duly.sql.sqlite.health import examine
from duly.sql.sqlite.liveness import living
from duly.sql.steps import Steps

# SQLite's own limit on a row is 1,000,000,000 bytes; half of it leaves room for the rest.
MAX_MESSAGE_BYTES = 512 * 1024 * 1024


class SQLiteBroker(OperatedLog):
    """A broker in one SQLite file. Safe to use from any thread; not across fork().

    Each ``namespace`` of a file is a broker of its own. Raises on opening what
    `DatabaseFile.open` raises.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, namespace: str = "", clock: Clock | None = None
    ) -> None:
        self._clock = clock or Clock()
        self._file = DatabaseFile.open(path, namespace=namespace)
        super().__init__(FileGround(self._file, self._clock))
        self._topics: dict[str, log.TopicRecord] = {}
        self._lanes: set[Lane] = set()
        self._lane_numbers = itertools.count(1)
        self._sweeper = Sweeper(self._file, self._clock)
        self._steps = StepWatch(self._clock)
        self._solitude = Solitude(self._clock.monotonic_s)
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
        return outcomes.fitting(messages, MAX_MESSAGE_BYTES, "SQLite", self._publish)

    def _publish(self, messages: Sequence[Message[Any]]) -> Sequence[Outcome]:
        def publish() -> Sequence[Outcome]:
            self._find(topics_of(messages))
            return self._file.write_items(messages, self._publish_steps)

        return outcomes.told(messages, publish)

    def _publish_steps(self, messages: Sequence[Message[Any]]) -> Steps[list[Outcome]]:
        return log.publish(self._topics, messages, self._clock.wall_ms())

    def _find(self, names: AbstractSet[str]) -> None:
        """Look up topics that another process declared: a relay knows only their names."""
        if unknown := names - self._topics.keys():
            self._topics |= self._file.read(lambda: log.find(unknown))

    @property
    def keeps_waiting_s(self) -> float:
        """For how many seconds a message that wants its worker for itself may have to wait."""
        return self._solitude.stays_s

    def subscribe(
        self, topics: Sequence[Topic[Any]], subscription: str, options: SubscribeOptions
    ) -> Lane:
        """One lane of the named subscription of these declared topics."""
        log.require_declared(self._topics, topics, subscription)
        numbers = self._file.write(
            lambda: log.subscribe(self._topics, topics, subscription, options)
        )
        lane = Lane(
            self._file,
            self._clock,
            self._sweeper,
            self._steps,
            self._solitude,
            log.lanes_of(
                numbers,
                topics,
                self._file.worker.id,
                next(self._lane_numbers),
                self._clock.boot_id(),
                options,
            ),
            log.topics_by_stream(self._topics, topics),
            options,
            self._lanes.discard,
        )
        self._lanes.add(lane)
        return lane

    def close(self) -> None:
        """Close every lane, giving back what it holds, and the file."""
        if self._closed:
            return
        self._closed = True
        with ExitStack() as closing:  # a lane that cannot give back does not keep the others open
            closing.callback(self._file.close)
            for lane in list(self._lanes):
                closing.callback(lane.close)

    # --- what is being worked on: `duly.inspection.Observing`

    def holders(self) -> Sequence[Holder]:
        """Who has claimed messages; a dead process is known by the lock it has lost."""
        return [
            Holder(worker, is_alive(self._file.folder, worker), subscription, topic, count)
            for worker, subscription, topic, count in self._file.read(looking.holders)
        ]

    # --- what goes through: `duly.inspection.counting.Counting`

    def workers(self) -> Sequence[str]:
        """The worker processes that are alive."""
        return living(self._file.folder)

    def examine(self) -> Sequence[Finding]:
        """What endangers the file, and what its clock says; see `duly.inspection.health`."""
        return [*examine(self._file), *self._file.read(self._steps.findings)]

    def erase(self, whose: Whose) -> Iterator[int]:
        """Remove a person's messages, some at a time, and what the log of writes holds of them."""
        yield from super().erase(whose)
        self._file.empty_log()

"""`PostgresBroker`: publishing, declaring and looking inside; `Lane` claims and settles."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack
from typing import Any
from zlib import crc32

from duly.broker import Capabilities, Outcome, SubscribeOptions
from duly.brokers.postgres.bell import Bell
from duly.brokers.postgres.clock import SERVER, Clock, ServerClock, StepWatch
from duly.brokers.postgres.gathering import Gathering
from duly.brokers.postgres.ground import SchemaGround
from duly.brokers.postgres.joint import JointLog
from duly.brokers.postgres.lane import Lane, Shared
from duly.brokers.postgres.listener import Listener, living, present
from duly.brokers.postgres.sweeper import Sweeper
from duly.brokers.postgres.ticker import Ticker
from duly.inspection import Holder
from duly.inspection.health import Finding
from duly.message import Message, Topic, topics_of
from duly.sql import arrivals, locks, log, looking, outcomes, ticks
from duly.sql.operated import OperatedLog
from duly.sql.postgres import Database
from duly.sql.postgres.health import examine
from duly.sql.solitude import Solitude
from duly.sql.steps import Steps

# A row and a statement have a gigabyte at most, and the server holds a statement several times.
MAX_MESSAGE_BYTES = 256 * 1024 * 1024


class PostgresBroker(OperatedLog):
    """A broker in one schema of a PostgreSQL database. Safe to use from any thread; not across
    fork().

    ``database`` is a URL, a ``psycopg_pool.ConnectionPool`` or a function that returns a new
    connection. Raises on opening what `duly.sql.postgres.Database` raises, and `BrokerUnusable`
    where the log was restored from another cluster.
    """

    def __init__(self, database: Any, *, schema: str = "duly", clock: Clock | None = None) -> None:
        self._database = Database(database, schema=schema)
        with ExitStack() as opening:
            opening.callback(self._database.close)
            self._database.ensure("broker", "postgres")
            self._ticker = Ticker(self._database)
            self._ticker.check()
            self._compare_clocks = _nothing
            if clock is None:
                server = ServerClock(self._database)
                clock, self._compare_clocks = server.clock(), server.look
            self._clock = clock
            opening.pop_all()
        channel = f"duly_{crc32(self._database.identity.encode()):08x}"
        self._bell = Bell(self._database, channel, self._ticker.chores)
        super().__init__(
            SchemaGround(self._database, self._clock.wall_ms, self._ticker.tick, self._told)
        )
        self._sweeper = Sweeper(self._database, self._clock)
        self._steps = StepWatch(self._database, self._clock)
        self._solitude = Solitude(self._clock.monotonic_s)
        self._channel = channel
        self._shared: Shared | None = None
        self._starting = threading.Lock()
        self._topics: dict[str, log.TopicRecord] = {}
        self._joint = JointLog(self._topics, self._clock.wall_ms, self._told)
        self._gathering = Gathering(self._publish_at_once, arrivals.MOST_MESSAGES)
        self._lanes: set[Lane] = set()
        self._lane_numbers = itertools.count(1)
        self._closed = False
        self._capabilities = Capabilities(
            name="PostgreSQL",
            database=self._database.identity,
            max_message_bytes=MAX_MESSAGE_BYTES,
        )

    @staticmethod
    def adopt(database: Any, *, schema: str = "duly") -> None:
        """Go on with a log that was restored here from another cluster, or is to be made sure of.

        Nothing else may work the old one any more. Raises what opening a broker raises.
        """
        opened = Database(database, schema=schema)
        try:
            opened.ensure("broker", "postgres")
            opened.write(ticks.adopt)
        finally:
            opened.close()

    @property
    def capabilities(self) -> Capabilities:
        """What this broker provides."""
        return self._capabilities

    @property
    def database(self) -> Database:
        """The database, shared with a store on it."""
        return self._database

    @property
    def log(self) -> JointLog:
        """The log, for the transactions of a store in this schema."""
        return self._joint

    def declare(self, topics: Iterable[Topic[Any]]) -> None:
        """Make the topics known; see `Broker.declare`."""
        wanted = list(topics)
        self._topics.update(self._database.write(lambda: locks.declare(wanted)))

    def publish(self, messages: Sequence[Message[Any]]) -> Sequence[Outcome]:
        """Store messages in one commit."""
        if not messages:
            return []
        return outcomes.fitting(messages, MAX_MESSAGE_BYTES, "PostgreSQL", self._publish)

    def _publish(self, messages: Sequence[Message[Any]]) -> Sequence[Outcome]:
        def publish() -> Sequence[Outcome]:
            self._find(topics_of(messages))
            if not arrivals.are_one_statement(messages):
                stored = self._database.write(lambda: self._publish_steps(messages))
                self._told()
                return stored
            topic = self._topics.get(messages[0].topic)
            if topic is None or topic.exactly_once:
                # Others must not wait with it for a transaction that has taken its identity.
                return self._publish_at_once(messages)
            return self._gathering.publish(messages)

        return outcomes.told(messages, publish)

    def _publish_at_once(self, messages: Sequence[Message[Any]]) -> Sequence[Outcome]:
        stored = self._database.write_at_once(lambda: self._publish_steps(messages))
        self._told()
        return stored

    def _told(self) -> None:
        """Something was published, and committed."""
        self._ticker.published()
        self._bell.ring()

    def _publish_steps(self, messages: Sequence[Message[Any]]) -> Steps[list[Outcome]]:
        return arrivals.publish(self._topics, messages, self._clock.wall_ms())

    def _find(self, names: AbstractSet[str]) -> None:
        """Look up topics that another process declared: a relay knows only their names."""
        if unknown := names - self._topics.keys():
            self._topics.update(self._database.read(lambda: log.find(unknown)))

    def subscribe(
        self, topics: Sequence[Topic[Any]], subscription: str, options: SubscribeOptions
    ) -> Lane:
        """One lane of the named subscription of these declared topics."""
        log.require_declared(self._topics, topics, subscription)
        shared = self._started()
        # A subscription that begins after the newest begins after what has no position yet.
        self._ticker.tick()
        numbers = self._database.write(
            lambda: locks.subscribe(self._topics, topics, subscription, options)
        )
        lane = Lane(
            shared,
            log.lanes_of(
                numbers,
                topics,
                shared.listener.worker,
                next(self._lane_numbers),
                SERVER,
                options,
            ),
            log.topics_by_stream(self._topics, topics),
            options.lease_s,
            self._lanes.discard,
        )
        self._lanes.add(lane)
        return lane

    @property
    def keeps_waiting_s(self) -> float:
        """For how many seconds a message that wants its worker for itself may have to wait."""
        return self._solitude.stays_s

    def _started(self) -> Shared:
        """What lanes need and publishers do not: a session that listens."""
        with self._starting:
            if self._shared is None:
                listener = Listener(self._database, self._channel, self._bell)
                listener.start()
                self._shared = Shared(
                    self._database,
                    self._clock,
                    self._steps,
                    self._bell,
                    listener,
                    self._ticker,
                    self._sweeper,
                    self._solitude,
                    self._compare_clocks,
                )
            return self._shared

    def close(self) -> None:
        """Close every lane, giving back what it holds, and the connections."""
        if self._closed:
            return
        self._closed = True
        with ExitStack() as closing:  # a lane that cannot give back does not keep the others open
            closing.callback(self._database.close)
            closing.callback(self._bell.close)
            if self._shared is not None:
                closing.callback(self._shared.listener.close)
            for lane in list(self._lanes):
                closing.callback(lane.close)

    # --- what is being worked on: `duly.inspection.Observing`

    def holders(self) -> Sequence[Holder]:
        """Who has claimed messages; a dead process is known by the session it has lost."""
        found = self._database.read(looking.holders)
        alive = living(self._database, {worker for worker, *_ in found})
        return [
            Holder(worker, alive[worker], subscription, topic, count)
            for worker, subscription, topic, count in found
        ]

    # --- what goes through: `duly.inspection.counting.Counting`

    def workers(self) -> Sequence[str]:
        """The worker processes that are alive and known by a session."""
        return self._database.read(present)

    def examine(self) -> Sequence[Finding]:
        """What endangers the database, and what its clock says; see `duly.inspection.health`."""
        return [*examine(self._database), *self._database.read(self._steps.findings)]


def _nothing() -> None:
    """Whoever brings a clock sees to it."""

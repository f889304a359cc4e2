"""The store in memory: tables, inbox, cursors, dead letters of logs, and an outbox."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from duly.broker import Delivery, Outcome, Published
from duly.errors import BrokerUnavailable, ConfigurationError, PublishFailed
from duly.guarantees import Admission, Dead
from duly.inspection import DeadLetter
from duly.message import Message, Topic, now_ms
from duly.store import ParkedReceipt, Scope, StoreCapabilities
from duly.stores.memory.admission import ByCursor, ByInbox, Cursor, Memory
from duly.stores.memory.graveyard import MemoryGraveyard
from duly.stores.memory.outbox import MemoryOutbox
from duly.stores.memory.parking import MemoryParked
from duly.stores.memory.session import (
    ByClaim,
    Database,
    Entrance,
    MemorySession,
    Moment,
    StoreDead,
)
from duly.stores.memory.tables import MemoryTables, Rows, Tables

_numbers = itertools.count(1)


class MemoryStore:
    """A store in memory: of its own, or the same database as a `MemoryDatabase` given to it.

    One transaction at a time: `begin` waits up to ``begin_s`` seconds for the one before and
    then raises `BrokerUnavailable`. ``wall_ms`` gives milliseconds since 1970 UTC.

    ``clock`` gives monotonic seconds: leases and backoff of the outbox go by it.

    ``on_commit`` is for tests: it is called with "before" and "after" a commit is applied, and
    what it raises makes the commit fail there, as `CommitUnknown` if it is no `DulyError`.
    """

    def __init__(
        self,
        database: Database | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_ms: Callable[[], int] = now_ms,
        begin_s: float = 10.0,
        tx_s: float = 1.0,
    ) -> None:
        identity = None if database is None else database.capabilities.database
        self._capabilities = StoreCapabilities(
            name="in-memory store",
            database=identity or f"memory-store:{next(_numbers)}",
            durable=False,
            one_writer=True,
            outbox=database is None,
            tx_s=tx_s,
            parks=True,
        )
        self.on_commit: Callable[[Moment], None] | None = None
        self._database = database
        self._wall_ms = wall_ms
        self._begin_s = begin_s
        self._writer = threading.Lock()
        changed = threading.Condition(threading.RLock())
        self._lock: AbstractContextManager[Any] = (
            changed if database is None else database.claims.changed
        )
        self._outbox = MemoryOutbox(changed, clock)
        self._graveyard = MemoryGraveyard(self._lock)
        self._clock = clock
        self._open: MemorySession | None = None
        self._topics: set[str] = set()
        self._tables: Tables = {}
        self._memory = Memory()
        self._dead: dict[int, StoreDead] = {}
        self._dead_ids = itertools.count(1)

    @property
    def capabilities(self) -> StoreCapabilities:
        """What this store provides."""
        return self._capabilities

    @property
    def outbox(self) -> MemoryOutbox:
        """What transactions published; empty for ever where the broker is the same database."""
        return self._outbox

    @property
    def parked(self) -> MemoryParked:
        """What transactions by cursor have parked."""
        rows, forget = self._memory.parked, self._memory.forget_dead
        return MemoryParked(rows, forget, self._graveyard, self._lock, self._clock, self._wall_ms)

    @property
    def graveyard(self) -> MemoryGraveyard:
        """Dead letters of a broker that keeps none."""
        return self._graveyard

    def declare(self, topics: Sequence[Topic[Any]]) -> None:
        """Make known the topics that transactions publish to."""
        if self._database is not None:
            self._database.declare(topics)
        with self._lock:
            self._topics.update(topic.name for topic in topics)

    def begin(self, scope: Scope | None) -> MemorySession:
        """Open a transaction; raises `BrokerUnavailable` when none can begin in time."""
        entrance = None if scope is None else self._entrance(scope)
        if not self._writer.acquire(timeout=self._begin_s):
            raise BrokerUnavailable(
                f"another transaction of this store has been open for {self._begin_s} s; "
                "nothing was changed"
            )
        claims = None if self._database is None else self._database.claims
        self._open = MemorySession(
            self,
            self._lock,
            MemoryTables(self._tables),
            claims,
            entrance,
            buries_for=scope if isinstance(entrance, ByCursor) else None,
        )
        return self._open

    def _entrance(self, scope: Scope) -> Entrance:
        match scope.admission:
            case Admission.BY_INBOX:
                return ByInbox(self._memory, scope, self._wall_ms())
            case Admission.BY_CURSOR:
                return ByCursor(self._memory, scope, self._wall_ms())
            case Admission.BY_CLAIM:
                if self._database is None:
                    raise ConfigurationError(
                        f"consumer {scope.consumer!r}: admission by claim needs the store to be "
                        "the broker's own database: MemoryStore(database)"
                    )
                return ByClaim(self._database.claims)

    def joins(self, connection: Any) -> bool:
        """Whether ``within=connection`` can publish: the tables of the open transaction."""
        session = self._open
        return session is not None and connection is session.connection and connection.is_open

    def publish_within(
        self,
        connection: Any,
        messages: Sequence[Message[Any]],
        topics: Sequence[Topic[Any]] = (),
    ) -> Sequence[Outcome]:
        """Put messages into the caller's own open transaction."""
        session = self._open
        if session is None or connection is not session.connection:
            raise ConfigurationError("within=...: this is not the open transaction of this store")
        session.declare(topics)
        return session.publish(messages)

    def close(self) -> None:
        """Roll back what is open."""
        self.crash()

    def crash(self) -> None:
        """The worker whose transaction is open dies, or its connection does: rolled back."""
        session = self._open
        if session is not None:
            session.rollback()

    # --- what people and tests look at

    def rows(self, table: str) -> Rows:
        """The committed rows of a table."""
        with self._lock:
            return MemoryTables(self._tables).rows(table)

    def cursor(self, consumer: str, log: str) -> Cursor | None:
        """How far a log has taken effect for a consumer."""
        with self._lock:
            return self._memory.cursors.get((consumer, log))

    def remembered(self, consumer: str) -> int:
        """How many messages the inbox of a consumer holds."""
        with self._lock:
            return len(self._memory.inbox.get(consumer, {}))

    def dead_letters(self, consumer: str) -> Sequence[StoreDead]:
        """The messages of logs that a consumer gave up on."""
        with self._lock:
            return [dead for dead in self._dead.values() if dead.subscription == consumer]

    # --- the session's side

    def check_publish(self, message: Message[Any]) -> Outcome:
        """What the outbox answers: a relay brings to the broker what is in it."""
        if message.topic not in self._topics:
            return PublishFailed(
                f"topic {message.topic!r}, message {message.id!r}: the topic was not declared",
                message_id=message.id,
            )
        return Published(message.id)

    def fault(self, moment: Moment) -> None:
        """Where a test makes commits fail."""
        if self.on_commit is not None:
            self.on_commit(moment)

    def bury(self, scope: Scope, settlement: Dead, delivery: Delivery) -> None:
        """Keep a dead letter; called with the lock held."""
        id, at_ms = next(self._dead_ids), self._wall_ms()
        consumer, message, attempts = scope.consumer, delivery.message, delivery.attempt
        self._dead[id] = StoreDead(id, consumer, message, settlement.error, attempts, at_ms)
        if scope.buries and isinstance(delivery.receipt, ParkedReceipt):
            letter = DeadLetter(consumer, message, settlement.error, attempts, at_ms)
            self._graveyard.bury([replace(letter, replays=delivery.replays)])

    def send(self, messages: Sequence[Message[Any]]) -> None:
        """Put messages into the outbox; called with the lock held."""
        self._outbox.put(messages)

    def ended(self, session: MemorySession) -> None:
        """Let the next transaction begin; the second call for a session does nothing."""
        if self._open is session:
            self._open = None
            self._writer.release()

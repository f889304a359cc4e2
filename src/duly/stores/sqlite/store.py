"""`SQLiteStore`: handlers' effects in a SQLite file."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from duly.broker import Outcome
from duly.errors import ConfigurationError
from duly.guarantees import Admission
from duly.inspection.erasing import Whose
from duly.inspection.health import Finding
from duly.message import Message, Topic, now_ms
from duly.sql import inbox, log, outbox
from duly.sql.graves import SQLGraveyard
from duly.sql.parking import Moment, SQLParked
from duly.sql.sqlite import DatabaseFile, boot_id, boot_ms
from duly.sql.sqlite.driver import broker_error
from duly.sql.sqlite.guard import Guard, GuardedConnection
from duly.sql.sqlite.health import examine
from duly.sql.sqlite.place import Place
from duly.sql.steps import Steps
from duly.store import Scope, StoreCapabilities
from duly.stores.sqlite.outbox import SQLiteOutbox
from duly.stores.sqlite.session import Lane, SQLiteSession, new_mark
from duly.stores.sqlite.within import is_open_on, run_within

# Long transactions keep every other writer of the file waiting.
_TX_S = 0.05
# A snapshot that a handler's forgotten cursor still holds cannot be written upon.
_BUSY_SNAPSHOT = sqlite3.SQLITE_BUSY_SNAPSHOT


NOTHING_DECLARED: log.Catalog = MappingProxyType({})


class SQLiteStore:
    """Effects, inbox, cursors and outbox in one SQLite file. See `duly.store.Store`.

    - ``broker_database``: the identity of the broker's database (`Capabilities.database`).
      Where it is this very file, messages are published into its log and admission is by
      claim; otherwise they go to the outbox.
    - ``namespace``: whose tables of the file, as at the broker.
    - ``foreign_keys``: whether SQLite enforces foreign keys of what handlers write.
    - ``begin_s``: how long `begin` waits for the file's turn before `BrokerUnavailable`.
    - ``wall_ms`` gives milliseconds since 1970 UTC, ``boot_ms`` since boot; tests bring their own.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        broker_database: str | None = None,
        namespace: str = "",
        foreign_keys: bool = False,
        begin_s: float = 30.0,
        tx_s: float = _TX_S,
        wall_ms: Callable[[], int] = now_ms,
        boot_ms: Callable[[], int] = boot_ms,
    ) -> None:
        self._file = DatabaseFile.open(path, namespace=namespace)
        self._place = Place(self._file.path)
        self._log_here = broker_database == self._file.identity
        self._foreign_keys = foreign_keys
        self._begin_s = begin_s
        self._wall_ms = wall_ms
        self._boot_ms = boot_ms
        self._lanes: deque[Lane] = deque()
        self._catalog: dict[str, log.TopicRecord] = {}
        self._topics: set[str] = set()
        self._flows: dict[inbox.Flow, int] = {}
        self._sweepers: dict[str, inbox.Sweeper] = {}
        self._closed = False
        self._capabilities = StoreCapabilities(
            name="SQLite",
            database=self._file.identity,
            one_writer=True,
            outbox=True,
            tx_s=tx_s,
            parks=True,
        )

    @property
    def capabilities(self) -> StoreCapabilities:
        """What this store provides."""
        return self._capabilities

    @property
    def file(self) -> DatabaseFile:
        """The database."""
        return self._file

    @property
    def path(self) -> Path:
        """The database file."""
        return self._file.path

    @property
    def outbox(self) -> SQLiteOutbox:
        """What transactions published; empty for ever where the broker is the same file."""
        return SQLiteOutbox(self._file, wall_ms=self._wall_ms, boot_time_ms=self._boot_ms)

    @property
    def parked(self) -> SQLParked:
        """What transactions by cursor have parked."""
        return self.parked_by(self._wall_ms, self._boot_ms)

    def parked_by(self, wall_ms: Callable[[], int], boot_ms: Callable[[], int]) -> SQLParked:
        """The same under other clocks."""
        return SQLParked(self._file, lambda: Moment(wall_ms(), boot_ms(), boot_id()))

    @property
    def graveyard(self) -> SQLGraveyard:
        """Dead letters of a broker that keeps none."""
        return SQLGraveyard(self._file)

    def go_by(self, clock_ms: Callable[[], int]) -> None:
        """Let ages, due times and leases go by another clock from here on; for tests."""
        self._wall_ms = self._boot_ms = clock_ms

    def declare(self, topics: Sequence[Topic[Any]]) -> None:
        """Make known the topics that transactions publish to, creating what they need."""
        if self._log_here:
            self._catalog.update(self._file.write(lambda: log.declare(topics)))
        else:
            self._topics.update(topic.name for topic in topics)

    def begin(self, scope: Scope | None) -> SQLiteSession:
        """Open a transaction once it is this store's turn to write the file.

        Raises `BrokerUnavailable`, naming who writes, when the turn does not come in time, and
        when the file is no longer where it was opened.
        """
        if self._closed:
            raise ConfigurationError(f"{self.path}: this store is closed")
        if scope is not None and scope.admission is Admission.BY_CLAIM and not self._log_here:
            raise ConfigurationError(
                f"consumer {scope.consumer!r}: admission by claim needs store and broker in one "
                f"file, and the broker's is not {self.path}. Admit by inbox."
            )
        mark = new_mark()
        lane = self._lane()
        try:
            lane.turn.acquire(self._begin_s)
        except BaseException:
            self._lanes.append(lane)  # with who still waits for its turn, where that did not come
            raise
        try:
            self._place.check()
            by_claim = scope is not None and scope.admission is Admission.BY_CLAIM
            self._begin(lane, None if by_claim else mark)
            return SQLiteSession(self, lane, scope, mark)
        except sqlite3.Error as error:
            self.take_back(lane, in_doubt=True)
            raise broker_error(error, self.path) from error
        except BaseException:
            self.take_back(lane, in_doubt=True)
            raise

    def joins(self, connection: Any) -> bool:
        """Whether ``within=connection`` can publish: a `sqlite3.Connection` to this file."""
        return is_open_on(connection, self.path)

    def publish_within(
        self,
        connection: Any,
        messages: Sequence[Message[Any]],
        topics: Sequence[Topic[Any]] = (),
    ) -> Sequence[Outcome]:
        """Put messages into the caller's own open transaction on this database."""
        if not self.joins(connection):
            raise ConfigurationError(
                f"within={type(connection).__name__}: no open sqlite3.Connection to {self.path} "
                "that this thread may use"
            )
        unknown = self.unknown(topics)
        # Not learned: what the caller's transaction declared is undone where it rolls back.
        tables = self._file.tables
        declared = (
            run_within(connection, log.declare(unknown), self.path, tables) if unknown else {}
        )
        return run_within(connection, self.publish_steps(messages, declared), self.path, tables)

    def close(self) -> None:
        """Close every connection. Sessions that are open end first."""
        if not self._closed:
            self._closed = True
            while self._lanes:
                _discard(self._lanes.pop())
            self._file.close()

    # --- what people ask: `Forgetting`, `Remembering`, `Erasing` in `duly.inspection`

    def effect_ms(self, consumer: str, topic: str, source: str, id: str) -> int | None:
        """When a message took effect that was admitted by inbox; None: not remembered."""
        return self._file.read(lambda: inbox.effect_ms(consumer, topic, source, id))

    def forget(self, consumer: str, limit: int) -> int:
        """Forget some of what took effect for a consumer admitted by inbox."""
        return self._file.write(lambda: inbox.forget_some(consumer, limit))

    def examine(self) -> Sequence[Finding]:
        """What endangers the file; see `duly.inspection.health`."""
        return [*examine(self._file)]

    def holdings(self, whose: Whose) -> int:
        """How many copies of a person's messages wait in the outbox or are dead."""
        return self._file.read(lambda: outbox.holdings(whose))

    def erase(self, whose: Whose) -> Iterator[int]:
        """Remove them, some at a time; what the inbox remembers is left to its retention."""
        while erased := self._file.write(lambda: outbox.erase(whose)):
            yield erased
        self._file.empty_log()

    # --- the session's side

    def now_ms(self) -> int:
        """Milliseconds since 1970 UTC."""
        return self._wall_ms()

    def boot_ms(self) -> int:
        """Milliseconds since boot."""
        return self._boot_ms()

    def unknown(self, topics: Iterable[Topic[Any]]) -> Sequence[Topic[Any]]:
        """Those that have to be declared in this database before they can be published to."""
        if self._log_here:
            return [topic for topic in topics if topic.name not in self._catalog]
        self._topics.update(topic.name for topic in topics)
        return ()

    @property
    def flows(self) -> Mapping[inbox.Flow, int]:
        """The numbers of flows of inboxes, where they are known."""
        return self._flows

    def learn(self, topics: log.Catalog, flows: Mapping[inbox.Flow, int]) -> None:
        """What a committed transaction declared and found."""
        self._catalog.update(topics)
        self._flows.update(flows)

    def publish_steps(
        self, messages: Sequence[Message[Any]], declared: log.Catalog = NOTHING_DECLARED
    ) -> Steps[list[Outcome]]:
        """Into the log where it is here, else into the outbox."""
        if self._log_here:
            catalog = {**self._catalog, **declared} if declared else self._catalog
            return log.publish(catalog, messages, self._wall_ms())
        return outbox.put(self._topics, messages)

    def sweeper(self, consumer: str) -> inbox.Sweeper:
        """Where cleaning this consumer's inbox stands."""
        return self._sweepers.setdefault(consumer, inbox.Sweeper(consumer))

    def take_back(self, lane: Lane, *, in_doubt: bool) -> None:
        """Give the turn on; keep the connection for the next session, unless in doubt."""
        if in_doubt or self._closed:
            with contextlib.suppress(ValueError):  # where an interrupt came as it was kept
                self._lanes.remove(lane)
            _discard(lane)
            return
        lane.guard.reset()
        lane.turn.release()
        self._lanes.append(lane)

    def _lane(self) -> Lane:
        try:
            return self._lanes.pop()
        except IndexError:
            return Lane(self._file.turn(), self._guard())

    def _guard(self) -> Guard:
        try:
            connection = self._file.connect(GuardedConnection, isolation_level="IMMEDIATE")
            if self._foreign_keys:
                sqlite3.Cursor(connection).execute("pragma foreign_keys = on")
            return Guard(connection, self.path, self._file.tables)
        except sqlite3.Error as error:
            raise broker_error(error, self.path) from error

    def _begin(self, lane: Lane, mark: int | None) -> None:
        try:
            lane.guard.begin(mark)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != _BUSY_SNAPSHOT:
                raise
            lane.guard.close()
            lane.guard = self._guard()
            lane.guard.begin(mark)


def _discard(lane: Lane) -> None:
    lane.guard.close()
    lane.turn.close()

"""`PostgresStore`: handlers' effects in a PostgreSQL database."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import psycopg

from duly.broker import Outcome
from duly.errors import ConfigurationError
from duly.guarantees import Admission
from duly.inspection.erasing import Whose
from duly.inspection.health import Finding
from duly.message import Message, Topic, now_ms
from duly.sql import inbox, outbox
from duly.sql.graves import SQLGraveyard
from duly.sql.parking import Moment, SQLParked
from duly.sql.postgres import Database, LoopLine, OwnLine
from duly.sql.postgres.connections import AsyncSource, async_source_of
from duly.sql.postgres.errors import broker_error
from duly.sql.postgres.health import examine
from duly.sql.postgres.lines import OnLoop
from duly.sql.postgres.transactions import Isolation, begin
from duly.sql.steps import Steps
from duly.store import Scope, StoreCapabilities
from duly.stores.postgres.log import BrokerLog
from duly.stores.postgres.outbox import PostgresOutbox
from duly.stores.postgres.session import PostgresSession, new_mark
from duly.stores.postgres.within import arun_within, is_open_on, run_within

ISOLATIONS: Mapping[str, Isolation] = {
    "read committed": "read committed",
    "repeatable read": "repeatable read",
    "serializable": "serializable",
}
"""What a transaction may see of others, by name."""

# Above this many a backend's snapshot does not hold its subtransactions any more, and everybody
# else's statements look them up on disk.
_SAVEPOINTS = 50
# There is one: the database's.
_CLOCK = ""
# A handler may use all of max_run_s; what stands idle for longer has no worker any more.
_GRACE_S = 5.0


class PostgresStore:
    """Effects, inbox, cursors and outbox in one schema of a database. See `duly.store.Store`.

    - ``database``: a URL, a ``psycopg_pool.ConnectionPool``, or a function that returns a new
      `psycopg.Connection`. ``async_database``: for ``async def`` handlers where that is no URL:
      a function that makes a `psycopg.AsyncConnection`, awaited on the worker's loop.
    - ``schema``: where duly's tables are; handlers' tables are wherever they are.
    - ``broker_database``, ``log``: the identity of the broker's database, and its log. Where it is
      this very database and schema, messages are published into its log and admission is by
      claim; otherwise they go to the outbox.
    - ``isolation``: of handlers' transactions. A serialization failure is done again, uncharged.
    - ``lock_s``: how long a statement waits for a lock; None: as the role has it.
    - ``wall_ms`` gives milliseconds since 1970 UTC; tests bring their own.
    """

    def __init__(
        self,
        database: Any,
        *,
        async_database: Any = None,
        schema: str = "duly",
        broker_database: str | None = None,
        log: BrokerLog | None = None,
        isolation: Isolation = "read committed",
        tx_s: float = 1.0,
        lock_s: float | None = None,
        wall_ms: Callable[[], int] = now_ms,
    ) -> None:
        self._database = Database(database, schema=schema)
        if async_database is None and not _is_function(database):
            async_database = database
        self._async_source = async_source_of(
            async_database, self._database.shown, self._database.source
        )
        self._log = log if broker_database == self._database.identity else None
        self._isolation: Isolation = isolation
        self._lock_s = lock_s
        self._wall_ms = wall_ms
        self._lease_ms: Callable[[], int] | None = None
        self._topics: set[str] = set()
        self._flows: dict[inbox.Flow, int] = {}
        self._sweepers: dict[str, inbox.Sweeper] = {}
        self._filled = threading.Event()
        self._closed = False
        self._capabilities = StoreCapabilities(
            name="PostgreSQL",
            database=self._database.identity,
            outbox=True,
            tx_s=tx_s,
            savepoints=_SAVEPOINTS,
            async_connections=self._async_source is not None,
            pipelines=psycopg.Pipeline.is_supported(),
            parks=True,
        )
        try:
            self._database.ensure("store", "postgres_store")
        except BaseException:
            self._database.close()
            raise

    @property
    def capabilities(self) -> StoreCapabilities:
        """What this store provides."""
        return self._capabilities

    @property
    def outbox(self) -> PostgresOutbox:
        """What transactions published; empty for ever where the broker is the same database."""
        return PostgresOutbox(
            self._database, self._filled, wall_ms=self._wall_ms, lease_ms=self._lease_ms
        )

    def outbox_by(self, clock_ms: Callable[[], int]) -> PostgresOutbox:
        """The same where the relay's lease goes by another clock than the database's."""
        return PostgresOutbox(self._database, self._filled, wall_ms=clock_ms, lease_ms=clock_ms)

    @property
    def parked(self) -> SQLParked:
        """What transactions by cursor have parked; its leases go by the database's clock."""
        return SQLParked(self._database, self._moment)

    def parked_by(self, clock_ms: Callable[[], int]) -> SQLParked:
        """The same where due times and leases go by another clock."""
        return SQLParked(self._database, lambda: Moment(clock_ms(), clock_ms(), _CLOCK))

    def _moment(self) -> Moment:
        lease_now_ms = None if self._lease_ms is None else self._lease_ms()
        return Moment(self._wall_ms(), lease_now_ms, _CLOCK)

    def go_by(self, clock_ms: Callable[[], int]) -> None:
        """Let ages, due times and leases go by another clock from here on; for tests."""
        self._wall_ms = self._lease_ms = clock_ms

    @property
    def graveyard(self) -> SQLGraveyard:
        """Dead letters of a broker that keeps none."""
        return SQLGraveyard(self._database)

    def declare(self, topics: Sequence[Topic[Any]]) -> None:
        """Make known the topics that transactions publish to, creating what they need."""
        log = self._log
        if log is None:
            self.know(topics)
        elif unknown := log.unknown(topics):
            log.learn([self._database.write(lambda: log.declare(unknown))])

    def begin(self, scope: Scope | None) -> PostgresSession:
        """Open a transaction on a blocking connection. Raises `BrokerError`."""
        self._check(scope)
        connection = self._database.source.take()
        lent = _Lent(self._database, OwnLine(connection, self._database.schema))
        return self._begun(lent, scope)

    def begin_on_loop(self, scope: Scope | None, on_loop: OnLoop) -> PostgresSession:
        """See `duly.store.BeginsOnLoop`. Raises `BrokerError`."""
        self._check(scope)
        source = self._async_source
        if source is None:
            raise ConfigurationError(
                f"{self._database.shown}: this store was given only blocking connections. For "
                "async handlers give PostgresStore(..., async_database=...), a function that "
                "makes a psycopg.AsyncConnection"
            )
        loop = on_loop(_running_loop())
        connection = on_loop(source.take(loop))
        line = LoopLine(connection, self._database.schema, on_loop)
        return self._begun(_LentOnLoop(source, line, loop, on_loop), scope)

    def _check(self, scope: Scope | None) -> None:
        if self._closed:
            raise ConfigurationError(f"{self._database.shown}: this store is closed")
        if scope is not None and scope.admission is Admission.BY_CLAIM and self._log is None:
            raise ConfigurationError(
                f"consumer {scope.consumer!r}: admission by claim needs store and broker in one "
                f"database, and the broker's is not {self._database.shown}. Admit by inbox."
            )

    def _begun(self, lent: _Lent | _LentOnLoop, scope: Scope | None) -> PostgresSession:
        mark = new_mark()
        longest_s = None if scope is None else scope.max_run_s + _GRACE_S
        try:
            lent.line.run(
                begin(
                    mark,
                    isolation=self._isolation,
                    statement_s=longest_s,
                    idle_s=longest_s,
                    lock_s=self._lock_s,
                    fits=self._database.fits,
                )
            )
            return PostgresSession(self, lent, scope, mark)
        except psycopg.Error as error:
            lent.give_back(in_doubt=True)
            if refusal := self._database.left_behind(error):
                raise refusal from None
            raise broker_error(error, self._database.shown) from error
        except BaseException:
            lent.give_back(in_doubt=True)
            raise

    def joins(self, connection: Any) -> bool:
        """Whether ``within=connection`` can publish: a psycopg connection to this database."""
        return is_open_on(connection, self._database)

    def publish_within(
        self,
        connection: Any,
        messages: Sequence[Message[Any]],
        topics: Sequence[Topic[Any]] = (),
    ) -> Sequence[Outcome]:
        """Put messages into the caller's own open transaction on this database."""
        return run_within(connection, self._within_steps(messages, topics), self._database)

    async def apublish_within(
        self,
        connection: Any,
        messages: Sequence[Message[Any]],
        topics: Sequence[Topic[Any]] = (),
    ) -> Sequence[Outcome]:
        """The same on a `psycopg.AsyncConnection`; see `duly.store.PublishesOnLoop`."""
        steps = self._within_steps(messages, topics)
        return await arun_within(connection, steps, self._database)

    def _within_steps(
        self, messages: Sequence[Message[Any]], topics: Sequence[Topic[Any]]
    ) -> Steps[Sequence[Outcome]]:
        log = self._log
        if log is None:
            self.know(topics)
            return self.put(messages)
        # Not learned: what the caller's transaction declared is undone where it rolls back.
        return _declare_and_publish(log, messages, topics, self._wall_ms())

    def close(self) -> None:
        """Close every connection of duly's own. Sessions that are open end first."""
        if not self._closed:
            self._closed = True
            if self._async_source is not None:
                self._async_source.close()
            self._database.close()

    # --- what people ask: `Forgetting`, `Remembering`, `Erasing` in `duly.inspection`

    def effect_ms(self, consumer: str, topic: str, source: str, id: str) -> int | None:
        """When a message took effect that was admitted by inbox; None: not remembered."""
        return self._database.read(lambda: inbox.effect_ms(consumer, topic, source, id))

    def forget(self, consumer: str, limit: int) -> int:
        """Forget some of what took effect for a consumer admitted by inbox."""
        return self._database.write(lambda: inbox.forget_some(consumer, limit))

    def examine(self) -> Sequence[Finding]:
        """What endangers the database; see `duly.inspection.health`."""
        return [*examine(self._database)]

    def holdings(self, whose: Whose) -> int:
        """How many copies of a person's messages wait in the outbox or are dead."""
        return self._database.read(lambda: outbox.holdings(whose))

    def erase(self, whose: Whose) -> Iterator[int]:
        """Remove them, some at a time; what the inbox remembers is left to its retention."""
        while erased := self._database.write(lambda: outbox.erase(whose)):
            yield erased

    # --- the session's side

    @property
    def shown(self) -> str:
        """The database, for people."""
        return self._database.shown

    @property
    def log(self) -> BrokerLog | None:
        """The broker's log, where that is in the same database."""
        return self._log

    @property
    def isolation(self) -> Isolation:
        """Of its transactions."""
        return self._isolation

    @property
    def flows(self) -> Mapping[inbox.Flow, int]:
        """The numbers of flows of inboxes, where they are known."""
        return self._flows

    def now_ms(self) -> int:
        """Milliseconds since 1970 UTC."""
        return self._wall_ms()

    def know(self, topics: Iterable[Topic[Any]]) -> None:
        """Topics that may be put into the outbox."""
        self._topics.update(topic.name for topic in topics)

    def put(self, messages: Sequence[Message[Any]]) -> Steps[list[Outcome]]:
        """Into the outbox."""
        return outbox.put(self._topics, messages)

    def number(self, flows: Iterable[inbox.Flow]) -> None:
        """See that the numbers of these are known."""
        if new := [flow for flow in flows if flow not in self._flows]:
            self._flows.update(self._database.write(lambda: inbox.number_flows(new)))

    def filled(self) -> None:
        """A transaction that put something into the outbox stands."""
        self._filled.set()

    def sweeper(self, consumer: str) -> inbox.Sweeper:
        """Where cleaning this consumer's inbox stands."""
        return self._sweepers.setdefault(consumer, inbox.Sweeper(consumer))


def _declare_and_publish(
    log: BrokerLog, messages: Sequence[Message[Any]], topics: Sequence[Topic[Any]], now_ms: int
) -> Steps[Sequence[Outcome]]:
    unknown = log.unknown(topics)
    declared = [(yield from log.declare(unknown))] if unknown else []
    return (yield from log.publish(messages, now_ms, declared))


def _is_function(database: Any) -> bool:
    return callable(database) and not hasattr(database, "getconn")


class _Lent:
    """A blocking connection, lent by the database."""

    def __init__(self, database: Database, line: OwnLine) -> None:
        self._database = database
        self.line = line

    def give_back(self, *, in_doubt: bool) -> None:
        self._database.source.give_back(self.line.connection, in_doubt=in_doubt)


class _LentOnLoop:
    """An async connection, lent by the loop's source."""

    def __init__(self, source: AsyncSource, line: LoopLine, loop: Any, on_loop: OnLoop) -> None:
        self._source = source
        self._loop = loop
        self._on_loop = on_loop
        self.line = line

    def give_back(self, *, in_doubt: bool) -> None:
        self._on_loop(self._source.give_back(self.line.connection, self._loop, in_doubt=in_doubt))


async def _running_loop() -> Any:
    return asyncio.get_running_loop()

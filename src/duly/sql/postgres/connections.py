"""Where connections come from: a URL, a pool of the application's, a function that makes one.

Of either colour: the sync source blocks, the async one is awaited on the loop that it serves.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import TransactionStatus

from duly.errors import BrokerUnavailable, ConfigurationError
from duly.sql.postgres.errors import broker_error, first_line, wrong_url
from duly.sql.postgres.pooling import Said, split
from duly.sql.postgres.primary import Primary

Connect = Callable[[], psycopg.Connection[Any]]
AsyncConnect = Callable[[], Awaitable[psycopg.AsyncConnection[Any]]]

# A peer that is gone without a word is noticed within half a minute, whoever waits for whom;
# what the URL says comes first.
_DEFAULTS: Mapping[str, Any] = {
    "fallback_application_name": "duly",
    "connect_timeout": 10,
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 25_000,
}
# How long a server that is only looked at may take: libpq waits for no less, and of one that is
# gone without a word no more has to be known.
_GLANCE_S = 2
# More statements than psycopg keeps by itself: duly's own, and a handler's.
_PREPARED = 400
# What a connection of somebody else's pool is marked with once it was asked where it leads.
_GREETED = "_duly_greeted_by"
# After how many runs psycopg prepares a statement, unless it is told otherwise.
_THRESHOLD = 5


@dataclass(frozen=True, slots=True)
class Address:
    """What a URL names. ``shown`` is how it may appear in an error: no user, no password.
    ``said`` is what it says of a pooler.
    """

    parameters: Mapping[str, Any]
    shown: str
    said: Said = field(default_factory=Said)

    def each(self) -> Sequence[Mapping[str, Any]]:
        """What reaches each of several servers by itself; nothing where it names one."""
        named = {
            name: str(self.parameters[name]).split(",")
            for name in ("host", "hostaddr", "port")
            if self.parameters.get(name)
        }
        count = max(map(len, named.values()), default=1)
        if count == 1:
            return []
        rest = {name: value for name, value in self.parameters.items() if name not in named}
        rest |= {"target_session_attrs": "any", "connect_timeout": _GLANCE_S}
        # One port may stand for all hosts.
        return [
            rest | {name: values[n if len(values) > 1 else 0] for name, values in named.items()}
            for n in range(count)
        ]

    @classmethod
    def of(cls, url: str) -> Address:
        """Read a connection string as libpq does. Raises `ConfigurationError`."""
        url, said = split(url)
        try:
            parameters = {**_DEFAULTS, **conninfo_to_dict(url)}
        except psycopg.Error:
            raise wrong_url(url.partition("://")[0] + "://...") from None
        host = parameters.get("host") or parameters.get("hostaddr") or "local"
        port = parameters.get("port")
        place = f"{host}:{port}" if port else str(host)
        return cls(parameters, f"postgresql://{place}/{parameters.get('dbname') or ''}", said)


class Source(Protocol):
    """Gives connections out, in autocommit and idle, and takes them back.

    ``said`` is what was said of a pooler; ``prepares``: whether statements are prepared;
    ``primary``: what every new connection is compared with.
    """

    said: Said
    prepares: bool
    primary: Primary

    def take(self) -> psycopg.Connection[Any]:
        """A connection. Raises `BrokerError`."""
        ...

    def give_back(self, connection: psycopg.Connection[Any], *, in_doubt: bool) -> None:
        """It is free again; in doubt it is closed. Never raises."""
        ...

    def close(self) -> None:
        """Close those that are idle, and each other when it comes back."""
        ...


class OwnSource:
    """Connections of duly's own, made by ``connect`` and kept while idle.

    A connection that died while it was idle is not given out: the server may have restarted.
    """

    def __init__(
        self,
        connect: Connect,
        shown: str,
        said: Said | None = None,
        servers: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.said = said or Said()
        self.primary = Primary(shown, servers)
        self.prepares = True
        self._connect = connect
        self._shown = shown
        self._idle: deque[psycopg.Connection[Any]] = deque()
        self._closed = False
        self._pid = os.getpid()

    def take(self) -> psycopg.Connection[Any]:
        """As `Source.take`."""
        refuse_forked(self._pid, self._shown)
        while not self._closed:
            try:
                connection = self._idle.pop()
            except IndexError:
                connection = self._made()
            if is_alive(connection):
                _follow(connection, self.prepares)
                return connection
            connection.close()
        raise ConfigurationError(f"{self._shown}: already closed")

    def _made(self) -> psycopg.Connection[Any]:
        try:
            connection = self._connect()
        except psycopg.Error as error:
            raise broker_error(error, self._shown) from hide(error)
        require_idle(connection, self._shown)
        connection.autocommit = True
        connection.prepared_max = _PREPARED
        try:
            self.primary.greet(connection)
        except BaseException:
            close_quietly(connection)
            raise
        return connection

    def give_back(self, connection: psycopg.Connection[Any], *, in_doubt: bool) -> None:
        """As `Source.give_back`."""
        if in_doubt or self._closed or connection.closed:
            close_quietly(connection)
        else:
            self._idle.append(connection)

    def twin(self, settings: str) -> OwnSource:
        """Another source of the same connections, for each of which these settings are made."""

        def connect() -> psycopg.Connection[Any]:
            connection = self._connect()
            try:
                connection.autocommit = True
                connection.execute(settings.encode())
            except BaseException:
                close_quietly(connection)
                raise
            return connection

        twin = OwnSource(connect, self._shown, self.said)
        twin.prepares = self.prepares
        twin.primary = self.primary
        return twin

    def close(self) -> None:
        """As `Source.close`."""
        self._closed = True
        if os.getpid() == self._pid:  # otherwise they are the parent's
            while self._idle:
                close_quietly(self._idle.pop())


class PoolSource:
    """Connections of an application's own ``psycopg_pool.ConnectionPool``, which stays open."""

    def __init__(self, pool: Any, shown: str) -> None:
        self._pool = pool
        self._shown = shown
        self._pid = os.getpid()
        self._changed: dict[int, tuple[bool, int | None]] = {}
        self._mutex = threading.Lock()
        self.said = Said()
        self.primary = Primary(shown)
        self.prepares = True

    def take(self) -> psycopg.Connection[Any]:
        """As `Source.take`."""
        refuse_forked(self._pid, self._shown)
        for _ in range(2):
            connection = self._taken()
            if is_alive(connection):
                break
            self._pool.putconn(connection)  # which replaces it
        else:
            raise BrokerUnavailable(f"{self._shown}: the pool has only connections that are dead")
        with self._mutex:
            self._changed[id(connection)] = connection.autocommit, connection.prepare_threshold
        connection.autocommit = True
        self._greet(connection)
        _follow(connection, self.prepares)
        return connection

    def _greet(self, connection: psycopg.Connection[Any]) -> None:
        """The pool makes its connections whenever it likes: of each that was not seen yet."""
        if getattr(connection, _GREETED, None) is not self.primary:
            try:
                self.primary.greet(connection)
            except BaseException:
                self.give_back(connection, in_doubt=True)
                raise
            setattr(connection, _GREETED, self.primary)

    def _taken(self) -> psycopg.Connection[Any]:
        try:
            return self._pool.getconn()  # type: ignore[no-any-return]
        except psycopg.Error as error:
            raise broker_error(error, self._shown) from hide(error)

    def give_back(self, connection: psycopg.Connection[Any], *, in_doubt: bool) -> None:
        """As `Source.give_back`."""
        with self._mutex:
            autocommit, threshold = self._changed.pop(id(connection), (False, _THRESHOLD))
        if in_doubt:
            close_quietly(connection)
        with contextlib.suppress(psycopg.Error):
            if not connection.closed:
                connection.autocommit = autocommit
                connection.prepare_threshold = threshold
            self._pool.putconn(connection)

    def close(self) -> None:
        """The pool is the application's."""


class AsyncSource:
    """Connections of duly's own for the event loops that ask for them; see `OwnSource`.

    A connection belongs to the loop on which it was made.
    """

    def __init__(
        self, connect: AsyncConnect, shown: str, primary: Primary, *, prepares: bool
    ) -> None:
        self._prepares = prepares
        self._primary = primary
        self._connect = connect
        self._shown = shown
        self._idle: dict[Any, deque[psycopg.AsyncConnection[Any]]] = {}
        self._closed = False
        self._pid = os.getpid()

    async def take(self, loop: Any) -> psycopg.AsyncConnection[Any]:
        """A connection for the running ``loop``. Raises `BrokerError`."""
        refuse_forked(self._pid, self._shown)
        idle = self._idle.setdefault(loop, deque())
        while not self._closed:
            if not idle:
                return await self._made()
            connection = idle.pop()
            if is_alive(connection):
                return connection
            await connection.close()
        raise ConfigurationError(f"{self._shown}: already closed")

    async def _made(self) -> psycopg.AsyncConnection[Any]:
        try:
            connection = await self._connect()
        except psycopg.Error as error:
            raise broker_error(error, self._shown) from hide(error)
        require_idle(connection, self._shown)
        await connection.set_autocommit(True)
        connection.prepared_max = _PREPARED
        try:
            await self._primary.agreet(connection)
        except BaseException:
            await connection.close()
            raise
        _follow(connection, self._prepares)
        return connection

    async def give_back(
        self, connection: psycopg.AsyncConnection[Any], loop: Any, *, in_doubt: bool
    ) -> None:
        """It is free again; in doubt it is closed. Never raises."""
        if in_doubt or self._closed or connection.closed:
            with contextlib.suppress(psycopg.Error):
                await connection.close()
        else:
            self._idle.setdefault(loop, deque()).append(connection)

    def close(self) -> None:
        """Close those that are idle, without their loops: these may have ended."""
        self._closed = True
        if os.getpid() == self._pid:
            for idle in self._idle.values():
                while idle:
                    # What AsyncConnection.close awaits is nothing but this.
                    idle.pop().pgconn.finish()


def source_of(database: Any) -> tuple[Source, str]:
    """The connections of a URL, a pool, or a function that makes one; and how to name it."""
    if isinstance(database, str):
        address = Address.of(database)
        source = OwnSource(lambda: connected(address), address.shown, address.said, address.each())
        return source, address.shown
    shown = f"PostgreSQL ({type(database).__name__})"
    if callable(getattr(database, "getconn", None)):
        return PoolSource(database, shown), shown
    if callable(database):
        return OwnSource(cast(Connect, database), shown), shown
    raise ConfigurationError(
        f"{type(database).__name__} gives no connections to PostgreSQL: name a URL, a "
        "psycopg_pool.ConnectionPool, or a function that returns a psycopg.Connection"
    )


def async_source_of(database: Any, shown: str, beside: Source) -> AsyncSource | None:
    """The async connections of a URL or of a function that makes one, beside the blocking ones;
    None: it makes none.
    """
    primary, prepares = beside.primary, beside.prepares
    if isinstance(database, str):
        address = Address.of(database)
        return AsyncSource(lambda: aconnected(address), shown, primary, prepares=prepares)
    if callable(getattr(database, "getconn", None)):
        # The pool's own are blocking ones; async ones are made as it makes those.
        given = dict(getattr(database, "kwargs", None) or {})
        return AsyncSource(
            lambda: psycopg.AsyncConnection.connect(database.conninfo, **given),
            shown,
            primary,
            prepares=prepares,
        )
    if database is None:
        return None
    return AsyncSource(cast(AsyncConnect, database), shown, primary, prepares=prepares)


def connected(address: Address) -> psycopg.Connection[Any]:
    """A new connection. Raises the driver's error."""
    return psycopg.connect(**address.parameters, autocommit=True)


async def aconnected(address: Address) -> psycopg.AsyncConnection[Any]:
    """The same for the running loop."""
    return await psycopg.AsyncConnection.connect(**address.parameters, autocommit=True)


def _follow(connection: Any, prepares: bool) -> None:
    """A session that is lent by the transaction does not know what another one prepared."""
    if not prepares:
        connection.prepare_threshold = None


def is_alive(connection: Any) -> bool:
    """Whether an idle connection is still usable, as far as can be told without asking.

    A server that went away has sent its goodbye, and behind that the end of the stream, which is
    another thing to read.
    """
    if connection.closed:
        return False
    try:
        connection.pgconn.consume_input()
        connection.pgconn.consume_input()
    except psycopg.Error:
        return False
    status = connection.info.transaction_status
    return not connection.closed and status == TransactionStatus.IDLE


def require_idle(connection: Any, shown: str) -> None:
    """Refuse what a function made that is no new connection of the driver."""
    if not isinstance(connection, psycopg.Connection | psycopg.AsyncConnection):
        raise ConfigurationError(
            f"{shown}: the function returned a {type(connection).__name__}, not a psycopg "
            "connection"
        )
    if connection.info.transaction_status != TransactionStatus.IDLE:
        raise ConfigurationError(
            f"{shown}: the function returned a connection with an open transaction; each of "
            "duly's has to be its own"
        )


def close_quietly(connection: psycopg.Connection[Any]) -> None:
    """Close, whatever state it is in; an open transaction is rolled back by that."""
    with contextlib.suppress(psycopg.Error):
        connection.close()


def hide(error: psycopg.Error) -> psycopg.Error | None:
    """The error as a cause to be shown; none where it may quote a connection string."""
    return error if "://" not in str(error) and "password=" not in first_line(error) else None


def refuse_forked(pid: int, shown: str) -> None:
    """Raise where this process was forked from the one that opened the connections."""
    if os.getpid() != pid:
        raise ConfigurationError(
            f"{shown}: opened in the process that forked this one, and connections cannot be "
            "shared. Open it here: give the app a URL."
        )

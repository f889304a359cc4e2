"""URLs to brokers and stores: the only module that knows them all. Drivers are imported late.

==========================  =================================================================
``sqlite:///shop.db``       the file ``shop.db`` below the current directory, broker and store
``sqlite:////data/s.db``    four slashes: an absolute path
``...?namespace=staging``   tables of its own in the same file
``postgresql://host/shop``  the database ``shop``, broker and store; libpq's options may follow
``...?schema=staging``      tables of its own in the same database
``amqp://host/vhost``       RabbitMQ, a broker only; ``amqps://``: by TLS, verified
``...?namespace=staging``   exchanges and queues of its own in the same virtual host
``kafka://host:9092``       Kafka, a broker; several hosts may be named; without a store its own
                            transactions are one that covers what is published
``...?namespace=staging``   topics and groups of its own on the same cluster
``memory://``               one database in this process, broker and store
``memory://?kind=log``      an ordered log in this process; its store is another one in memory
``memory://?kind=queue``    a queue in this process; likewise
==========================  =================================================================
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from duly.broker import Broker
from duly.errors import ConfigurationError
from duly.store import Store


def open_broker(broker: Any) -> Broker:
    """The broker this URL names; an open `Broker` is returned as it is.

    Raises `ConfigurationError` for a URL that names none, `BrokerUnusable` for what it names.
    """
    if not isinstance(broker, str):
        if callable(getattr(broker, "subscribe", None)):
            return broker  # type: ignore[no-any-return]
        if callable(broker) or callable(getattr(broker, "getconn", None)):
            return _postgres_broker_on(broker)
        raise ConfigurationError(
            f"broker={type(broker).__name__}: give a URL, such as sqlite:///shop.db, a "
            "psycopg_pool.ConnectionPool, a function that returns a psycopg.Connection, or a Broker"
        )
    return _named(broker, "broker").open_broker(_Url.of(broker))


def open_store(store: Any, broker: Broker) -> Store | None:
    """The store this URL names; an open `Store` is returned as it is.

    None: the broker's own database where it is one, and Kafka's own transactions, which cover no
    rows. For a broker in memory that is none, a store in memory, which dies with it too. None for
    any other: then exactly-once consumers are refused. Raises `ConfigurationError`,
    `BrokerUnusable`.
    """
    if store is None:
        return _store_of(broker)
    if not isinstance(store, str):
        if callable(getattr(store, "begin", None)) and hasattr(store, "publish_within"):
            return store  # type: ignore[no-any-return]
        if callable(store) or callable(getattr(store, "getconn", None)):
            return _postgres_store_on(store, broker)
        raise ConfigurationError(
            f"store={type(store).__name__}: give a URL, such as sqlite:///effects.db, a "
            "psycopg_pool.ConnectionPool, a function that returns a psycopg.Connection, or a Store"
        )
    return _named(store, "store").open_store(_Url.of(store), broker)


def adopt(broker: str) -> None:
    """Go on with the log at this URL, which was restored there from another PostgreSQL cluster.

    Raises `ConfigurationError` for a URL of anything else, and what opening it raises.
    """
    url = _Url.of(broker)
    if _named(broker, "broker").open_broker is not _postgres_broker:
        raise ConfigurationError(f"{url.shown!r}: only a log in PostgreSQL is ever adopted")
    from duly.brokers.postgres import PostgresBroker

    PostgresBroker.adopt(url.without("schema"), schema=url.options.get("schema", "duly"))


# --- URLs

_SECRET = re.compile(r"(?i)([?&;][^=&;]*(?:pass|pwd|secret|token|key|sig|cred|auth)[^=&;]*=)[^&;]*")
# Another URL with a login in it, as the value of an option.
_LOGIN = re.compile(r"(?i)([?&;][^=&;]*=)[^&;]*(?:@|%40)[^&;]*")


def redacted(url: str) -> str:
    """The URL as it may be shown: without password and without secret options.

    Rather too much is hidden than too little, since a password with unquoted ``/``, ``#`` or
    ``@`` in it is no proper URL: everything from the first colon to the last ``@``.
    """
    scheme, slashes, rest = url.partition("://")
    if not slashes:
        # Not a URL at all; nothing in it is known to be harmless, save when it looks like a path.
        return url if re.fullmatch(r"[\w./~ -]*", url) else "***"
    login, at, place = rest.rpartition("@")
    if at:
        user, colon, _ = login.partition(":")
        # Without a colon what stands there may be a token.
        rest = f"{user}:***@{place}" if colon else f"***@{place}"
    return _LOGIN.sub(r"\1***", _SECRET.sub(r"\1***", f"{scheme}{slashes}{rest}"))


@dataclass(frozen=True, slots=True)
class _Url:
    """A URL in its parts; ``shown`` is how it may appear in an error, ``given`` must not."""

    given: str = field(repr=False)
    shown: str
    host: str
    path: str
    options: Mapping[str, str]

    @classmethod
    def of(cls, url: str) -> _Url:
        shown = redacted(url)
        try:
            parts = urlsplit(url)
            options = _options(parts, shown)
        except ValueError:
            # The reason would quote the URL, and with it the password.
            raise ConfigurationError(f"{shown!r} is not a proper URL") from None
        if parts.fragment or url.endswith("#"):
            raise ConfigurationError(f"{shown!r}: write '#' as %23, it would end the URL")
        return cls(url, shown, parts.netloc, unquote(parts.path), options)

    def only(self, *known: str) -> None:
        """Refuse options that nobody would honour."""
        for name in self.options:
            if name not in known:
                there = f"there are {', '.join(known)}" if known else "it has none"
                raise ConfigurationError(f"{self.shown!r}: no option {name!r}; {there}")

    def without(self, *names: str) -> str:
        """The URL as it was given, without these options of duly's."""
        place, _, query = self.given.partition("?")
        kept = [pair for pair in query.split("&") if pair.partition("=")[0] not in names]
        return f"{place}?{'&'.join(kept)}" if any(kept) else place


def _options(parts: SplitResult, shown: str) -> Mapping[str, str]:
    pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    options = dict(pairs)
    if len(options) < len(pairs):
        raise ConfigurationError(f"{shown!r}: an option is given twice")
    return options


# --- what each scheme names


@dataclass(frozen=True, slots=True)
class _Scheme:
    open_broker: Callable[[_Url], Broker]
    open_store: Callable[[_Url, Broker], Store]


def _named(url: str, what: str) -> _Scheme:
    scheme, slashes, _ = url.partition("://")
    found = _SCHEMES.get(scheme.lower()) if slashes else None
    if found is None:
        hint = ""
        if not slashes and url.endswith((".db", ".sqlite", ".sqlite3")):
            hint = f". For a file, write sqlite:///{redacted(url)}"
        raise ConfigurationError(
            f"no {what} is named {redacted(url)!r}: there are "
            f"{', '.join(f'{name}://' for name in _SCHEMES)}{hint}"
        )
    return found


def _sqlite_path(url: _Url, *known: str) -> Path:
    url.only(*known)
    path = url.path.removeprefix("/")
    if url.host or not path:
        raise ConfigurationError(
            f"{url.shown!r}: three slashes and a path (sqlite:///shop.db), or four for an "
            "absolute one (sqlite:////data/shop.db)"
        )
    if path == ":memory:":
        raise ConfigurationError(
            f"{url.shown!r}: SQLite's memory belongs to one connection, a broker needs several; "
            "use memory://"
        )
    return Path(path).absolute()


def _sqlite_broker(url: _Url) -> Broker:
    from duly.brokers.sqlite import SQLiteBroker

    path = _sqlite_path(url, "namespace")
    return SQLiteBroker(path, namespace=_namespace(url))


def _namespace(url: _Url) -> str:
    """The namespace a URL names; "" where it names none."""
    if url.options.get("namespace") == "":
        raise ConfigurationError(f"{url.shown!r}: namespace= is empty; name one, or leave it out")
    return url.options.get("namespace", "")


def _sqlite_store(url: _Url, broker: Broker) -> Store:
    from duly.stores.sqlite import SQLiteStore

    path, namespace = _sqlite_path(url, "foreign_keys", "namespace"), _namespace(url)
    _refuse_other_namespace(url, path, namespace, broker)
    switch = url.options.get("foreign_keys", "off")
    if switch not in ("on", "off"):
        raise ConfigurationError(f"{url.shown!r}: foreign_keys={switch!r}; there are on, off")
    database = broker.capabilities.database
    return SQLiteStore(
        path, broker_database=database, namespace=namespace, foreign_keys=switch == "on"
    )


def _refuse_other_namespace(url: _Url, path: Path, namespace: str, broker: Broker) -> None:
    """In one file they would be taken for two databases, and pay for it with an outbox."""
    from duly.brokers.sqlite import SQLiteBroker

    if not isinstance(broker, SQLiteBroker) or broker.file.path != path.resolve():
        return
    if broker.file.namespace != namespace:
        raise ConfigurationError(
            f"{url.shown!r}: the broker is in this file under the namespace "
            f"{broker.file.namespace!r} and the store under {namespace!r}: give both the same"
        )


def _postgres_broker(url: _Url) -> Broker:
    return _postgres_broker_on(url.without("schema"), schema=url.options.get("schema", "duly"))


def _postgres_broker_on(database: Any, *, schema: str = "duly") -> Broker:
    try:
        from duly.brokers.postgres import PostgresBroker
    except ModuleNotFoundError as missing:
        raise _without_driver(missing) from missing
    return PostgresBroker(database, schema=schema)


def _without_driver(missing: ModuleNotFoundError) -> ConfigurationError:
    return ConfigurationError(
        f"PostgreSQL needs the driver psycopg ({missing}): pip install 'duly[postgres]'"
    )


def _postgres_store(url: _Url, broker: Broker) -> Store:
    return _postgres_store_on(
        url.without("schema", "isolation"),
        broker,
        schema=url.options.get("schema", "duly"),
        isolation=url.options.get("isolation", "read committed"),
    )


def _postgres_store_on(
    database: Any, broker: Broker, *, schema: str = "duly", isolation: str = "read committed"
) -> Store:
    try:
        from duly.stores.postgres import ISOLATIONS, PostgresStore
    except ModuleNotFoundError as missing:
        raise _without_driver(missing) from missing
    if isolation not in ISOLATIONS:
        raise ConfigurationError(f"isolation={isolation!r}: there are {', '.join(ISOLATIONS)}")
    return PostgresStore(
        database,
        schema=schema,
        isolation=ISOLATIONS[isolation],
        broker_database=broker.capabilities.database,
        log=getattr(broker, "log", None),
    )


def _rabbitmq_broker(url: _Url) -> Broker:
    try:
        from duly.brokers.rabbitmq import RabbitMQBroker
    except ModuleNotFoundError as missing:
        raise ConfigurationError(
            f"RabbitMQ needs the driver amqp ({missing}): pip install 'duly[rabbitmq]'"
        ) from missing
    return RabbitMQBroker(url.given, shown=url.shown)


def _kafka_broker(url: _Url) -> Broker:
    try:
        from duly.brokers.kafka import KafkaBroker
    except ModuleNotFoundError as missing:
        raise ConfigurationError(
            f"Kafka needs the driver confluent-kafka ({missing}): pip install 'duly[kafka]'"
        ) from missing
    return KafkaBroker(url.given, shown=url.shown)


def _no_store(url: _Url, _: Broker) -> Store:
    raise ConfigurationError(
        f"{url.shown!r} is a broker and keeps no effects: name a database as the store, such as "
        "sqlite:///effects.db or postgresql://..."
    )


def _memory_broker(url: _Url) -> Broker:
    from duly.brokers import memory

    _nothing_but(url)
    kinds: Mapping[str, Callable[[], Broker]] = {
        "database": memory.MemoryDatabase,
        "log": memory.MemoryLog,
        "queue": memory.MemoryQueue,
    }
    kind = url.options.get("kind", "database")
    if kind not in kinds:
        raise ConfigurationError(f"{url.shown!r}: kind={kind!r}; there are {', '.join(kinds)}")
    return kinds[kind]()


def _memory_store(url: _Url, broker: Broker) -> Store:
    from duly.brokers.memory import MemoryDatabase
    from duly.stores.memory import MemoryStore

    _nothing_but(url, "kind")
    # "memory://" for both is one database, as the same file is with SQLite.
    return MemoryStore(broker if isinstance(broker, MemoryDatabase) else None)


def _nothing_but(url: _Url, *refused: str) -> None:
    url.only(*({"kind"} - set(refused)))
    if url.host or url.path.strip("/"):
        raise ConfigurationError(f"{url.shown!r}: a database in memory has no name: memory://")


_SCHEMES: Mapping[str, _Scheme] = {
    "sqlite": _Scheme(_sqlite_broker, _sqlite_store),
    "postgresql": _Scheme(_postgres_broker, _postgres_store),
    "postgres": _Scheme(_postgres_broker, _postgres_store),
    "amqp": _Scheme(_rabbitmq_broker, _no_store),
    "amqps": _Scheme(_rabbitmq_broker, _no_store),
    "kafka": _Scheme(_kafka_broker, _no_store),
    "memory": _Scheme(_memory_broker, _memory_store),
}


def _store_of(broker: Broker) -> Store | None:
    from duly.brokers.memory import MemoryDatabase, MemoryLog, MemoryQueue
    from duly.stores.memory import MemoryStore

    if isinstance(broker, MemoryDatabase):
        return MemoryStore(broker)
    if isinstance(broker, MemoryLog | MemoryQueue):
        return MemoryStore()
    from duly.brokers.sqlite import SQLiteBroker
    from duly.stores.sqlite import SQLiteStore

    if isinstance(broker, SQLiteBroker):
        return SQLiteStore(
            broker.file.path,
            broker_database=broker.capabilities.database,
            namespace=broker.file.namespace,
        )
    # By their names: their drivers may not be installed.
    if broker.capabilities.name == "PostgreSQL":
        return _postgres_store_of(broker)
    if broker.capabilities.name == "Kafka":
        return _kafka_store_of(broker)
    return None


def _kafka_store_of(broker: Broker) -> Store | None:
    from duly.brokers.kafka import KafkaBroker

    return broker.own_store() if isinstance(broker, KafkaBroker) else None


def _postgres_store_of(broker: Broker) -> Store | None:
    from duly.brokers.postgres import PostgresBroker

    if not isinstance(broker, PostgresBroker):
        return None
    return _postgres_store_on(broker.database.named, broker, schema=broker.database.schema)

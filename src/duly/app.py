"""`App`: consumers, what is published, and the broker and store they share, under one name."""

from __future__ import annotations

import atexit
import inspect
import os
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
)
from datetime import datetime
from typing import Any, Self, TypeVar, cast

from duly.backends import Backends
from duly.broker import Broker
from duly.consumer import Consumer
from duly.declarations import Declarations, Group
from duly.errors import ConfigurationError
from duly.events import Watcher
from duly.guarantees import Guarantee
from duly.message import Message, Topic, check_name, checked_topic, due_ms
from duly.operations import Operations
from duly.publishing import Accepted, Publisher, refuse_delays, refuse_on_loop
from duly.schedules import Timetable
from duly.stamps import Headers, Stamp, stamped
from duly.store import Declare, Store, Transaction
from duly.transactions import atransaction, transaction

T = TypeVar("T")
Lifespan = Callable[["App"], AbstractContextManager[Any] | AbstractAsyncContextManager[Any]]
Wrapper = Callable[[Consumer, Callable[..., Any]], Callable[..., Any]]
"""Given a consumer and its handler, with its dependencies bound, what is called in its place."""
AnyLifespan = Lifespan | Callable[["App"], Iterator[Any]] | Callable[["App"], AsyncIterator[Any]]

_AT_MOST_ONCE = Guarantee.AT_MOST_ONCE


class App(Declarations, Operations, Timetable):
    """An application: its consumers and what it publishes, under a name.

    ``name`` is the ``source`` of every message it publishes: the same in all its processes,
    and no other app's. ``broker`` is a URL (``sqlite:///shop.db``) or an open `Broker`;
    ``store`` likewise, and where it is left out the broker's own database. Both are opened when
    first used. ``lifespan`` is a function of the app that returns a context manager, sync or
    async, within which a worker runs. ``watchers`` are shown every `duly.events` value; its
    attributes ``stamps`` add headers to what it publishes (`duly.stamps`) and ``wrappers`` are put
    around its handlers, the first innermost, when a worker is made.
    ``overrides`` maps a dependency's factory to another one, for tests. Raises
    `ConfigurationError`.
    """

    def __init__(
        self,
        name: str,
        broker: Any = None,
        store: Any = None,
        *,
        lifespan: AnyLifespan | None = None,
        watchers: Iterable[Watcher] = (),
    ) -> None:
        Declarations.__init__(self)
        Timetable.__init__(self)
        check_name("app", name)
        self.name = name
        self.lifespan = _context_manager(lifespan)
        self.watchers: list[Watcher] = list(watchers)
        self.stamps: list[Stamp] = []
        self.wrappers: list[Wrapper] = []
        self.overrides: dict[Callable[..., Any], Callable[..., Any]] = {}
        self._backends = Backends(name, broker, store, lambda: self.consumers)
        self._publisher = Publisher(self._backends, self.watchers)
        _apps.add(self)

    @classmethod
    def from_env(cls, name: str, **options: Any) -> Self:
        """An app whose broker and store are named by DULY_BROKER and DULY_STORE."""
        broker = os.environ.get("DULY_BROKER", "").strip()
        if not broker:
            raise ConfigurationError(
                "DULY_BROKER is not set: give the broker's URL, such as sqlite:///shop.db"
            )
        return cls(name, broker, os.environ.get("DULY_STORE", "").strip() or None, **options)

    def __repr__(self) -> str:
        return f"<duly.App {self.name!r}: {len(self.consumers)} consumers>"

    # --- what it is made of

    def include(self, group: Group) -> None:
        """Take over the group's consumers and schedules. Raises `ConfigurationError` where a name
        is taken; then nothing is taken over.
        """
        if not isinstance(group, Group):
            raise ConfigurationError(f"app.include({group!r}): give a duly.Group")
        taken = {consumer.name for consumer in self.consumers}
        for consumer in group.consumers:
            if consumer.name in taken:
                raise ConfigurationError(
                    f"app {self.name!r} has a consumer {consumer.name!r}, and so has the group "
                    "it includes. A name is one subscription: rename one of them."
                )
        for schedule in group.schedules:
            self._free(schedule.name)
        for consumer in group.consumers:
            self._add(consumer)
        for schedule in group.schedules:
            self._schedules[schedule.name] = schedule

    @property
    def topics(self) -> Sequence[Topic[Any]]:
        """Every topic that a consumer reads, a schedule feeds, or that was published to so far."""
        for consumer in self.consumers:
            for topic in consumer.topics:
                self._backends.know(topic)
        for schedule in self.schedules:
            self._backends.know(schedule.topic)
        return tuple(self._backends.topics)

    def declare(self, *topics: Topic[Any]) -> None:
        """Name topics that are only published to, so that the contract covers them."""
        for topic in topics:
            self._backends.know(checked_topic(topic))

    def backends(self) -> tuple[Broker, Store | None]:
        """The broker and the store, opened when first asked for, with every topic made known.

        Raises `ConfigurationError`, `BrokerError`.
        """
        return self._backends.get(self.topics)

    def look(self) -> tuple[Broker, Store | None]:
        """As `backends`, for who only looks: nothing is made where the broker can do without."""
        return self._backends.look(self.topics)

    @property
    def drops(self) -> Mapping[str, int]:
        """How many at-most-once messages this process dropped instead of sending, by topic."""
        return self._publisher.drops

    def close(self, timeout_s: float = 5.0) -> None:
        """Send what is buffered, for up to ``timeout_s`` seconds, and close what was opened.

        What could not be sent is dropped and counted. Publishing again opens again.
        """
        self._publisher.close(timeout_s)
        self._backends.close()

    async def aclose(self, timeout_s: float = 5.0) -> None:
        """`close`, without stopping the event loop."""
        import asyncio

        await asyncio.to_thread(self.close, timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    # --- publishing

    def publish(
        self,
        topic: Topic[T],
        payload: T,
        *,
        id: str | None = None,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        delay_s: float | None = None,
        due: datetime | None = None,
        within: Any = None,
    ) -> Accepted:
        """Publish one message; durable on return, unless its topic is at-most-once.

        - ``id`` names the event: a repeat on an exactly-once topic is dropped and reported as
          `RepeatDropped`. Left out, it is made here.
        - ``key`` orders it among its like; left out, the topic's ``key`` function gives it.
        - ``headers`` are further CloudEvents attributes, such as ``traceparent``.
        - ``delay_s`` or ``due``: not to be delivered before.
        - ``within``: a transaction of the caller's that the message becomes part of, from
          `transaction` or a driver's own connection to the store's database. What is returned
          is true when that commits.

        An at-most-once message is buffered and sent in the background: this never waits for the
        broker and raises nothing about it; the return value says whether there was room.

        Raises `PublishFailed` (`InvalidMessage`, `MessageTooLarge`, `IdentityConflict`) where
        the message is certainly not stored, and `PublishUnknown` where it may be: publish again
        with ``id=error.message_id``, and on an exactly-once topic it is stored once. Raises
        `ConfigurationError` on a running event loop's thread (use `apublish`) and inside a
        transaction on the same database (use ``tx.publish``).
        """
        message = checked_topic(topic).message(
            payload,
            source=self.name,
            id=id,
            key=key,
            headers=self._stamped(topic, headers),
            due_ms=due_ms(topic.name, delay_s, due),
        )
        if within is None:
            return self._publisher.send(topic, message)
        return self._publisher.send_within(within, topic, (message,))[0]

    async def apublish(
        self,
        topic: Topic[T],
        payload: T,
        *,
        id: str | None = None,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        delay_s: float | None = None,
        due: datetime | None = None,
        within: Any = None,
    ) -> Accepted:
        """`publish` for ``async def``: what tasks publish at the same time shares one commit.

        Cancelled while it waits, it is not known whether the message is stored, as after
        `PublishUnknown`; give an ``id`` where that matters. Nobody else's message is affected.
        """
        message = checked_topic(topic).message(
            payload,
            source=self.name,
            id=id,
            key=key,
            headers=self._stamped(topic, headers),
            due_ms=due_ms(topic.name, delay_s, due),
        )
        if within is None:
            return await self._publisher.asend(topic, message)
        return (await self._publisher.asend_within(within, topic, (message,)))[0]

    def publish_many(
        self,
        topic: Topic[T],
        payloads: Iterable[T],
        *,
        ids: Sequence[str] | None = None,
        keys: Sequence[str | None] | None = None,
        headers: Mapping[str, str] | None = None,
        delay_s: float | None = None,
        due: datetime | None = None,
        within: Any = None,
    ) -> Sequence[Accepted]:
        """Publish many messages of one topic, in order; one outcome each.

        All are checked before the first is sent. They are stored in portions, not all or
        nothing: for that, give ``within``. Raises `PublishIncomplete` with every outcome where
        some did not succeed, and else what `publish` raises.
        """
        if checked_topic(topic).promise is not _AT_MOST_ONCE and within is None:
            refuse_on_loop("app.publish_many", "await app.apublish_many(...)")
        return self._publish_many(
            topic, payloads, ids, keys, headers, due_ms(topic.name, delay_s, due), within
        )

    async def apublish_many(
        self,
        topic: Topic[T],
        payloads: Iterable[T],
        *,
        ids: Sequence[str] | None = None,
        keys: Sequence[str | None] | None = None,
        headers: Mapping[str, str] | None = None,
        delay_s: float | None = None,
        due: datetime | None = None,
        within: Any = None,
    ) -> Sequence[Accepted]:
        """`publish_many` for ``async def``, on a thread; cancelled, it goes on there."""
        due_at = due_ms(checked_topic(topic).name, delay_s, due)
        if within is not None:
            headers = self._stamped(topic, headers)
            messages = topic.messages(
                payloads, source=self.name, ids=ids, keys=keys, headers=headers, due_ms=due_at
            )
            return await self._publisher.asend_within(within, topic, messages)
        call = self._publish_many, topic, payloads, ids, keys, headers, due_at, None
        return await self._publisher.threads.run("publish", *call)

    def _publish_many(
        self,
        topic: Topic[T],
        payloads: Iterable[T],
        ids: Sequence[str] | None,
        keys: Sequence[str | None] | None,
        headers: Mapping[str, str] | None,
        due_at: int | None,
        within: Any,
    ) -> Sequence[Accepted]:
        headers = self._stamped(topic, headers)
        messages = topic.messages(
            payloads, source=self.name, ids=ids, keys=keys, headers=headers, due_ms=due_at
        )
        if within is None:
            return self._publisher.send_many(topic, messages)
        return self._publisher.send_within(within, topic, messages)

    def _stamped(self, topic: Topic[Any], headers: Headers) -> Headers:
        return stamped(self.stamps, topic.name, headers) if self.stamps else headers

    # --- the caller's own transactions

    def transaction(self) -> AbstractContextManager[Transaction[Any]]:
        """A transaction of the store: ``with app.transaction() as tx``.

        What is written through ``tx.connection`` and published through ``tx.publish`` becomes
        true together at the end of the block, or not at all where the block raises. Raises
        `ConfigurationError` on a running event loop's thread (use `atransaction`), inside
        another transaction on the same database, and without a store; `TransactionFailed`
        where it was rolled back, `CommitUnknown` where nobody can say.
        """
        refuse_on_loop("app.transaction()", "async with app.atransaction() as tx")
        backends = self.backends()
        store = _store_of(self.name, backends)
        return transaction(store, self.name, declare_at(*backends), self.stamps)

    @asynccontextmanager
    async def atransaction(self) -> AsyncIterator[Transaction[Any]]:
        """The same for ``async with``; begun and committed on a thread.

        The connection is the driver's: its calls are as blocking as it is.
        """
        threads = self._publisher.threads
        backends = await threads.run("begin", self.backends)
        store = _store_of(self.name, backends)
        declare = declare_at(*backends)
        async with atransaction(store, self.name, declare, threads, self.stamps) as tx:
            yield tx


def _context_manager(lifespan: Any) -> Lifespan | None:
    """A lifespan that forgot its decorator is meant all the same."""
    if inspect.isgeneratorfunction(lifespan):
        return contextmanager(lifespan)
    if inspect.isasyncgenfunction(lifespan):
        return asynccontextmanager(lifespan)
    if lifespan is None:
        return None
    if callable(lifespan) and not inspect.iscoroutinefunction(lifespan):
        return cast("Lifespan", lifespan)
    raise ConfigurationError(
        f"lifespan={lifespan!r}: give a function of the app with one yield in it: what comes "
        "before runs when a worker starts, what follows when it ends"
    )


def declare_at(broker: Broker, store: Store | None) -> Declare | None:
    """How the topics that a transaction publishes to become known to the broker; None: the
    transaction does it, for the broker is in the same database.
    """
    if store is None or store.capabilities.database == broker.capabilities.database:
        return None
    known: set[str] = set()

    def declare(topics: Iterable[Topic[Any]], messages: Sequence[Message[Any]]) -> None:
        named = {topic.name: topic for topic in topics}
        refuse_delays(broker, named, messages)
        if new := [topic for name, topic in named.items() if name not in known]:
            broker.declare(new)
            known.update(topic.name for topic in new)

    return declare


def _store_of(app: str, backends: tuple[Broker, Store | None]) -> Store:
    broker, store = backends
    if store is None:
        raise ConfigurationError(
            f"app {app!r} has no store, and {broker.capabilities.name} is no database to write "
            'to. Name one: duly.App(..., store="sqlite:///effects.db").'
        )
    return store


# --- forks

_apps: weakref.WeakSet[App] = weakref.WeakSet()


def _after_fork() -> None:
    for app in list(_apps):
        app._backends.forked()
        app._publisher.forked()


def _at_exit() -> None:
    # Whoever forgot to close: what is buffered gets a moment, not more.
    for app in list(_apps):
        app._publisher.close(timeout_s=1.0)


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)

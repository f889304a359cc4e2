"""The broker and store of an app: opened when first needed, topics made known, closed, forked."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from duly.broker import Broker, Knows, Prepares, SubscribeOptions
from duly.consumer import Consumer
from duly.errors import ConfigurationError
from duly.inspection.graves import Buries, graveyard_of
from duly.message import Topic
from duly.store import Store


class Connect(Protocol):
    """How URLs become backends: `duly.connect`, which stands above this module."""

    def open_broker(self, broker: Any, /) -> Broker:
        """The broker that this URL names; an open one as it is."""
        ...

    def open_store(self, store: Any, broker: Broker, /) -> Store | None:
        """The store that this URL names; None: the broker's own database, where it is one."""
        ...


def connect_by(connect: Callable[[], Connect]) -> None:
    """Say how backends are opened. ``duly/__init__.py`` does, so that nothing here knows one."""
    global _connect  # noqa: PLW0603 - set once, while duly is imported
    _connect = connect


def _nobody() -> Connect:
    raise ConfigurationError("nothing here can open a broker: import duly first")


_connect: Callable[[], Connect] = _nobody


class Backends:
    """What an app's ``broker`` and ``store`` name. Safe to use from any thread.

    A forked child opens its own from the URLs. What the parent had open is neither used nor
    closed there: closing an inherited connection can end what the parent is doing with it.
    """

    def __init__(
        self,
        app: str,
        broker: Any,
        store: Any,
        consumers: Callable[[], Sequence[Consumer]] = tuple,
    ) -> None:
        self._app = app
        self._consumers = consumers
        self._named_broker = broker
        self._named_store = store
        self._lock = threading.RLock()
        self._known: dict[str, Topic[Any]] = {}
        self._open: tuple[Broker, Store | None] | None = None
        self._ready: dict[str, Topic[Any]] = {}
        self._from_parent: list[Any] = []

    @property
    def is_open(self) -> bool:
        """Whether asking for the broker would not wait."""
        return self._open is not None

    @property
    def named(self) -> tuple[Any, Any]:
        """The broker and the store as they were named: URLs, open ones, None."""
        return self._named_broker, self._named_store

    @property
    def topics(self) -> Iterable[Topic[Any]]:
        """The topics asked for so far."""
        return tuple(self._known.values())

    def check(self) -> None:
        """Raise `ConfigurationError` where no broker is named; opens nothing."""
        if self._named_broker is None:
            raise ConfigurationError(
                f"app {self._app!r} has no broker. Name one: duly.App({self._app!r}, "
                'broker="sqlite:///shop.db"), or set DULY_BROKER and use duly.App.from_env'
            )

    def get(self, topics: Iterable[Topic[Any]] = ()) -> tuple[Broker, Store | None]:
        """The broker, with these topics made known to it, and the store.

        Raises `ConfigurationError`, `BrokerError`.
        """
        with self._lock:
            if self._open is None:
                self._open = self._opened()
            new = [topic for topic in topics if self._ready.get(topic.name) is not topic]
            for topic in new:
                self.know(topic)
            if new:
                self._open[0].declare(new)
                self._prepare(self._open[0], new)
                self._ready.update((topic.name, topic) for topic in new)
            return self._open

    def _prepare(self, broker: Broker, topics: Sequence[Topic[Any]]) -> None:
        """Make the subscriptions of the app's consumers, where nothing is kept for later ones:
        who publishes first is not to be told that nobody listens.
        """
        if broker.capabilities.replays or not isinstance(broker, Prepares):
            return
        for consumer in self._consumers():
            names = {topic.name for topic in consumer.topics}
            wanted = [topic for topic in topics if topic.name in names]
            broker.prepare(wanted, consumer.name, _options_of(consumer))

    def look(self, topics: Iterable[Topic[Any]]) -> tuple[Broker, Store | None]:
        """The same for who only looks: where the broker can tell of these topics without, nothing
        is made there.
        """
        broker, store = self.get()
        if not isinstance(broker, Knows):
            return self.get(topics)
        for topic in topics:
            self.know(topic)
        for consumer in self._consumers():
            broker.know(consumer.topics, consumer.name, _options_of(consumer))
        return broker, store

    def broker_for(self, topic: Topic[Any]) -> Broker:
        """The broker, ready for messages of this topic."""
        if self._open is not None and self._ready.get(topic.name) is topic:
            return self._open[0]
        return self.get((topic,))[0]

    def get_named(self, names: Iterable[str]) -> Broker:
        """The broker, ready for messages of these known topics."""
        if self._open is None or not all(name in self._ready for name in names):
            self.get([self._known[name] for name in names])
        return self.get()[0]

    def is_ready_for(self, topic: Topic[Any]) -> bool:
        """Whether `broker_for` would not wait."""
        return self._open is not None and self._ready.get(topic.name) is topic

    def know(self, topic: Topic[Any]) -> None:
        """Remember a topic. Raises `ConfigurationError` where its name means another."""
        known = self._known.setdefault(topic.name, topic)
        if known is topic:
            return
        for what in (
            "type",
            "guarantee",
            "partitions",
            "may_go_unheard",
            "dedup_by",
            "without_identity",
            "versions",
        ):
            was, now = getattr(known, what), getattr(topic, what)
            if was != now:
                raise ConfigurationError(
                    f"app {self._app!r} has two topics named {topic.name!r}: {what}={was!r} and "
                    f"{what}={now!r}. Declare it once, and import it where it is used."
                )

    def close(self) -> None:
        """Close what was opened here. A broker or store that came open stays open."""
        with self._lock:
            opened, self._open = self._open, None
            self._ready.clear()
        if opened is None:
            return
        broker, store = opened
        if store is not None and store is not self._named_store:
            store.close()
        if broker is not self._named_broker:
            broker.close()

    def _opened(self) -> tuple[Broker, Store | None]:
        self.check()
        for named in (self._named_broker, self._named_store):
            if any(named is inherited for inherited in self._from_parent):
                raise ConfigurationError(
                    f"app {self._app!r} was given an open {type(named).__name__} in the process "
                    "that forked this one. It cannot be shared: give a URL, or make the app in "
                    "the child."
                )
        connect = _connect()
        broker = connect.open_broker(self._named_broker)
        try:
            store = connect.open_store(self._named_store, broker)
            graveyard = graveyard_of(store)
            if graveyard is not None and isinstance(broker, Buries):
                broker.bury_in(graveyard)
            return broker, store
        except BaseException:
            if broker is not self._named_broker:
                broker.close()
            raise

    def forked(self) -> None:
        """Forget what the parent process had open; for the child, right after the fork."""
        # Another thread may have held the lock when the process forked.
        self._lock = threading.RLock()
        named = [self._named_broker, self._named_store]
        self._from_parent += [each for each in named if each is not None]
        self._from_parent += [each for each in self._open or () if each is not None]
        self._from_parent = [each for each in self._from_parent if not isinstance(each, str)]
        self._open = None
        self._ready = {}


def _options_of(consumer: Consumer) -> SubscribeOptions:
    """What a subscription that is made beforehand is made with."""
    return SubscribeOptions(
        consumer.guarantee,
        order_by_key=consumer.options.order_by_key,
        hold_key_on_dead=consumer.options.hold_key_on_dead,
        start=consumer.options.start,
        key_lanes=consumer.options.key_lanes,
    )

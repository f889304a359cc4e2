"""`App`: consumers, and the broker and store they share, under one name."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Any, Protocol

from duly.broker import Broker
from duly.declarations import Declarations, Group
from duly.errors import ConfigurationError
from duly.events import Watcher
from duly.message import Topic, check_name
from duly.store import Store

Lifespan = Callable[["App"], AbstractContextManager[Any] | AbstractAsyncContextManager[Any]]


class Connect(Protocol):
    """How URLs become backends: `duly.connect`, which stands above this module."""

    def open_broker(self, broker: Any) -> Broker:
        """The broker that this URL, or what stands for one, names."""
        ...

    def open_store(self, store: Any, broker: Broker) -> Store | None:
        """The store that this names; None: the broker's own database, where it is one."""
        ...


def connect_by(connect: Callable[[], Connect]) -> None:
    """Say how backends are opened. ``duly/__init__.py`` does, so that this module knows none."""
    global _connect  # noqa: PLW0603 - set once, while duly is imported
    _connect = connect


def _connect() -> Connect:
    raise ConfigurationError("import duly, not a part of it: nothing here can open a broker")


class App(Declarations):
    """An application: its consumers and what it publishes, under a name.

    ``name`` is the ``source`` of every message it publishes: the same in all its processes,
    and never another's. ``broker`` is a URL (``sqlite:///shop.db``) or an open `Broker`;
    ``store`` likewise, or a driver's own connection source, and where it is left out the
    broker's database. Both are opened when first used. ``lifespan`` is a function of the app
    that returns a context manager, sync or async, within which a worker runs. ``watchers``
    are shown every `duly.events` value. Raises `ConfigurationError`.
    """

    def __init__(
        self,
        name: str,
        broker: Any = None,
        store: Any = None,
        *,
        lifespan: Lifespan | None = None,
        watchers: Iterable[Watcher] = (),
    ) -> None:
        super().__init__()
        check_name("app", name)
        self.name = name
        self.broker_url = broker
        self.store_url = store
        self.lifespan = lifespan
        self.watchers: list[Watcher] = list(watchers)
        self.overrides: dict[Callable[..., Any], Callable[..., Any]] = {}
        self._lock = threading.RLock()
        self._topics: dict[str, Topic[Any]] = {}
        self._backends: tuple[Broker, Store | None] | None = None

    @classmethod
    def from_env(cls, name: str, **options: Any) -> App:
        """An app whose broker and store are named by DULY_BROKER and DULY_STORE."""
        broker = os.environ.get("DULY_BROKER", "").strip()
        if not broker:
            raise ConfigurationError(
                "DULY_BROKER is not set: give the broker's URL, such as sqlite:///shop.db"
            )
        return cls(name, broker, os.environ.get("DULY_STORE", "").strip() or None, **options)

    def include(self, group: Group) -> None:
        """Take over the group's consumers. Raises `ConfigurationError` where a name is taken."""
        for consumer in group.consumers:
            self._add(consumer)

    @property
    def topics(self) -> Sequence[Topic[Any]]:
        """Every topic that a consumer reads or that was published to, by name."""
        found = dict(self._topics)
        for consumer in self.consumers:
            for topic in consumer.topics:
                found.setdefault(topic.name, topic)
        return tuple(found.values())

    def backends(self) -> tuple[Broker, Store | None]:
        """The broker and the store, opened when first asked for, every known topic declared."""
        with self._lock:
            if self._backends is None:
                if self.broker_url is None:
                    raise ConfigurationError(
                        f"app {self.name!r} has no broker: App({self.name!r}, "
                        'broker="sqlite:///shop.db"), or App.from_env'
                    )
                connect = _connect()
                broker = connect.open_broker(self.broker_url)
                self._backends = broker, connect.open_store(self.store_url, broker)
            return self._backends

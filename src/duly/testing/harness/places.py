"""The broker and store of a test: its own, never those that the application names."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote

from duly import connect
from duly.app import App
from duly.backends import Backends
from duly.broker import Broker
from duly.brokers.memory import MemoryDatabase, MemoryLog, MemoryQueue
from duly.brokers.sqlite import Clock as SQLiteClock
from duly.brokers.sqlite import SQLiteBroker
from duly.errors import ConfigurationError
from duly.publishing import Publisher
from duly.store import Store, parked_of
from duly.stores.memory import MemoryStore
from duly.testing.harness.clock import Clock, MachineClock

_files = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Place:
    """A broker and a store, and the clock that they go by."""

    broker: Broker
    store: Store | None
    clock: Clock


def open_place(
    app: App, broker: Any, store: Any, clock: Clock | None, folder: Path | None, exits: ExitStack
) -> Place:
    """Open what a test asks for; without a broker, what is like the application's own.

    What is opened here is closed by ``exits``; what came open stays open.
    """
    if broker is None:
        if store is not None:
            raise ConfigurationError(
                "running(store=...) without a broker: name both, or neither (then they are of "
                "the kind that the application names, and in its arrangement)"
            )
        broker, store = _like(app, lambda: folder or _temporary(exits))
    if not isinstance(broker, str):
        there = clock or MachineClock()
        opened = connect.open_broker(broker)
        return Place(opened, _open_store(store, opened, there, exits), there)
    ours = clock or Clock()
    made = _open_broker(broker, ours)
    exits.callback(made.close)
    # What came open goes by the machine's time, and then everything has to.
    return Place(made, _open_store(store, made, ours, exits), ours)


def _open_broker(url: str, clock: Clock) -> Broker:
    opened = connect.open_broker(url)
    if not clock.stands_still:
        return opened
    if isinstance(opened, MemoryDatabase | MemoryLog | MemoryQueue):
        return type(opened)(clock=clock, wall_ms=clock.wall_ms)
    if isinstance(opened, SQLiteBroker):
        path = opened.file.path
        opened.close()
        # One clock for all it asks; a name of its own for the boot that leases belong to, for no
        # lease by another clock means anything here.
        ticking = SQLiteClock(clock.wall_ms, clock.wall_ms, lambda: "a test's clock", clock)
        return SQLiteBroker(path, clock=ticking)
    opened.close()
    raise ConfigurationError(
        f"{connect.redacted(url)!r} goes by a clock that a test cannot move: give "
        "clock=duly.testing.MachineClock(), and waiting takes its time"
    )


def _open_store(store: Any, broker: Broker, clock: Clock, exits: ExitStack) -> Store | None:
    opened = connect.open_store(store, broker)
    if opened is None or opened is store:
        return opened
    if isinstance(opened, MemoryStore):
        same = opened.capabilities.database == broker.capabilities.database
        database = broker if same and isinstance(broker, MemoryDatabase) else None
        opened = MemoryStore(database, clock=clock, wall_ms=clock.wall_ms)
    elif clock.stands_still and parked_of(opened) is not None:
        # What is parked in it is due when the test says so.
        go_by: Callable[[Callable[[], int]], None] | None = getattr(opened, "go_by", None)
        if go_by is not None:
            go_by(clock.wall_ms)
    exits.callback(opened.close)
    return opened


@contextmanager
def working_with(
    app: App,
    broker: Broker,
    store: Store | None,
    overrides: Mapping[Callable[..., Any], Callable[..., Any]],
) -> Iterator[None]:
    """The app publishes to, and is worked from, these; afterwards it is as it was before."""
    backends, publisher, before = app._backends, app._publisher, dict(app.overrides)
    # An app without a store is given none: what it cannot do in production it cannot do here.
    app._backends = Backends(app.name, broker, store, lambda: app.consumers)
    for topic in backends.topics:
        app._backends.know(topic)
    app._publisher = Publisher(app._backends, app.watchers)
    app.overrides.update(overrides)
    try:
        yield
    finally:
        try:
            app._publisher.close(5.0)
        finally:
            app._backends, app._publisher = backends, publisher
            app.overrides.clear()
            app.overrides.update(before)


# --- like the application's own


def _like(app: App, folder: Callable[[], Path]) -> tuple[str, str | None]:
    """URLs of the kinds that the app names: the same handlers, and the same admission."""
    broker, store = app._backends.named

    def new_file(of: Any) -> str:
        _, question, options = of.partition("?") if isinstance(of, str) else ("", "", "")
        path = folder() / f"duly-{next(_files)}.db"
        return f"sqlite:///{quote(str(path))}{question}{options}"

    if _kind(broker) == "sqlite":
        url = new_file(broker)
        if store is None:
            return url, None
        if _same_file(store, broker):
            options = store.partition("?")[2] if isinstance(store, str) else ""
            return url, f"{url}?{options}" if options else None
        return url, new_file(store) if _kind(store) == "sqlite" else "memory://"
    url = broker if _kind(broker) == "memory" and isinstance(broker, str) else "memory://"
    return url, new_file(store) if _kind(store) == "sqlite" else None


def _kind(named: Any) -> str:
    if isinstance(named, str):
        return named.partition(":")[0].lower()
    where = type(named).__module__.split(".")
    return where[2] if where[:1] == ["duly"] and len(where) > 2 else ""


def _same_file(store: Any, broker: Any) -> bool:
    if isinstance(store, str) and isinstance(broker, str):
        return store.partition("?")[0] == broker.partition("?")[0]
    if isinstance(store, str) or isinstance(broker, str):
        return False
    same: bool = store.capabilities.database == broker.capabilities.database
    return same


def _temporary(exits: ExitStack) -> Path:
    return Path(exits.enter_context(TemporaryDirectory(prefix="duly-test-")))

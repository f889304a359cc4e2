"""The one place that knows how each backend is opened, aged, crashed and restarted."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from duly.broker import Broker, Capabilities, Delivery, SubscribeOptions, Subscription
from duly.brokers.memory import MemoryDatabase, MemoryLog, MemoryQueue
from duly.brokers.sqlite import SQLiteBroker
from duly.brokers.sqlite.clock import Clock as SQLiteClock
from duly.guarantees import Admission, Done, Guarantee, Settlement
from duly.message import Message, Topic, now_ms
from duly.store import Outbox, Scope, Session, Store, outbox_of
from duly.stores.memory import MemoryStore
from duly.stores.sqlite import SQLiteStore
from duly.stores.sqlite.outbox import SQLiteOutbox

LEASE_S = 30.0
SOURCE = "tests"
A_LOT = 1 << 30


class Clock:
    """Time that passes only when told to. Wall time and monotonic time pass together."""

    def __init__(self) -> None:
        self.now_s = 1_000_000.0
        # Near the present: a store may go by the real clock.
        self._started_ms = now_ms()

    def __call__(self) -> float:
        return self.now_s

    def wall_ms(self) -> int:
        return self._started_ms + int((self.now_s - 1_000_000.0) * 1000)

    def boot_ms(self) -> int:
        return int(self.now_s * 1000)

    def advance(self, seconds: float) -> None:
        self.now_s += seconds


@dataclass
class Backend:
    """One broker under test, with a clock of the test's own."""

    name: str
    open: Callable[[Clock | None], Broker]
    clock: Clock = field(default_factory=Clock)
    broker: Broker = field(init=False)
    topics: list[Topic[Any]] = field(default_factory=list)
    _lanes: list[Subscription] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.broker = self.open(self.clock)

    @property
    def can(self) -> Capabilities:
        return self.broker.capabilities

    def restart(self) -> None:
        """Close the broker and open what it left."""
        self.broker.close()
        self.broker = self.open(self.clock)
        self.broker.declare(self.topics)

    def in_real_time(self) -> None:
        """Go by the real clocks from here on; what was published before may be gone."""
        self.broker.close()
        self.broker = self.open(None)
        self.broker.declare(self.topics)

    def topic(self, name: str = "t", guarantee: Any = "at-least-once", **more: Any) -> Topic[Any]:
        """A declared topic of text messages."""
        if "partitions" in more and not self.can.orders_by_key:
            more["partitions"] = 0
        topic: Topic[Any] = Topic(name, str, guarantee=guarantee, **more)
        self.broker.declare([topic])
        self.topics.append(topic)
        return topic

    def message(self, topic: Topic[Any], body: str, **more: Any) -> Message[Any]:
        """A message as a producer makes it now."""
        return topic.message(body, source=SOURCE, **{"time_ms": self.clock.wall_ms(), **more})

    def publish(self, topic: Topic[Any], *bodies: str, **more: Any) -> list[Message[Any]]:
        """Publish these, and see that they are."""
        messages = [self.message(topic, body, **more) for body in bodies]
        outcomes = self.broker.publish(messages)
        assert [type(outcome).__name__ for outcome in outcomes] == ["Published"] * len(bodies)
        return messages

    def lane(
        self,
        *topics: Topic[Any],
        name: str = "sub",
        guarantee: Guarantee = Guarantee.AT_LEAST_ONCE,
        **more: Any,
    ) -> Subscription:
        """One lane of a subscription."""
        options = SubscribeOptions(guarantee, **{"lease_s": LEASE_S, **more})
        lane = self.broker.subscribe(topics, name, options)
        self._lanes.append(lane)
        return lane

    def fall_silent(self) -> None:
        """Time passes until every lease that was not extended is over."""
        self.clock.advance(LEASE_S + 0.5)


def claim(lane: Subscription, limit: int = 100, max_bytes: int = A_LOT) -> Sequence[Delivery]:
    """What the lane can claim now."""
    return lane.claim(limit, max_bytes, 0.0)


def bodies(deliveries: Sequence[Delivery]) -> list[str]:
    """What the messages say, in the order delivered."""
    return [delivery.message.body.decode() for delivery in deliveries]


def settle_done(lane: Subscription, deliveries: Sequence[Delivery]) -> None:
    """Settle these as done, and see that none is refused."""
    assert list(lane.settle([Done(delivery.receipt) for delivery in deliveries])) == []


def drain(lane: Subscription, limit: int = 100, most: int = 10_000) -> list[str]:
    """Claim and settle until nothing comes; what was handled, in order."""
    handled: list[str] = []
    while deliveries := claim(lane, limit):
        handled += bodies(deliveries)
        settle_done(lane, deliveries)
        assert len(handled) <= most, "it never ends"
    return handled


# --- the brokers


@contextmanager
def memory(kind: type[MemoryDatabase | MemoryLog | MemoryQueue]) -> Iterator[Backend]:
    def open_broker(clock: Clock | None) -> Broker:
        return kind() if clock is None else kind(clock=clock, wall_ms=clock.wall_ms)

    backend = Backend(kind.__name__, open_broker)
    yield backend
    backend.broker.close()


@contextmanager
def sqlite(folder: Path) -> Iterator[Backend]:
    def open_broker(clock: Clock | None) -> Broker:
        path = folder / "broker.db"
        if clock is None:
            return SQLiteBroker(path)
        return SQLiteBroker(
            path, clock=SQLiteClock(clock.wall_ms, clock.boot_ms, lambda: "boot", clock)
        )

    backend = Backend("SQLiteBroker", open_broker)
    yield backend
    backend.broker.close()


BROKERS: Mapping[str, Callable[[Path], Any]] = {
    "memory-database": lambda _: memory(MemoryDatabase),
    "memory-log": lambda _: memory(MemoryLog),
    "memory-queue": lambda _: memory(MemoryQueue),
    "sqlite": sqlite,
}

# Held to it by test_subscriptions: they refuse to be asked for order.
WITHOUT_ORDER = {"memory-queue"}


# --- stores, each with a broker and a way of admission


@dataclass
class Effects:
    """How a test writes rows through a store's connection, and reads what is committed."""

    insert: Callable[[Any, str, str], None]
    rows: Callable[[], dict[str, str]]


@dataclass
class Place:
    """A store beside a broker, with one way of admission."""

    backend: Backend
    store: Store
    admission: Admission
    effects: Effects

    def begin(self, consumer: str = "sub", **more: Any) -> Session[Any]:
        """A transaction of one consumer."""
        return self.store.begin(Scope(consumer, self.admission, **more))

    def settle(self, lane: Subscription, settlements: Sequence[Settlement]) -> None:
        """Tell the broker, where the commit has not settled already."""
        if self.admission is not Admission.BY_CLAIM:
            assert list(lane.settle(settlements)) == []

    def outputs(self, topic: Topic[Any]) -> list[str]:
        """What transactions have published to a topic and nobody has taken yet."""
        outbox = outbox_of(self.store)
        if self.admission is Admission.BY_CLAIM:
            lane = self.backend.lane(topic, name="reader-of-outputs")
            published = drain(lane)
            lane.close()
            return published
        assert outbox is not None
        unsent = outbox.unsent(1000, A_LOT, 0.0)
        outbox.sent([outgoing.position for outgoing in unsent])
        return [outgoing.message.body.decode() for outgoing in unsent]


def memory_effects(store: MemoryStore) -> Effects:
    return Effects(
        insert=lambda connection, key, value: connection.insert("effects", key, value),
        rows=lambda: {str(key): value for key, value in store.rows("effects").items()},
    )


def sqlite_effects(path: Path) -> Effects:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("create table effects (key text primary key, value text)")

    def rows() -> dict[str, str]:
        with closing(sqlite3.connect(path)) as connection:
            return dict(connection.execute("select key, value from effects"))

    return Effects(
        insert=lambda connection, key, value: connection.execute(
            "insert into effects values (?, ?)", (key, value)
        ),
        rows=rows,
    )


@contextmanager
def memory_by_claim() -> Iterator[Place]:
    with memory(MemoryDatabase) as backend:
        assert isinstance(backend.broker, MemoryDatabase)
        store = MemoryStore(
            backend.broker, clock=backend.clock, wall_ms=backend.clock.wall_ms, begin_s=0.01
        )
        yield Place(backend, store, Admission.BY_CLAIM, memory_effects(store))
        store.close()


@contextmanager
def memory_apart(kind: type[MemoryLog | MemoryQueue], admission: Admission) -> Iterator[Place]:
    with memory(kind) as backend:
        store = MemoryStore(clock=backend.clock, wall_ms=backend.clock.wall_ms, begin_s=0.01)
        yield Place(backend, store, admission, memory_effects(store))
        store.close()


@contextmanager
def sqlite_by_claim(folder: Path) -> Iterator[Place]:
    with sqlite(folder) as backend:
        path = folder / "broker.db"
        store = SQLiteStore(path, broker_database=backend.can.database, begin_s=0.05)
        yield Place(backend, store, Admission.BY_CLAIM, sqlite_effects(path))
        store.close()


@contextmanager
def sqlite_apart(
    folder: Path, kind: type[MemoryLog | MemoryQueue], admission: Admission
) -> Iterator[Place]:
    with memory(kind) as backend:
        path = folder / "effects.db"
        store = SQLiteStore(path, begin_s=0.05)
        yield Place(backend, store, admission, sqlite_effects(path))
        store.close()


PLACES: Mapping[str, Callable[[Path], Any]] = {
    "memory-by-claim": lambda _: memory_by_claim(),
    "memory-log-by-cursor": lambda _: memory_apart(MemoryLog, Admission.BY_CURSOR),
    "memory-log-by-inbox": lambda _: memory_apart(MemoryLog, Admission.BY_INBOX),
    "memory-queue-by-inbox": lambda _: memory_apart(MemoryQueue, Admission.BY_INBOX),
    "sqlite-by-claim": sqlite_by_claim,
    "sqlite-by-cursor": lambda folder: sqlite_apart(folder, MemoryLog, Admission.BY_CURSOR),
    "sqlite-by-inbox": lambda folder: sqlite_apart(folder, MemoryQueue, Admission.BY_INBOX),
}


# --- outboxes


@dataclass
class Outboxed:
    """A store with an outbox, for a relay to work."""

    clock: Clock
    store: Store
    outbox: Outbox

    def put(self, topic: Topic[Any], *bodies: str, **more: Any) -> list[Message[Any]]:
        """A committed transaction with these messages."""
        messages = [topic.message(body, source=SOURCE, **more) for body in bodies]
        session = self.store.begin(None)
        session.publish(messages)
        session.commit()
        return messages


@contextmanager
def memory_outbox(_: Path) -> Iterator[Outboxed]:
    clock = Clock()
    store = MemoryStore(clock=clock, wall_ms=clock.wall_ms)
    yield Outboxed(clock, store, store.outbox)
    store.close()


@contextmanager
def sqlite_outbox(folder: Path) -> Iterator[Outboxed]:
    clock = Clock()
    store = SQLiteStore(folder / "effects.db")
    outbox = SQLiteOutbox(store.file, wall_ms=clock.wall_ms, boot_time_ms=clock.boot_ms)
    yield Outboxed(clock, store, outbox)
    store.close()


OUTBOXES: Mapping[str, Callable[[Path], Any]] = {"memory": memory_outbox, "sqlite": sqlite_outbox}


def places(admission: str) -> list[str]:
    """Those with one way of admission: "by-claim", "by-cursor" or "by-inbox"."""
    return [name for name in PLACES if name.endswith(admission)]

"""The one place that knows how each backend is opened, aged, crashed and restarted."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from duly.broker import Broker, Capabilities, Delivery, SubscribeOptions, Subscription
from duly.brokers.memory import MemoryDatabase, MemoryLog, MemoryQueue
from duly.brokers.sqlite import SQLiteBroker
from duly.brokers.sqlite.clock import Clock as SQLiteClock
from duly.guarantees import Admission, Done, Guarantee
from duly.message import Message, Topic
from duly.store import Scope, Session, Store
from duly.stores.memory import MemoryStore

LEASE_S = 30.0
SOURCE = "tests"
A_LOT = 1 << 30


class Clock:
    """Time that passes only when told to. Wall time and monotonic time pass together."""

    def __init__(self) -> None:
        self.now_s = 1_000_000.0

    def __call__(self) -> float:
        return self.now_s

    def wall_ms(self) -> int:
        # Near the present, where messages made by the tests are.
        return 1_700_000_000_000 + int(self.now_s * 1000)

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
    _numbers: Iterator[int] = field(default_factory=itertools.count)

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


# --- stores, each with a broker and a way of admission


@dataclass
class Effects:
    """How a test writes rows through a store's connection, and reads what is committed."""

    insert: Callable[[Any, Hashable, Any], None]
    rows: Callable[[], dict[Any, Any]]


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


def memory_effects(store: MemoryStore) -> Effects:
    return Effects(
        insert=lambda connection, key, value: connection.insert("effects", key, value),
        rows=lambda: dict(store.rows("effects")),
    )


@contextmanager
def memory_by_claim() -> Iterator[Place]:
    with memory(MemoryDatabase) as backend:
        assert isinstance(backend.broker, MemoryDatabase)
        store = MemoryStore(backend.broker, wall_ms=backend.clock.wall_ms, begin_s=0.01)
        yield Place(backend, store, Admission.BY_CLAIM, memory_effects(store))
        store.close()


@contextmanager
def memory_apart(kind: type[MemoryLog | MemoryQueue], admission: Admission) -> Iterator[Place]:
    with memory(kind) as backend:
        store = MemoryStore(wall_ms=backend.clock.wall_ms, begin_s=0.01)
        yield Place(backend, store, admission, memory_effects(store))
        store.close()


PLACES: Mapping[str, Callable[[Path], Any]] = {
    "memory-by-claim": lambda _: memory_by_claim(),
    "memory-by-cursor": lambda _: memory_apart(MemoryLog, Admission.BY_CURSOR),
    "memory-log-by-inbox": lambda _: memory_apart(MemoryLog, Admission.BY_INBOX),
    "memory-queue-by-inbox": lambda _: memory_apart(MemoryQueue, Admission.BY_INBOX),
}

"""What the tests work on: a broker, a store beside it, an outbox, each opened for one test."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from duly.broker import (
    Broker,
    Capabilities,
    Delivery,
    Prepares,
    SubscribeOptions,
    Subscription,
)
from duly.guarantees import Admission, Done, Guarantee, Settlement
from duly.inspection import Inspection, Mending, Observing
from duly.message import Message, Topic
from duly.store import Outbox, Parked, Scope, Session, Store
from duly.testing.conformance.page import DEVIATIONS, Expected
from duly.testing.conformance.subject import (
    BrokerSubject,
    Clock,
    Effects,
    OwnTransaction,
    Pairing,
    Site,
    StoreSubject,
    opened_outbox,
    opened_parked,
)

LEASE_S = 30.0
SOURCE = "tests"
A_LOT = 1 << 30


@dataclass(repr=False)
class Backend:
    """One broker under test, with a clock of the test's own.

    ``around`` wraps the broker whenever it is opened, for tests that put faults around it.
    """

    subject: BrokerSubject
    site: Site
    expected: Expected
    around: Callable[[Broker], Broker] = lambda broker: broker
    broker: Broker = field(init=False)
    topics: list[Topic[Any]] = field(default_factory=list)
    _abandoned: list[Broker] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.broker = self._open()

    def __repr__(self) -> str:
        return f"<{self.subject.name} in {self.site.folder}>"

    def _open(self) -> Broker:
        return self.around(self.subject.open(self.site))

    @property
    def clock(self) -> Clock:
        """The time of this test."""
        assert self.site.clock is not None, "this test has gone over to real time"
        return self.site.clock

    @property
    def can(self) -> Capabilities:
        """What the broker says it provides."""
        return self.broker.capabilities

    @property
    def inside(self) -> Inspection:
        """The broker as one that can look inside itself."""
        return self.broker  # type: ignore[return-value]  # the page says that it can

    @property
    def mender(self) -> Mending:
        """The broker as one that can bring dead letters back and remove them."""
        return self.broker  # type: ignore[return-value]  # the page says that it can

    @property
    def preparing(self) -> Prepares:
        """The broker as one that makes subscriptions beforehand."""
        return self.broker  # type: ignore[return-value]  # the page says that it has to

    @property
    def observer(self) -> Observing:
        """The broker as one that can tell who holds what."""
        return self.broker  # type: ignore[return-value]  # the page says that it can

    def restart(self) -> None:
        """Close the broker and open what it left."""
        self.broker.close()
        self._again()

    def crash(self) -> None:
        """The process is gone without a word; another opens what it left."""
        self._abandoned.append(self.broker)
        self._again()

    def in_real_time(self) -> None:
        """Go by the real clocks from here on; what was published before may be gone."""
        self.broker.close()
        self.site = replace(self.site, clock=None)
        self._again()

    def put_around(self, around: Callable[[Broker], Broker]) -> None:
        """Wrap the open broker, and every one opened later."""
        self.around = around
        self.broker = around(self.broker)

    def _again(self) -> None:
        self.broker = self._open()
        self.broker.declare(self.topics)

    def close(self) -> None:
        """Close what is open."""
        for broker in (self.broker, *self._abandoned):
            broker.close()

    def topic(
        self,
        name: str = "t",
        guarantee: Any = "at-least-once",
        *,
        read_by: Sequence[str] = ("sub",),
        read_as: Guarantee = Guarantee.AT_LEAST_ONCE,
        in_order: bool = False,
        **more: Any,
    ) -> Topic[Any]:
        """A declared topic of text messages, and subscriptions that are given them from now on:
        those of a test that publishes before it makes them. ``in_order``: by key, where that is
        possible.
        """
        if "partitions" in more and not self.can.orders_by_key:
            more["partitions"] = 0
        topic: Topic[Any] = Topic(name, str, guarantee=guarantee, **more)
        self.broker.declare([topic])
        self.topics.append(topic)
        for subscription in () if self.can.replays else read_by:
            options = SubscribeOptions(read_as, order_by_key=in_order and self.can.orders_by_key)
            self.preparing.prepare([topic], subscription, options)
        return topic

    def message(self, topic: Topic[Any], body: str, **more: Any) -> Message[Any]:
        """A message as a producer makes it now."""
        if self.site.clock is not None:
            more.setdefault("time_ms", self.site.clock.wall_ms())
        return topic.message(body, source=SOURCE, **more)

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
        return self.broker.subscribe(topics, name, options)

    def fall_silent(self) -> None:
        """Time passes until every lease that was not extended is over."""
        self.clock.advance(LEASE_S + 0.5)

    def deviates(self, name: str) -> bool:
        """Whether the page lists this deviation, for tests that something else is about."""
        assert name in DEVIATIONS
        return name in self.expected.deviations

    def judge(self, name: str, *, deviates: bool) -> None:
        """Hold what was seen against the page's list of deviations, in both directions."""
        listed = self.deviates(name)
        assert not (deviates and not listed), (
            f"{self.subject.name} does not keep a promise: {DEVIATIONS[name]} Where its nature "
            f"forces that, list {name!r} under deviations in {self.expected.page}."
        )
        assert not (listed and not deviates), (
            f"{self.expected.page} lists the deviation {name!r} for {self.subject.name}, and it "
            "keeps the promise: take the line out."
        )


def claim(lane: Subscription, limit: int = 100, max_bytes: int = A_LOT) -> Sequence[Delivery]:
    """What the lane can claim now."""
    return lane.claim(limit, max_bytes, 0.0)


def batches(lane: Subscription, limit: int = 100, most: int = 1000) -> Iterator[Sequence[Delivery]]:
    """Claim after claim, until one finds nothing."""
    for _ in range(most):
        batch = claim(lane, limit)
        if not batch:
            return
        yield batch
    raise AssertionError("it never ends")


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


def claim_all(lane: Subscription, count: int) -> list[Delivery]:
    """As `claim`, until so many are held: of several partitions one may come before the others."""
    held: list[Delivery] = []

    def all_of_them() -> bool:
        held.extend(claim(lane))
        return len(held) >= count

    eventually(all_of_them, f"{count} messages are claimed")
    return held


def arriving(lane: Subscription, count: int) -> list[str]:
    """As `drain`, once ``count`` have been handled. A broker may answer a transaction's commit a
    moment before readers are shown what it published.
    """
    handled: list[str] = []

    def all_of_them() -> bool:
        handled.extend(drain(lane))
        return len(handled) >= count

    eventually(all_of_them, f"{count} messages arrive")
    return handled + drain(lane)


def kinds(outcomes: Sequence[object]) -> list[str]:
    """What kinds of outcome these are, by name."""
    return [type(outcome).__name__ for outcome in outcomes]


_never = threading.Event()


def eventually(condition: Callable[[], object], what: str, timeout_s: float = 30.0) -> None:
    """Wait until ``condition`` holds; fails with what was awaited."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"after {timeout_s} s still not: {what}"
        _never.wait(0.01)


class Patience:
    """How long a test with many threads waits for what may never come."""

    def __init__(self, seconds: float = 30.0) -> None:
        self._until = time.monotonic() + seconds

    def __bool__(self) -> bool:
        return time.monotonic() < self._until


def together(*calls: Callable[[], Any]) -> None:
    """Run these on a thread each; the first failure is raised."""
    start = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> None:
        start.wait(30)
        call()

    with ThreadPoolExecutor(len(calls)) as pool:
        for future in [pool.submit(run, call) for call in calls]:
            future.result(90)


@dataclass(repr=False)
class Place:
    """A store beside a broker, with one way of admission."""

    backend: Backend
    subject: StoreSubject
    admission: Admission
    store: Store = field(init=False)
    effects: Effects = field(init=False)
    outbox: Outbox | None = None
    parked: Parked | None = None
    _abandoned: list[Store] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._open()

    def __repr__(self) -> str:
        return f"<{self.subject.name} {self.admission} beside {self.backend!r}>"

    def _open(self) -> None:
        site = self.backend.site
        self.store = self.subject.open(site, self.backend.broker)
        self.effects = self.subject.effects(site, self.store)
        if self.admission is Admission.BY_CURSOR:
            self.parked = opened_parked(self.subject, site, self.store)
        if self.admission is not Admission.BY_CLAIM and self.store.capabilities.outbox:
            self.outbox = opened_outbox(self.subject, site, self.store)

    def reopen(self) -> None:
        """The store's process is gone without a word; another opens what it left."""
        self._abandoned.append(self.store)
        self._open()

    def close(self) -> None:
        """Close what is open."""
        for store in (self.store, *self._abandoned):
            store.close()

    def begin(self, consumer: str = "sub", **more: Any) -> Session[Any]:
        """A transaction of one consumer."""
        return self.store.begin(Scope(consumer, self.admission, **more))

    def own(self) -> AbstractContextManager[OwnTransaction]:
        """A transaction of the application's own."""
        return self.subject.own(self.backend.site, self.store)

    def topic(self, name: str, guarantee: Any = "at-least-once") -> Topic[Any]:
        """A topic that transactions publish to."""
        topic = self.backend.topic(name, guarantee)
        self.store.declare([topic])
        return topic

    def settle(self, lane: Subscription, settlements: Sequence[Settlement]) -> None:
        """Tell the broker, where the commit has not settled already."""
        if self.admission is not Admission.BY_CLAIM:
            assert list(lane.settle(settlements)) == []

    @property
    def publishes(self) -> bool:
        """Whether transactions here can publish: into the broker's log, or the outbox."""
        return self.admission is Admission.BY_CLAIM or self.outbox is not None

    def check_outputs(self, topic: Topic[Any], expected: Iterable[str]) -> None:
        """See that transactions have published exactly these, where they can publish at all."""
        if self.publishes:
            assert sorted(self.outputs(topic)) == sorted(expected)

    def outputs(self, topic: Topic[Any]) -> list[str]:
        """What transactions have published to a topic and nobody has taken yet."""
        if self.outbox is None:
            lane = self.backend.lane(topic, name="reader-of-outputs")
            published = drain(lane)
            lane.close()
            return published
        unsent = self.outbox.unsent(1000, A_LOT, 0.0)
        self.outbox.sent([outgoing.position for outgoing in unsent])
        return [outgoing.message.body.decode() for outgoing in unsent]


@dataclass(repr=False)
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


# --- opening and closing


@contextmanager
def backend_on(subject: BrokerSubject, site: Site, expected: Expected) -> Iterator[Backend]:
    """A broker for the length of one test."""
    backend = Backend(subject, site, expected)
    try:
        yield backend
    finally:
        backend.close()


@contextmanager
def place_on(pairing: Pairing, site: Site, expected: Expected) -> Iterator[Place]:
    """A broker and a store for the length of one test."""
    with backend_on(pairing.broker, site, expected) as backend:
        place = Place(backend, pairing.store, pairing.admission)
        try:
            yield place
        finally:
            place.close()


@contextmanager
def outboxed_on(pairing: Pairing, site: Site, expected: Expected) -> Iterator[Outboxed]:
    """A store whose broker is elsewhere, for the length of one test."""
    with place_on(pairing, site, expected) as place:
        assert place.outbox is not None
        yield Outboxed(place.backend.clock, place.store, place.outbox)

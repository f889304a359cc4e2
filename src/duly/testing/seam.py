"""A broker and a store of which every call can be watched, delayed, failed or cut, from outside.

Each call of the seam goes through one function, an `Around`, that is given a `Call` (what is
asked, by its name in the protocol) and how to perform it. What recorders and faults do is
written once, there, for whatever broker or store is inside.
"""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

from duly.broker import (
    Ahead,
    Broker,
    Capabilities,
    ClaimsAhead,
    Delivery,
    Entrance,
    NotesRepeats,
    Outcome,
    Prepares,
    PublishesOnce,
    Receipt,
    SettlesRemembered,
    SubscribeOptions,
    Subscription,
)
from duly.errors import DulyError
from duly.guarantees import Done, Settlement
from duly.message import Message, Topic
from duly.store import (
    Admitted,
    BeginsOnLoop,
    Excuses,
    Pipelines,
    PublishesOnLoop,
    Scope,
    SeesSavepoints,
    Session,
    Store,
    StoreCapabilities,
)
from duly.store import ClaimsAhead as SessionClaimsAhead
from duly.testing.beside import WrappedOutbox, WrappedParked
from duly.testing.calls import Around, Call, Name, inside

__all__ = [
    "Around",
    "Call",
    "Name",
    "WrappedAhead",
    "WrappedBroker",
    "WrappedEntrance",
    "WrappedOutbox",
    "WrappedParked",
    "WrappedSession",
    "WrappedStore",
    "WrappedSubscription",
    "inside",
]


class WrappedBroker:
    """A broker, seen through ``around``. Declaring is not a call that is watched."""

    def __init__(self, inner: Broker, around: Around) -> None:
        self.inner = inner
        self.around = around

    @property
    def capabilities(self) -> Capabilities:
        """Those of what is inside."""
        return self.inner.capabilities

    def declare(self, topics: Iterable[Topic[Any]]) -> None:
        """As `Broker.declare`."""
        self.inner.declare(topics)

    def prepare(
        self, topics: Iterable[Topic[Any]], subscription: str, options: SubscribeOptions
    ) -> None:
        """As `Prepares.prepare`; a broker that keeps messages for later needs none."""
        if isinstance(self.inner, Prepares):
            self.inner.prepare(topics, subscription, options)

    def publish(self, messages: Sequence[Message[Any]]) -> Sequence[Outcome]:
        """As `Broker.publish`."""
        outcomes: Sequence[Outcome] = self.around(
            Call("publish", messages, inner=self.inner), self.inner.publish
        )
        return outcomes

    def entrance(self, outbox: str) -> WrappedEntrance:
        """As `PublishesOnce.entrance`, of a broker that says that it can."""
        return WrappedEntrance(cast(PublishesOnce, self.inner).entrance(outbox), self)

    def subscribe(
        self, topics: Sequence[Topic[Any]], subscription: str, options: SubscribeOptions
    ) -> WrappedSubscription:
        """As `Broker.subscribe`."""
        inner = self.inner.subscribe(topics, subscription, options)
        return WrappedSubscription(inner, self.around, subscription)

    def close(self) -> None:
        """As `Broker.close`."""
        self.inner.close()


class WrappedEntrance:
    """An entrance whose publishing is seen as its broker's is. Resuming is not watched."""

    def __init__(self, inner: Entrance, broker: WrappedBroker) -> None:
        self.inner = inner
        self._broker = broker

    def resume(self) -> bytes | None:
        """As `Entrance.resume`."""
        return self.inner.resume()

    def publish(
        self, messages: Sequence[Message[Any]], note_of: Callable[[Sequence[int]], bytes]
    ) -> Sequence[Outcome]:
        """As `Entrance.publish`. What a fault makes unknown is `PublishUnknown`."""
        call = Call("publish", messages, inner=self._broker.inner)
        outcomes: Sequence[Outcome] = self._broker.around(
            call, lambda given: self.inner.publish(given, note_of)
        )
        return outcomes

    def close(self) -> None:
        """As `Entrance.close`."""
        self.inner.close()


class WrappedSubscription:
    """A subscription, seen through ``around``."""

    def __init__(self, inner: Subscription, around: Around, name: str) -> None:
        self.inner = inner
        self.name = name
        self._around = around

    def _call(self, name: Name, given: Any, perform: Callable[[Any], Any]) -> Any:
        return self._around(Call(name, given, self.name, inner=self.inner), perform)

    def claim(self, limit: int, max_bytes: int, wait_s: float) -> Sequence[Delivery]:
        """As `Subscription.claim`."""
        deliveries: Sequence[Delivery] = self._call(
            "claim", limit, lambda given: self.inner.claim(given, max_bytes, wait_s)
        )
        return deliveries

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[Receipt]:
        """As `Subscription.settle`."""
        refused: Sequence[Receipt] = self._call("settle", settlements, self.inner.settle)
        return refused

    @property
    def settles_remembered(self) -> bool:
        """As `SettlesRemembered.settles_remembered`."""
        return isinstance(self.inner, SettlesRemembered) and self.inner.settles_remembered

    def settle_remembered(self, settlements: Sequence[Done]) -> Sequence[Receipt]:
        """As `SettlesRemembered.settle_remembered`; not watched: it promises nothing."""
        return cast(SettlesRemembered, self.inner).settle_remembered(settlements)

    def ahead(self, limit: int, max_bytes: int) -> WrappedAhead | None:
        """As `ClaimsAhead.ahead`."""
        if not isinstance(self.inner, ClaimsAhead):
            return None
        inner = self.inner.ahead(limit, max_bytes)
        if inner is None:
            return None
        return WrappedAhead(inner, Call("claim", limit, self.name, inner=self.inner), self._around)

    def settle_and_claim(
        self, settlements: Sequence[Settlement], ahead: Ahead
    ) -> Sequence[Receipt]:
        """As `ClaimsAhead.settle_and_claim`."""
        inner, made = cast(ClaimsAhead, self.inner), cast(WrappedAhead, ahead)

        def both(given: Any) -> Any:
            refused = inner.settle_and_claim(given, made.inner)
            made.stands()
            return refused

        refused: Sequence[Receipt] = self._call("settle", settlements, both)
        return refused

    def note_repeats(self, deliveries: Sequence[Delivery]) -> None:
        """As `NotesRepeats.note_repeats`; not watched, since nothing depends on it."""
        if isinstance(self.inner, NotesRepeats):
            self.inner.note_repeats(deliveries)

    def extend(self, receipts: Iterable[Receipt], lease_s: float) -> Sequence[Receipt]:
        """As `Subscription.extend`."""
        lost: Sequence[Receipt] = self._call(
            "extend", list(receipts), lambda given: self.inner.extend(given, lease_s)
        )
        return lost

    def close(self) -> None:
        """As `Subscription.close`."""
        self._call("close", None, lambda _: self.inner.close())


class WrappedAhead:
    """A claim made with a settlement; it is seen as "made ahead" then, and as a claim when its
    deliveries are taken.
    """

    def __init__(self, inner: Ahead, call: Call, around: Around) -> None:
        self.inner = inner
        self._call = call
        self._around = around

    def stands(self) -> None:
        """The settlement is made, and with it the claim."""
        self._seen("made ahead")

    def deliveries(self) -> Sequence[Delivery]:
        """As `Ahead.deliveries`."""
        return self._seen("claim")

    def _seen(self, name: Name) -> Sequence[Delivery]:
        call = replace(self._call, name=name, is_made=name == "claim")
        deliveries: Sequence[Delivery] = self._around(call, lambda _: self.inner.deliveries())
        return deliveries


class WrappedStore:
    """A store, seen through ``around``."""

    def __init__(self, inner: Store, around: Around, name: str = "tx") -> None:
        self.inner = inner
        self._around = around
        self._name = name
        self._numbers = itertools.count(1)

    @property
    def capabilities(self) -> StoreCapabilities:
        """Those of what is inside."""
        return self.inner.capabilities

    @property
    def parked(self) -> WrappedParked:
        """What a store that says so has parked, seen as its broker's subscriptions are."""
        inner: Any = self.inner
        return WrappedParked(inner.parked, self._around)

    def declare(self, topics: Sequence[Topic[Any]]) -> None:
        """As `Store.declare`."""
        self.inner.declare(topics)

    def begin(self, scope: Scope | None) -> WrappedSession:
        """As `Store.begin`."""
        return self._begin(scope, self.inner.begin)

    def _begin(
        self, scope: Scope | None, begin: Callable[[Scope | None], Session[Any]]
    ) -> WrappedSession:
        tx = f"{self._name}{next(self._numbers)}"
        on = "" if scope is None else scope.consumer
        call = Call("begin", scope, on, tx, self.inner, scope)
        session: Session[Any] = self._around(call, begin)
        return WrappedSession(session, self._around, tx, scope)

    def begin_on_loop(
        self, scope: Scope | None, on_loop: Callable[[Awaitable[Any]], Any]
    ) -> WrappedSession:
        """As `BeginsOnLoop.begin_on_loop`."""
        inner = cast(BeginsOnLoop, self.inner)
        return self._begin(scope, lambda given: inner.begin_on_loop(given, on_loop))

    def joins(self, connection: Any) -> bool:
        """As `Store.joins`."""
        return self.inner.joins(connection)

    def publish_within(
        self,
        connection: Any,
        messages: Sequence[Message[Any]],
        topics: Sequence[Topic[Any]] = (),
    ) -> Sequence[Outcome]:
        """As `Store.publish_within`."""
        return self.inner.publish_within(connection, messages, topics)

    async def apublish_within(
        self,
        connection: Any,
        messages: Sequence[Message[Any]],
        topics: Sequence[Topic[Any]] = (),
    ) -> Sequence[Outcome]:
        """As `PublishesOnLoop.apublish_within`, on a connection of either colour."""
        if isinstance(self.inner, PublishesOnLoop):
            return await self.inner.apublish_within(connection, messages, topics)
        return self.inner.publish_within(connection, messages, topics)

    def close(self) -> None:
        """As `Store.close`."""
        self.inner.close()


class WrappedSession:
    """A session, seen through ``around``. What the handler does with the connection is not."""

    def __init__(self, inner: Session[Any], around: Around, tx: str, scope: Scope | None) -> None:
        self.inner = inner
        self.tx = tx
        self._around = around
        self._scope = scope
        self._on = "" if scope is None else scope.consumer
        self._aheads: list[WrappedAhead] = []

    def _call(self, name: Name, given: Any, perform: Callable[[Any], Any]) -> Any:
        call = Call(name, given, self._on, self.tx, self.inner, self._scope)
        return self._around(call, perform)

    @property
    def connection(self) -> Any:
        """As `Session.connection`."""
        return self.inner.connection

    def admit(self, deliveries: Sequence[Delivery]) -> Admitted:
        """As `Session.admit`."""
        admitted: Admitted = self._call("admit", deliveries, self.inner.admit)
        return admitted

    def savepoint(self) -> None:
        """As `Session.savepoint`."""
        self._call("savepoint", None, lambda _: self.inner.savepoint())

    def rollback_to_savepoint(self) -> None:
        """As `Session.rollback_to_savepoint`."""
        self._call("rollback to savepoint", None, lambda _: self.inner.rollback_to_savepoint())

    def release_savepoint(self) -> None:
        """As `Session.release_savepoint`."""
        self._call("release savepoint", None, lambda _: self.inner.release_savepoint())

    def declare(self, topics: Iterable[Topic[Any]]) -> None:
        """As `Session.declare`."""
        self.inner.declare(topics)

    def publish(self, messages: Sequence[Message[Any]]) -> Sequence[Outcome]:
        """As `Session.publish`."""
        outcomes: Sequence[Outcome] = self._call(
            "publish in transaction", list(messages), self.inner.publish
        )
        return outcomes

    def settle(self, settlements: Sequence[Settlement], deliveries: Sequence[Delivery]) -> None:
        """As `Session.settle`."""
        self._call(
            "settle in transaction",
            settlements,
            lambda given: self.inner.settle(given, deliveries),
        )

    def start_pipeline(self) -> None:
        """As `Pipelines.start_pipeline`."""
        cast(Pipelines, self.inner).start_pipeline()

    def end_pipeline(self) -> None:
        """As `Pipelines.end_pipeline`."""
        cast(Pipelines, self.inner).end_pipeline()

    def watch_savepoints(self, seen: Callable[[], None]) -> None:
        """As `SeesSavepoints.watch_savepoints`."""
        if isinstance(self.inner, SeesSavepoints):
            self.inner.watch_savepoints(seen)

    def savepoints_left(self) -> bool:
        """As `SeesSavepoints.savepoints_left`."""
        return isinstance(self.inner, SeesSavepoints) and self.inner.savepoints_left()

    def excuse(self, error: BaseException) -> DulyError | None:
        """As `Excuses.excuse`."""
        return self.inner.excuse(error) if isinstance(self.inner, Excuses) else None

    def claim(self, ahead: Ahead) -> None:
        """As `duly.store.ClaimsAhead.claim`."""
        made = cast(WrappedAhead, ahead)
        cast(SessionClaimsAhead, self.inner).claim(made.inner)
        self._aheads.append(made)

    def commit(self) -> None:
        """As `Session.commit`."""

        def commit(_: Any) -> None:
            self.inner.commit()
            for ahead in self._aheads:
                ahead.stands()

        self._call("commit", None, commit)

    def rollback(self) -> None:
        """As `Session.rollback`."""
        self._call("rollback", None, lambda _: self.inner.rollback())

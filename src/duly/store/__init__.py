"""The seam to where effects live: `Store`, its `Session`, and the `Transaction` handlers get.

A store holds the inbox (what has taken effect), the cursor (how far an ordered source has
taken effect) and the outbox (what is to be published). Handlers see only `Transaction`; the
worker drives the `Session` beneath it: fence first (`admit`), settlement last (`settle`).
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from duly.broker import Ahead, Delivery, Outcome
from duly.errors import ConfigurationError, DulyError, TransactionFailed
from duly.guarantees import Admission, Settlement
from duly.message import Message, Topic, checked_topic, due_ms
from duly.stamps import Stamp, stamped
from duly.store.endings import covered, not_done, paired
from duly.store.outbox import Backlog, GivenUp, Outbox, Outgoing, Refusal
from duly.store.parking import (
    Parked,
    ParkedReceipt,
    Waiting,
    are_parked,
    parked_beside,
    parked_of,
    with_parked,
)

__all__ = [
    "Admitted",
    "Backlog",
    "BeginsOnLoop",
    "ClaimsAhead",
    "Declare",
    "Excuses",
    "GivenUp",
    "Mark",
    "OpenTransaction",
    "Outbox",
    "Outgoing",
    "Parked",
    "ParkedReceipt",
    "Pipelines",
    "PublishesOnLoop",
    "Refusal",
    "Scope",
    "SeesSavepoints",
    "Session",
    "Store",
    "StoreCapabilities",
    "Transaction",
    "Waiting",
    "are_parked",
    "covered",
    "end",
    "flush",
    "forget_since",
    "mark",
    "not_done",
    "outbox_of",
    "paired",
    "parked_beside",
    "parked_of",
    "take_after_commit",
    "waits_for_commit",
    "with_parked",
]

C = TypeVar("C")
C_co = TypeVar("C_co", covariant=True)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StoreCapabilities:
    """What a store provides.

    - ``name``: for people ("SQLite").
    - ``database``: identity of the database, to be compared with the broker's.
    - ``durable``: committed effects survive the death of every process.
    - ``one_writer``: one transaction at a time, over all processes.
    - ``outbox``: `Session.publish` works where the broker is another database.
    - ``tx_s``: after this many seconds a transaction should start no further handler.
    - ``savepoints``: a transaction should set at most so many; None: any number.
    - ``async_connections``: ``async def`` handlers get a connection of their loop (`BeginsOnLoop`).
    - ``pipelines``: statements need not wait for one another's answer (`Pipelines`).
    - ``parks``: what a consumer by cursor has to try again can wait in the store (`Parked`), so
      that its log goes on.
    - ``effects``: handlers write through `Transaction.connection`. Without, a transaction covers
      what is published, and how far the source was handled.
    - ``limits``: what else holds for its transactions, as the contract is to tell it.
    """

    name: str
    database: str
    durable: bool = True
    one_writer: bool = False
    outbox: bool = False
    tx_s: float = 1.0
    savepoints: int | None = None
    async_connections: bool = False
    pipelines: bool = False
    parks: bool = False
    effects: bool = True
    limits: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Admitted:
    """What admission found; every delivery asked about is in exactly one.

    ``fresh`` may run. ``repeated`` have taken effect before and are settled as done.
    ``conflicting`` carry the id of an earlier message with another body; ``too_old`` are
    marked as repeated and older than the inbox remembers. Neither may run: both are dead.
    ``dead`` were given up on before, in a transaction that stands, and not replayed since: the
    broker is told again.
    """

    fresh: Sequence[Delivery]
    repeated: Sequence[Delivery] = ()
    conflicting: Sequence[Delivery] = ()
    too_old: Sequence[Delivery] = ()
    dead: Sequence[Delivery] = ()


@dataclass(frozen=True, slots=True)
class Scope:
    """For whom a session admits: one consumer, one way of admission, its inbox's retention.

    ``max_run_s``: how long a handler may run; a database may end a transaction that stands still
    for longer. ``parks``: by cursor, what is to be tried again waits in the store, and the cursor
    passes it. ``buries``: what dies of that is shown among the store's dead letters, since the
    broker is not told of it.
    """

    consumer: str
    admission: Admission
    inbox_retention_s: float = 7 * 86400.0
    max_run_s: float = 60.0
    parks: bool = False
    buries: bool = False


class Session(Protocol[C_co]):
    """One open transaction of a store, driven by one thread at a time.

    After any error, and after `commit` raised, `rollback` is called and the session is over.
    """

    @property
    def connection(self) -> C_co:
        """The driver's own connection, inside the transaction, for the handler."""
        ...

    def admit(self, deliveries: Sequence[Delivery]) -> Admitted:
        """The fence; the first statement. Raises `Superseded` when a claim was lost."""
        ...

    def savepoint(self) -> None:
        """Mark the point that `rollback_to_savepoint` returns to; one at a time."""
        ...

    def rollback_to_savepoint(self) -> None:
        """Undo everything since `savepoint` and drop it. Raises `TransactionLost`."""
        ...

    def release_savepoint(self) -> None:
        """Keep everything since `savepoint` and drop it. Raises `TransactionLost`."""
        ...

    def declare(self, topics: Iterable[Topic[Any]]) -> None:
        """Make known the topics that this transaction publishes to, creating what they need
        as part of it. Cheap where they are known already.
        """
        ...

    def publish(self, messages: Sequence[Message[Any]]) -> Sequence[Outcome]:
        """Put messages into the broker's log or the outbox, as part of the transaction."""
        ...

    def settle(self, settlements: Sequence[Settlement], deliveries: Sequence[Delivery]) -> None:
        """Record how the deliveries ended; the last statement. ``settlements`` pair with
        ``deliveries`` (see `paired`). By claim this settles them; by cursor it moves the cursor
        past them and keeps their dead letters, and parks what is to be tried again where the
        scope says so; by inbox it remembers the dead as dead, and
        forgets the ids of those that will run again.
        """
        ...

    def commit(self) -> None:
        """Commit. Raises `TransactionLost` when the transaction is not the one `admit` began,
        `TransactionFailed` when it was rolled back, `CommitUnknown` when nobody can say.
        """
        ...

    def rollback(self) -> None:
        """Roll back whatever is open and give the connection back. Never raises."""
        ...


class ClaimsAhead(Protocol):
    """What a `Session` by claim can also do where the broker's subscriptions can: see
    `duly.broker.ClaimsAhead`.
    """

    def claim(self, ahead: Ahead) -> None:
        """Make the next claim, after `Session.settle` and as part of the transaction."""
        ...


@runtime_checkable
class Excuses(Protocol):
    """What a `Session` can also do whose database ends transactions for reasons of its own."""

    def excuse(self, error: BaseException) -> DulyError | None:
        """What an error that left the handler means where it is the database's: a deadlock, a
        lost connection. None: it is the handler's own. Asked before `Session.rollback`.
        """
        ...


@runtime_checkable
class SeesSavepoints(Protocol):
    """What a `Session` can also do whose handlers can set savepoints of their own.

    One that is left open reaches into the calls after it: going back to it would undo what they
    did. So the worker starts nothing behind a handler that may have left one.
    """

    def watch_savepoints(self, seen: Callable[[], None]) -> None:
        """From here on ``seen`` is called, in the middle of the handler, when it has set a
        savepoint, released one, or gone back to one.
        """
        ...

    def savepoints_left(self) -> bool:
        """Whether one may still be open, now that the handler has returned."""
        ...


class Pipelines(Protocol):
    """What a `Session` can also do where statements can be sent without waiting for answers."""

    def start_pipeline(self) -> None:
        """From here on a statement's error is raised by one of the later ones, or at the end."""
        ...

    def end_pipeline(self) -> None:
        """Wait for all answers; raises the first error of the handlers' statements."""
        ...


class Store(Protocol):
    """Where effects live. Safe to use from any thread."""

    @property
    def capabilities(self) -> StoreCapabilities:
        """What this store provides."""
        ...

    def declare(self, topics: Sequence[Topic[Any]]) -> None:
        """Make known the topics that transactions publish to, creating what they need."""
        ...

    def begin(self, scope: Scope | None) -> Session[Any]:
        """Open a transaction; without a scope, one that admits nothing (a caller's own)."""
        ...

    def joins(self, connection: Any) -> bool:
        """Whether ``within=connection`` can publish: it is open on this very database."""
        ...

    def publish_within(
        self,
        connection: Any,
        messages: Sequence[Message[Any]],
        topics: Sequence[Topic[Any]] = (),
    ) -> Sequence[Outcome]:
        """Put messages into the caller's own open transaction on this database.

        ``topics`` are made known as part of it: nothing else could, while it holds the
        database's write lock.
        """
        ...

    def close(self) -> None:
        """Close every connection."""
        ...


class BeginsOnLoop(Protocol):
    """What a `Store` can also do that has async connections, for ``async def`` handlers."""

    def begin_on_loop(
        self, scope: Scope | None, on_loop: Callable[[Awaitable[Any]], Any]
    ) -> Session[Any]:
        """`Store.begin`, with everything that happens on the connection awaited on a loop.

        ``on_loop`` awaits there and returns the result. The session's calls block, and come
        from any thread but the loop's own.
        """
        ...


@runtime_checkable
class PublishesOnLoop(Protocol):
    """What such a store can do for ``await app.apublish(..., within=connection)``."""

    async def apublish_within(
        self,
        connection: Any,
        messages: Sequence[Message[Any]],
        topics: Sequence[Topic[Any]] = (),
    ) -> Sequence[Outcome]:
        """`Store.publish_within` on a connection of either colour."""
        ...


def outbox_of(store: Store) -> Outbox | None:
    """The outbox of a store that has one."""
    return getattr(store, "outbox", None) if store.capabilities.outbox else None


class Transaction(Generic[C]):
    """What an exactly-once handler works through.

    Rows written through ``connection``, messages given to `publish` and the memory that the
    message was handled become true together, or none of them does. ``connection`` is the
    driver's own: do not commit or roll back, duly does, once.
    """

    __slots__ = (
        "_after_commit",
        "_ended",
        "_flushed",
        "_messages",
        "_source",
        "_stamps",
        "_topics",
        "connection",
    )

    def __init__(self, connection: C, source: str, stamps: Sequence[Stamp] = ()) -> None:
        self.connection = connection
        self._source = source
        self._stamps = stamps
        self._flushed = 0
        self._ended = False
        self._messages: list[Message[Any]] = []
        self._topics: dict[str, Topic[Any]] = {}
        self._after_commit: list[Callable[[], object]] = []

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
    ) -> str:
        """Publish with the transaction: seen when it commits, never if it does not.

        Returns the message's id. Buffered until commit, so nothing to await. Raises
        `InvalidMessage` or `MessageTooLarge`; `TransactionFailed` once the transaction ended.
        """
        message = checked_topic(topic).message(
            payload,
            source=self._source,
            id=id,
            key=key,
            headers=stamped(self._stamps, topic.name, headers) if self._stamps else headers,
            due_ms=due_ms(topic.name, delay_s, due),
        )
        self.add(topic, (message,))
        return message.id

    def add(self, topic: Topic[Any], messages: Sequence[Message[Any]]) -> None:
        """Publish messages that were made before, as `publish` does."""
        self._check_open("tx.publish")
        if topic.guarantee == "at-most-once":
            raise ConfigurationError(
                f"tx.publish to topic {topic.name!r}: it is declared at-most-once, which a "
                "transaction cannot loosen. Publish with app.publish, or declare the topic "
                "at-least-once."
            )
        self._messages.extend(messages)
        self._topics[topic.name] = topic

    def after_commit(self, call: Callable[[], object]) -> None:
        """Run ``call`` once the transaction stands. A crash in between loses the call; what it
        raises is logged. Raises `ConfigurationError` for an ``async def``, which nothing awaits.
        """
        self._check_open("tx.after_commit")
        if not callable(call) or inspect.iscoroutinefunction(call):
            raise ConfigurationError(
                f"tx.after_commit({call!r}): give a def without parameters. Nothing awaits what it "
                "returns; what is to be awaited after the commit is a message: tx.publish."
            )
        self._after_commit.append(call)

    def _check_open(self, call: str) -> None:
        if self._ended:
            raise TransactionFailed(
                f"{call} after the transaction ended: it would never happen. Use the transaction "
                "within its handler or block only."
            )


@dataclass(frozen=True, slots=True)
class Mark:
    """How much a transaction had buffered, and flushed, at some point, to return to it."""

    messages: int
    calls: int
    flushed: int


def mark(tx: Transaction[Any]) -> Mark:
    """Where the transaction's buffers stand now."""
    return Mark(len(tx._messages), len(tx._after_commit), tx._flushed)


def forget_since(tx: Transaction[Any], point: Mark) -> None:
    """Drop what was buffered since ``point``: its handler failed."""
    del tx._messages[point.messages :]
    del tx._after_commit[point.calls :]
    tx._flushed = point.flushed


Declare = Callable[[Iterable[Topic[Any]], Sequence[Message[Any]]], None]
"""Makes topics known to a broker in another database, before the outbox has messages for it:
whoever relays them later may know nothing but a topic's name. Raises the `PublishFailed` of a
message that the broker could not take.
"""


def flush(
    tx: Transaction[Any],
    session: Session[Any],
    declare: Declare | None = None,
) -> int:
    """Move buffered messages into the session; returns how many it was given by now.

    Raises the `IdentityConflict` of a message whose id was taken by another body, and what
    ``declare`` raises. A repeat is dropped silently: the event is published already.
    """
    if not tx._messages:
        return tx._flushed
    if declare is not None:
        declare(tx._topics.values(), tx._messages)
    session.declare(tx._topics.values())
    outcomes = session.publish(tx._messages)
    tx._flushed += len(tx._messages)
    tx._messages.clear()
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return tx._flushed


def waits_for_commit(tx: Transaction[Any]) -> bool:
    """Whether there are calls to make once the transaction stands."""
    return bool(tx._after_commit)


def take_after_commit(tx: Transaction[Any]) -> Sequence[Callable[[], object]]:
    """The calls to make now that the transaction stands."""
    calls, tx._after_commit = tx._after_commit, []
    return calls


def end(tx: Transaction[Any]) -> None:
    """Committed or rolled back: from now on its calls raise instead of being forgotten."""
    tx._ended = True


OpenTransaction = AbstractContextManager[Transaction[C]]
"""``with app.transaction() as tx``: commits at the end of the block, rolls back if it raises."""

"""The seam to where effects live: `Store`, its `Session`, and the `Transaction` handlers get.

A store holds the inbox (what has taken effect), the cursor (how far an ordered source has
taken effect) and the outbox (what is to be published). Handlers see only `Transaction`; the
worker drives the `Session` beneath it: fence first (`admit`), settlement last (`settle`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, Protocol, TypeVar

from duly.broker import Ahead, Delivery, Outcome
from duly.errors import ConfigurationError, TransactionFailed
from duly.guarantees import Admission, Done, Settlement
from duly.message import Message, Topic, due_ms

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
    """

    name: str
    database: str
    durable: bool = True
    one_writer: bool = False
    outbox: bool = False
    tx_s: float = 1.0


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
    """For whom a session admits: one consumer, one way of admission, its inbox's retention."""

    consumer: str
    admission: Admission
    inbox_retention_s: float = 7 * 86400.0


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
        past them and keeps their dead letters; by inbox it remembers the dead as dead, and
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


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message in the outbox. ``position`` grows in the order of commits; ``attempts`` counts
    how often the broker has refused it.
    """

    position: int
    message: Message[Any]
    attempts: int = 0


@dataclass(frozen=True, slots=True)
class Refusal:
    """What the broker refused: to be tried again in so many seconds, or never (None).

    Not ``charged``: the broker refused everything, so that it does not count as an attempt.
    """

    position: int
    error: str
    retry_in_s: float | None
    charged: bool = True


@dataclass(frozen=True, slots=True)
class GivenUp:
    """A message that the broker will not take, kept in the outbox for a person to look at."""

    position: int
    message: Message[Any]
    attempts: int
    error: str


@dataclass(frozen=True, slots=True)
class Backlog:
    """How much an outbox holds: ``unsent`` on its way, ``given_up`` not. ``oldest_ms`` is when
    the oldest unsent message was made (milliseconds since 1970 UTC); None: there is none.
    """

    unsent: int
    given_up: int
    oldest_ms: int | None


class Outbox(Protocol):
    """What transactions have published and no broker has confirmed yet.

    A second small protocol, for stores that can be another database than the broker: their
    attribute ``outbox``. Safe to use from any thread. All but `hold` and `unsent` may raise
    `BrokerUnavailable`, having changed nothing, and `CommitUnknown`; doing it again is harmless.
    """

    def hold(self, relay: str, lease_s: float) -> bool:
        """Be the one relay of this outbox for ``lease_s`` more seconds; False: another is."""
        ...

    def let_go(self, relay: str) -> None:
        """Be it no longer, if it was."""
        ...

    def unsent(self, limit: int, max_bytes: int, wait_s: float) -> Sequence[Outgoing]:
        """The oldest messages to send now, at least one whatever its size, in order.

        Waits up to ``wait_s`` seconds for the first. What has to wait after a refusal is left
        out, and so is everything behind it with its topic and key.
        """
        ...

    def sent(self, positions: Sequence[int]) -> None:
        """Drop what the broker has confirmed."""
        ...

    def refused(self, refusals: Sequence[Refusal]) -> None:
        """Note what the broker refused, and when to try again."""
        ...

    def given_up(self, limit: int = 100) -> Sequence[GivenUp]:
        """The oldest messages that will not be tried again by themselves."""
        ...

    def try_again(self, positions: Sequence[int]) -> None:
        """Send given-up messages again, as if for the first time, at their old positions."""
        ...

    def backlog(self) -> Backlog:
        """How much there is."""
        ...


def paired(
    settlements: Sequence[Settlement], deliveries: Sequence[Delivery]
) -> Iterator[tuple[Settlement, Delivery]]:
    """Each delivery with its settlement, which for a span is one of several."""
    at = 0
    for settlement in settlements:
        count = settlement.count if isinstance(settlement, Done) else 1
        for delivery in deliveries[at : at + count]:
            yield settlement, delivery
        at += count


def not_done(
    settlements: Sequence[Settlement], deliveries: Sequence[Delivery]
) -> Iterator[tuple[Settlement, Delivery]]:
    """Those of `paired` that are not done; no others are looked at."""
    at = 0
    for settlement in settlements:
        if isinstance(settlement, Done):
            at += settlement.count
        else:
            yield settlement, deliveries[at]
            at += 1


def covered(settlements: Sequence[Settlement]) -> int:
    """How many deliveries they settle."""
    return sum([s.count if isinstance(s, Done) else 1 for s in settlements])


def outbox_of(store: Store) -> Outbox | None:
    """The outbox of a store that has one."""
    return getattr(store, "outbox", None) if store.capabilities.outbox else None


class Transaction(Generic[C]):
    """What an exactly-once handler works through.

    Rows written through ``connection``, messages given to `publish` and the memory that the
    message was handled become true together, or none of them does. ``connection`` is the
    driver's own: do not commit or roll back, duly does, once.
    """

    __slots__ = ("_after_commit", "_ended", "_messages", "_source", "_topics", "connection")

    def __init__(self, connection: C, source: str) -> None:
        self.connection = connection
        self._source = source
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
        message = topic.message(
            payload,
            source=self._source,
            id=id,
            key=key,
            headers=headers,
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
        raises is logged.
        """
        self._check_open("tx.after_commit")
        self._after_commit.append(call)

    def _check_open(self, call: str) -> None:
        if self._ended:
            raise TransactionFailed(
                f"{call} after the transaction ended: it would never happen. Use the transaction "
                "within its handler or block only."
            )


@dataclass(frozen=True, slots=True)
class Mark:
    """How much a transaction had buffered at some point, to return to it."""

    messages: int
    calls: int


def mark(tx: Transaction[Any]) -> Mark:
    """Where the transaction's buffers stand now."""
    return Mark(len(tx._messages), len(tx._after_commit))


def forget_since(tx: Transaction[Any], point: Mark) -> None:
    """Drop what was buffered since ``point``: its handler failed."""
    del tx._messages[point.messages :]
    del tx._after_commit[point.calls :]


def flush(
    tx: Transaction[Any],
    session: Session[Any],
    declare: Callable[[Iterable[Topic[Any]]], None] | None = None,
) -> int:
    """Move buffered messages into the session; returns how many were stored.

    ``declare`` makes their topics known to the broker, where that is another database: whoever
    relays the outbox later may know nothing but a topic's name.

    Raises the `IdentityConflict` of a message whose id was taken by another body. A repeat is
    dropped silently: the event is published already.
    """
    if not tx._messages:
        return 0
    if declare is not None:
        declare(tx._topics.values())
    session.declare(tx._topics.values())
    outcomes = session.publish(tx._messages)
    count = len(tx._messages)
    tx._messages.clear()
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return count


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

"""One transaction of a store in memory, from its fence to its commit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from duly.broker import Capabilities, Delivery, Outcome, Published, Receipt
from duly.errors import CommitUnknown, DulyError, IdentityConflict, TransactionFailed
from duly.guarantees import Dead, Settlement
from duly.message import Message, Topic
from duly.store import Admitted, Scope, paired
from duly.stores.memory.tables import MemoryTables

Identity = tuple[str, str, str]
Moment = Literal["before", "after"]


class Claims(Protocol):
    """What a session needs of the broker that is the same database."""

    @property
    def changed(self) -> AbstractContextManager[Any]:
        """The lock under which all of it changes together."""
        ...

    def preview(
        self, messages: Sequence[Message[Any]], pending: dict[Identity, bytes]
    ) -> Sequence[Outcome]:
        """What publishing would answer; ``pending`` collects this transaction's own ids."""
        ...

    def check_held(self, receipts: Sequence[Receipt]) -> None:
        """Raise `Superseded` unless every receipt still holds its claim."""
        ...

    def commit(
        self,
        fence: Sequence[Receipt],
        settlements: Sequence[Settlement],
        messages: Sequence[Message[Any]],
        effects: Callable[[], None],
    ) -> None:
        """Check the fence, then make all of it true, or none. Raises `Superseded`."""
        ...


class Database(Protocol):
    """A broker that can share its database with a store."""

    @property
    def capabilities(self) -> Capabilities:
        """Its ``database`` names what both live in."""
        ...

    @property
    def claims(self) -> Claims:
        """Its messages and claims."""
        ...

    def declare(self, topics: Sequence[Any]) -> None:
        """Make topics known."""
        ...


class Entrance(Protocol):
    """One way of admission, for one session."""

    def admit(self, deliveries: Sequence[Delivery]) -> Admitted:
        """The fence."""
        ...

    def settle(self, settlement: Settlement, delivery: Delivery) -> None:
        """Hear how one delivery ended."""
        ...

    def check(self) -> None:
        """Raise `Superseded` where the fence no longer holds; called with the lock held."""
        ...

    def apply(self) -> None:
        """Remember what took effect; called with the lock held, cannot fail."""
        ...


class ByClaim:
    """Admission by the claims themselves: broker and store are one database."""

    def __init__(self, claims: Claims) -> None:
        self._claims = claims
        self._admitted: list[Receipt] = []
        self.settlements: list[Settlement] = []

    @property
    def fence(self) -> Sequence[Receipt]:
        """The claims that must still hold at commit: of what ran, or of all that was admitted."""
        return [settlement.receipt for settlement in self.settlements] or self._admitted

    def admit(self, deliveries: Sequence[Delivery]) -> Admitted:
        """Whoever holds the claim may run. Raises `Superseded`."""
        receipts = [delivery.receipt for delivery in deliveries]
        self._claims.check_held(receipts)
        self._admitted += receipts
        return Admitted(list(deliveries))

    def settle(self, settlement: Settlement, delivery: Delivery) -> None:  # noqa: ARG002 - seam
        """Settled with the commit."""
        self.settlements.append(settlement)

    def check(self) -> None:
        """The commit checks the claims itself, under the same lock."""

    def apply(self) -> None:
        """The commit settles them."""


@dataclass(frozen=True, slots=True)
class StoreDead:
    """A message of a log that one consumer gave up on, kept by the store."""

    id: int
    subscription: str
    message: Message[Any]
    error: str
    attempts: int
    at_ms: int


class Home(Protocol):
    """What a session needs of its store."""

    def declare(self, topics: Sequence[Topic[Any]]) -> None:
        """Make known the topics that transactions publish to."""
        ...

    def check_publish(self, message: Message[Any]) -> Outcome:
        """What the outbox would answer."""
        ...

    def fault(self, moment: Moment) -> None:
        """Where a test makes commits fail."""
        ...

    def bury(self, scope: Scope, settlement: Dead, delivery: Delivery) -> None:
        """Keep a dead letter; called with the lock held."""
        ...

    def send(self, messages: Sequence[Message[Any]]) -> None:
        """Put messages into the outbox; called with the lock held."""
        ...

    def ended(self, session: MemorySession) -> None:
        """The next transaction may begin."""
        ...


class MemorySession:
    """See `duly.store.Session`. Dead letters of ``buries_for`` are the store's to keep."""

    def __init__(
        self,
        home: Home,
        lock: AbstractContextManager[Any],
        tables: MemoryTables,
        claims: Claims | None,
        entrance: Entrance | None,
        *,
        buries_for: Scope | None,
    ) -> None:
        self._home = home
        self._lock = lock
        self._tables = tables
        self._claims = claims
        self._entrance = entrance
        self._buries_for = buries_for
        self._messages: list[Message[Any]] = []
        self._pending: dict[Identity, bytes] = {}
        self._dead: list[tuple[Dead, Delivery]] = []
        self._mark = 0

    @property
    def connection(self) -> MemoryTables:
        """The tables, inside the transaction."""
        return self._tables

    def admit(self, deliveries: Sequence[Delivery]) -> Admitted:
        """The fence. Raises `Superseded`, and `BrokerUnusable` for a log that was changed."""
        self._tables.check()
        return self._need_entrance().admit(deliveries)

    def savepoint(self) -> None:
        """Mark the point that `rollback_to_savepoint` returns to."""
        self._tables.mark()
        self._mark = len(self._messages)

    def rollback_to_savepoint(self) -> None:
        """Undo everything since `savepoint` and drop it. Raises `TransactionLost`."""
        self._tables.return_to_mark()
        for message in self._messages[self._mark :]:
            self._pending.pop((message.topic, message.source, message.id), None)
        del self._messages[self._mark :]

    def release_savepoint(self) -> None:
        """Keep everything since `savepoint` and drop it. Raises `TransactionLost`."""
        self._tables.drop_mark()

    def declare(self, topics: Iterable[Topic[Any]]) -> None:
        """Make known the topics that this transaction publishes to."""
        self._home.declare(list(topics))

    def publish(self, messages: Sequence[Message[Any]]) -> Sequence[Outcome]:
        """Put messages into the broker's log or the outbox, as part of the transaction."""
        self._tables.check()
        if self._claims is not None:
            outcomes = self._claims.preview(messages, self._pending)
        else:
            outcomes = [self._home.check_publish(message) for message in messages]
        for message, outcome in zip(messages, outcomes, strict=True):
            # What is refused or a repeat stays out.
            if isinstance(outcome, Published):
                self._messages.append(message)
        return outcomes

    def settle(self, settlements: Sequence[Settlement], deliveries: Sequence[Delivery]) -> None:
        """Record how the deliveries ended; the last statement. Raises `Superseded`."""
        self._tables.check()
        entrance = self._need_entrance()
        for settlement, delivery in paired(settlements, deliveries):
            entrance.settle(settlement, delivery)
            if self._buries_for is not None and isinstance(settlement, Dead):
                self._dead.append((settlement, delivery))
        if isinstance(entrance, ByClaim) and self._claims is not None:
            self._claims.check_held(entrance.fence)

    def commit(self) -> None:
        """Make all of it true, or none. Raises `TransactionLost` where the transaction ended
        before, `Superseded`, `TransactionFailed`, and `CommitUnknown` where a test says so.
        """
        self._tables.check()
        self._fault("before")
        if self._claims is not None:
            self._commit_with_claims(self._claims)
        else:
            with self._lock:
                self._check()
                self._apply()
                self._home.send(self._messages)
        self._end("it was committed")
        self._fault("after")

    def _commit_with_claims(self, claims: Claims) -> None:
        by_claim = self._entrance if isinstance(self._entrance, ByClaim) else None
        fence = by_claim.fence if by_claim else ()
        settlements = by_claim.settlements if by_claim else ()
        with claims.changed:
            self._check()
            try:
                claims.commit(fence, settlements, self._messages, self._apply)
            except IdentityConflict as error:
                raise TransactionFailed(f"rolled back: {error}") from error

    def _check(self) -> None:
        self._tables.check()
        if self._entrance is not None:
            self._entrance.check()

    def _apply(self) -> None:
        self._tables.apply()
        if self._entrance is not None:
            self._entrance.apply()
        if self._buries_for is not None:
            for settlement, delivery in self._dead:
                self._home.bury(self._buries_for, settlement, delivery)

    def _fault(self, moment: Moment) -> None:
        try:
            self._home.fault(moment)
        except DulyError:
            raise
        except Exception as error:
            raise CommitUnknown(f"the answer to COMMIT was lost: {error}") from error

    def rollback(self) -> None:
        """Forget everything; the next transaction may begin. Never raises."""
        self._end("it was rolled back")

    def _end(self, why: str) -> None:
        with self._lock:
            self._tables.end(why)
        self._home.ended(self)

    def _need_entrance(self) -> Entrance:
        if self._entrance is None:
            raise TypeError("this transaction was begun without a scope: it admits nothing")
        return self._entrance

"""`Session`: the open transaction of a store that the worker drives, beneath the handlers' own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

from duly.broker import Ahead, Delivery, Outcome
from duly.errors import DulyError
from duly.guarantees import Admission, Settlement
from duly.message import Message, Topic

C_co = TypeVar("C_co", covariant=True)


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

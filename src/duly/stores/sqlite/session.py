"""One transaction of a SQLite store, from its fence to its commit."""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, assert_never

from duly.broker import Ahead, Delivery, Outcome, Span
from duly.errors import (
    CommitUnknown,
    DulyError,
    Superseded,
    TransactionFailed,
    TransactionInterrupted,
    TransactionLost,
)
from duly.guarantees import Admission, Retry, Settlement
from duly.message import Message, Topic
from duly.sql import cursor, inbox, log
from duly.sql.causes import causes
from duly.sql.sqlite import DatabaseFile, Turn, boot_id
from duly.sql.sqlite.driver import broker_error, error_code, is_no_fault
from duly.sql.sqlite.guard import Guard, GuardedConnection
from duly.sql.steps import Steps
from duly.store import Admitted, Scope

R = TypeVar("R")


@dataclass(slots=True)
class Lane:
    """What a session works with, kept for the next one: a place in the queue, a connection."""

    turn: Turn
    guard: Guard


class Home(Protocol):
    """What a session needs of its store."""

    @property
    def file(self) -> DatabaseFile:
        """The database."""
        ...

    def now_ms(self) -> int:
        """Milliseconds since 1970 UTC."""
        ...

    def boot_ms(self) -> int:
        """Milliseconds since boot."""
        ...

    def unknown(self, topics: Iterable[Topic[Any]]) -> Sequence[Topic[Any]]:
        """Those that have to be declared in this database before they can be published to."""
        ...

    @property
    def flows(self) -> Mapping[inbox.Flow, int]:
        """The numbers of flows of inboxes, where they are known."""
        ...

    def learn(self, topics: log.Catalog, flows: Mapping[inbox.Flow, int]) -> None:
        """What a committed transaction declared and found."""
        ...

    def publish_steps(
        self, messages: Sequence[Message[Any]], declared: log.Catalog
    ) -> Steps[list[Outcome]]:
        """Into the log or the outbox. ``declared``: topics known to this transaction only."""
        ...

    def sweeper(self, consumer: str) -> inbox.Sweeper:
        """Where cleaning this consumer's inbox stands."""
        ...

    def take_back(self, lane: Lane, *, in_doubt: bool) -> None:
        """The session is over; gives the turn back."""
        ...


# In a transaction that holds the write lock nothing else makes SQLite busy. Such a cursor outlives
# the rollback, so its connection is not used again.
_KEPT = (
    "A cursor that the handler keeps is in the middle of an INSERT, UPDATE or DELETE ... "
    "RETURNING: fetch all of its rows, or close it."
)


def new_mark() -> int:
    """A number that tells one transaction from every other."""
    return secrets.randbits(62)


class SQLiteSession:
    """See `duly.store.Session`. Holds the file's one turn to write until it ends."""

    def __init__(self, home: Home, lane: Lane, scope: Scope | None, mark: int) -> None:
        self._home = home
        self._lane: Lane | None = lane
        self._guard = lane.guard
        self._scope = scope
        self._mark = mark
        self._logs: cursor.Logs = {}
        self._flows = inbox.Flows(home.flows)
        # Topics that this transaction declared: everybody's once it stands.
        self._declared: dict[str, log.TopicRecord] = {}
        self._in_doubt = False
        self._saw_savepoint = False
        # By claim, the fence's stamp on the claims says whether this is still its transaction.
        self._stamped = False

    @property
    def connection(self) -> GuardedConnection:
        """The driver's own connection, inside the transaction, for the handler."""
        return self._guard.connection

    def admit(self, deliveries: Sequence[Delivery]) -> Admitted:
        """The fence; the first statement. Raises `Superseded` when a claim was lost."""
        scope = self._scoped()
        match scope.admission:
            case Admission.BY_CLAIM:
                return self._admit_by_claim(scope, deliveries)
            case Admission.BY_CURSOR:
                return self._run(cursor.admit(scope.consumer, self._logs, deliveries))
            case Admission.BY_INBOX:
                now_ms = self._home.now_ms()
                return self._run(inbox.admit(scope, self._flows, deliveries, now_ms, self._mark))
        assert_never(scope.admission)

    def watch_savepoints(self, seen: Callable[[], None]) -> None:
        """See `duly.store.SeesSavepoints`."""

        def saw() -> None:
            self._saw_savepoint = True
            seen()

        self._guard.watch_savepoints(saw)

    def savepoints_left(self) -> bool:
        """See `duly.store.SeesSavepoints`. SQLite does not tell which are open."""
        return self._saw_savepoint

    def savepoint(self) -> None:
        """Mark the point that `rollback_to_savepoint` returns to; one at a time."""
        self._savepoint("savepoint {}")

    def rollback_to_savepoint(self) -> None:
        """Undo everything since `savepoint` and drop it. Raises `TransactionLost`."""
        # Of what was declared, something may be undone with it; declaring again is harmless.
        self._declared.clear()
        self._savepoint("rollback to {}")
        self._savepoint("release {}")

    def release_savepoint(self) -> None:
        """Keep everything since `savepoint` and drop it. Raises `TransactionLost`."""
        self._savepoint("release {}")

    def declare(self, topics: Iterable[Topic[Any]]) -> None:
        """Make known the topics that this transaction publishes to, as part of it."""
        unknown = [t for t in self._home.unknown(topics) if t.name not in self._declared]
        if unknown:
            self._declared.update(self._run(log.declare(unknown)))

    def publish(self, messages: Sequence[Message[Any]]) -> Sequence[Outcome]:
        """Put messages into the broker's log or the outbox, as part of the transaction."""
        return self._run(self._home.publish_steps(messages, self._declared))

    def settle(self, settlements: Sequence[Settlement], deliveries: Sequence[Delivery]) -> None:
        """Record how the deliveries ended; the last statement. Raises `TransactionLost`, and by
        cursor `Superseded`.
        """
        scope = self._scoped()
        match scope.admission:
            case Admission.BY_CLAIM:
                now_ms = self._home.now_ms()
                if any(isinstance(settlement, Retry) for settlement in settlements):
                    # Before a retry is noted by this clock, those noted before a step of it move.
                    self._run(log.follow_clock(boot_id(), now_ms - self._home.boot_ms()))
                self._run(log.settle(settlements, now_ms, self._mark))
                # What settles nothing has not looked for it.
                self._stamped = not settlements
            case Admission.BY_CURSOR:
                self._run(
                    cursor.settle(scope, self._logs, settlements, deliveries, self._home.now_ms())
                )
            case Admission.BY_INBOX:
                self._run(inbox.settle(scope, self._flows, settlements, deliveries, self._mark))
                self._sweep_inbox(scope, len(deliveries))
            case _:
                assert_never(scope.admission)

    def claim(self, ahead: Ahead) -> None:
        """Make the next claim, after `settle`: see `duly.store.ClaimsAhead`."""
        if not isinstance(ahead, log.Ahead):
            raise TypeError(f"{type(ahead).__name__} is no claim on a log of this database")
        self._run(ahead.steps())

    def excuse(self, error: BaseException) -> DulyError | None:
        """See `duly.store.Excuses`: a full disk or one that refuses, no memory left."""
        for cause in causes(error):
            if isinstance(cause, sqlite3.Error) and is_no_fault(cause):
                return TransactionInterrupted(
                    f"rolled back, with all its effects and messages: "
                    f"{broker_error(cause, self._home.file.path)}"
                )
        return None

    def commit(self) -> None:
        """Commit. Raises `TransactionLost` when the transaction is not the one that was begun,
        `TransactionFailed` when it was rolled back (`TransactionInterrupted`: by a full disk),
        `CommitUnknown` when nobody can say.
        """
        if self._lane is None:
            raise TransactionLost("this transaction is over")
        try:
            if self._stamped:
                self._guard.run(log.check_stamp(self._mark))
            self._guard.commit()
        except sqlite3.Error as error:
            busy = self._in_doubt = error_code(error) == sqlite3.SQLITE_BUSY
            reason = _KEPT if busy else broker_error(error, self._home.file.path)
            kind = TransactionInterrupted if is_no_fault(error) else TransactionFailed
            raise kind(
                f"{self._home.file.path}: rolled back, with all its effects and messages: "
                f"{error}. {reason}"
            ) from error
        except CommitUnknown:
            self._in_doubt = True
            raise
        self._home.learn(self._declared, self._flows.found)
        try:
            self._home.file.committed()
            self._home.file.before_release()
        finally:
            self._end()

    def rollback(self) -> None:
        """Roll back whatever is open and give turn and connection back. Never raises."""
        if self._lane is not None:
            # In doubt until it is known to be clean, whatever interrupts this.
            in_doubt, self._in_doubt = self._in_doubt, True
            try:
                self._in_doubt = not self._guard.roll_back() or in_doubt
            finally:
                self._end()

    def _end(self) -> None:
        lane, self._lane = self._lane, None
        if lane is not None:
            try:
                self._home.take_back(lane, in_doubt=self._in_doubt)
            except BaseException:  # interrupted: nobody else knows of it any more
                self._home.take_back(lane, in_doubt=True)
                raise

    def _run(self, steps: Steps[R]) -> R:
        if self._lane is None:
            raise TransactionLost("this transaction is over")
        try:
            return self._guard.run(steps)
        except sqlite3.Error as error:
            raise broker_error(error, self._home.file.path) from error

    def _admit_by_claim(self, scope: Scope, deliveries: Sequence[Delivery]) -> Admitted:
        if isinstance(deliveries, Span):
            receipts = [deliveries.receipt]
        else:
            receipts = [delivery.receipt for delivery in deliveries]
        held = self._run(log.fence(receipts, self._mark))
        self._stamped = True
        if len(held) < len(receipts):
            is_span = isinstance(deliveries, Span)
            lost = "some" if is_span else len(receipts) - len(held)
            raise Superseded(
                f"consumer {scope.consumer!r}: the claim on {lost} of {len(deliveries)} "
                "messages was lost to another worker; nothing was run"
            )
        return Admitted(deliveries)

    def _savepoint(self, statement: str) -> None:
        try:
            self._guard.execute(statement.format(self._guard.savepoint))
        except sqlite3.Error as error:
            if error_code(error) == sqlite3.SQLITE_BUSY:
                self._in_doubt = True
                raise TransactionFailed(f"{self._home.file.path}: {error}. {_KEPT}") from error
            raise TransactionLost(
                f"{self._home.file.path}: the savepoint of this message is gone ({error}): the "
                "transaction ended behind duly's back and nothing of it was kept"
            ) from error

    def _sweep_inbox(self, scope: Scope, admitted: int) -> None:
        """Clean twice as fast as it fills, so that it never holds much more than it must."""
        sweeper = self._home.sweeper(scope.consumer)
        sweeper.admitted += admitted
        if sweeper.admitted * 2 >= inbox.STRETCH:
            retention_ms = int(scope.inbox_retention_s * 1000)
            self._run(inbox.forget_old(sweeper, self._home.now_ms(), retention_ms))

    def _scoped(self) -> Scope:
        if self._scope is None:
            raise TypeError("this transaction was begun without a scope: it admits nothing")
        return self._scope

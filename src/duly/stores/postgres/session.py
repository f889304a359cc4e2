"""One transaction of a PostgreSQL store, from its fence to its commit.

Written once for both colours: a `Line` runs its steps on a blocking connection, or on an async
one, where every statement is awaited on the connection's own loop.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol, TypeVar, assert_never

import psycopg

from duly.broker import Ahead, Delivery, Outcome, Span
from duly.errors import (
    CommitUnknown,
    DulyError,
    Superseded,
    TransactionInterrupted,
    TransactionLost,
)
from duly.guarantees import Admission, Settlement
from duly.message import Message, Topic
from duly.sql import cursor, inbox
from duly.sql.causes import causes
from duly.sql.postgres import Line
from duly.sql.postgres.errors import broker_error, interrupted, is_conflict
from duly.sql.postgres.guard import Restored, guard
from duly.sql.postgres.transactions import Isolation, Say, commit, roll_back
from duly.sql.steps import Steps
from duly.store import Admitted, Scope
from duly.stores.postgres.log import BrokerLog

R = TypeVar("R")


class Home(Protocol):
    """What a session needs of its store."""

    @property
    def shown(self) -> str:
        """The database, for people."""
        ...

    @property
    def log(self) -> BrokerLog | None:
        """The broker's log, where that is in the same database."""
        ...

    @property
    def isolation(self) -> Isolation:
        """Of its transactions."""
        ...

    @property
    def flows(self) -> Mapping[inbox.Flow, int]:
        """The numbers of flows of inboxes, where they are known."""
        ...

    def now_ms(self) -> int:
        """Milliseconds since 1970 UTC."""
        ...

    def know(self, topics: Iterable[Topic[Any]]) -> None:
        """Topics that may be put into the outbox."""
        ...

    def put(self, messages: Sequence[Message[Any]]) -> Steps[list[Outcome]]:
        """Into the outbox."""
        ...

    def number(self, flows: Iterable[inbox.Flow]) -> None:
        """See that the numbers of these are known."""
        ...

    def filled(self) -> None:
        """A transaction that put something into the outbox stands."""
        ...

    def sweeper(self, consumer: str) -> inbox.Sweeper:
        """Where cleaning this consumer's inbox stands."""
        ...


class Lent(Protocol):
    """A connection for the length of a session."""

    @property
    def line(self) -> Line:
        """It."""
        ...

    def give_back(self, *, in_doubt: bool) -> None:
        """It is free again. Never raises."""
        ...


def new_mark() -> int:
    """A number that tells one transaction from every other."""
    return secrets.randbits(62)


class PostgresSession:
    """See `duly.store.Session`. Its transaction was begun with ``mark``."""

    def __init__(self, home: Home, lent: Lent, scope: Scope | None, mark: int) -> None:
        self._home = home
        self._lent: Lent | None = lent
        self._line = lent.line
        self._scope = scope
        self._mark = mark
        self._logs: cursor.Logs = {}
        self._flows = inbox.Flows(home.flows)
        self._declared: list[Any] = []
        # What the settlement has taken for the next claim; see `locks.with_turn`.
        self._turns: set[int] = set()
        self._published = False
        self._in_doubt = False
        # Not to be guessed, so that a handler's savepoints are not these.
        self._savepoint = f"duly_{secrets.token_hex(8)}"
        self._guarded: Restored = guard(self._line.connection)

    @property
    def connection(self) -> Any:
        """The driver's own connection, inside the transaction, for the handler."""
        return self._line.connection

    def admit(self, deliveries: Sequence[Delivery]) -> Admitted:
        """The fence; the first statement. Raises `Superseded` when a claim was lost."""
        scope = self._scoped()
        match scope.admission:
            case Admission.BY_CLAIM:
                return self._admit_by_claim(scope, deliveries)
            case Admission.BY_CURSOR:
                return self._run(cursor.admit(scope.consumer, self._logs, deliveries))
            case Admission.BY_INBOX:
                # Beforehand: who adds one in here keeps all others of its flow waiting.
                self._home.number(inbox.flows_of(scope.consumer, deliveries))
                now_ms = self._home.now_ms()
                return self._run(inbox.admit(scope, self._flows, deliveries, now_ms, self._mark))
        assert_never(scope.admission)

    def watch_savepoints(self, seen: Callable[[], None]) -> None:
        """See `duly.store.SeesSavepoints`."""
        self._guarded.nesting.seen = seen

    def savepoints_left(self) -> bool:
        """See `duly.store.SeesSavepoints`."""
        return self._guarded.nesting.may_be_open

    def savepoint(self) -> None:
        """Mark the point that `rollback_to_savepoint` returns to; one at a time."""
        self._say(f"savepoint {self._savepoint}")

    def rollback_to_savepoint(self) -> None:
        """Undo everything since `savepoint` and drop it. Raises `TransactionLost`."""
        # Of what was declared, something may be undone with it; declaring again is harmless.
        self._declared.clear()
        self._refuse_open_block()
        self._say(f"rollback to {self._savepoint}; release {self._savepoint}")

    def release_savepoint(self) -> None:
        """Keep everything since `savepoint` and drop it. Raises `TransactionLost`."""
        self._refuse_open_block()
        self._say(f"release {self._savepoint}")

    def declare(self, topics: Iterable[Topic[Any]]) -> None:
        """Make known the topics that this transaction publishes to, as part of it."""
        log = self._home.log
        if log is None:
            self._home.know(topics)
        elif unknown := log.unknown(topics):
            self._declared.append(self._run(log.declare(unknown)))

    def publish(self, messages: Sequence[Message[Any]]) -> Sequence[Outcome]:
        """Put messages into the broker's log or the outbox, as part of the transaction."""
        self._published = True
        log = self._home.log
        if log is None:
            return self._run(self._home.put(messages))
        return self._run(log.publish(messages, self._home.now_ms(), self._declared))

    def settle(self, settlements: Sequence[Settlement], deliveries: Sequence[Delivery]) -> None:
        """Record how the deliveries ended; the last statement. Raises `TransactionLost`, and by
        cursor `Superseded`.
        """
        self._refuse_open_block()
        scope, now_ms = self._scoped(), self._home.now_ms()
        match scope.admission:
            case Admission.BY_CLAIM:
                self._run(self._log().settle(settlements, now_ms, self._mark, self._turns))
            case Admission.BY_CURSOR:
                self._run(cursor.settle(scope, self._logs, settlements, deliveries, now_ms))
            case Admission.BY_INBOX:
                self._run(inbox.settle(scope, self._flows, settlements, deliveries, self._mark))
                self._sweep_inbox(scope, len(deliveries))
            case _:
                assert_never(scope.admission)

    def claim(self, ahead: Ahead) -> None:
        """Make the next claim, after `settle`: see `duly.store.ClaimsAhead`.

        A claim waits for its turn and then looks what is claimed already. A transaction that
        keeps its first snapshot would look at what was claimed before its handlers ran, and
        claim that again: there the lane claims for itself.
        """
        if self._home.isolation == "read committed":
            self._run(self._log().claim(ahead, self._turns))

    def start_pipeline(self) -> None:
        """See `duly.store.Pipelines`."""
        self._line.start_pipeline()

    def end_pipeline(self) -> None:
        """See `duly.store.Pipelines`. Raises the driver's error of the handlers' statements."""
        self._line.end_pipeline()

    def excuse(self, error: BaseException) -> DulyError | None:
        """See `duly.store.Excuses`: a conflict with another transaction, a lost connection."""
        for cause in causes(error):
            if is_conflict(cause):
                return interrupted(cause, self._home.shown)
        if self._line.connection.closed:
            return TransactionInterrupted(
                f"{self._home.shown}: the connection was lost in the middle of a transaction, of "
                "which the server keeps nothing. It is done again."
            )
        return None

    def commit(self) -> None:
        """Commit. Raises `TransactionLost` when the transaction is not the one that was begun,
        `TransactionFailed` when it was rolled back, `CommitUnknown` when nobody can say.
        """
        if self._lent is None:
            raise TransactionLost("this transaction is over")
        self._refuse_open_block()
        try:
            self._line.run(commit(self._line.connection, self._mark, self._home.shown))
        except CommitUnknown:
            self._in_doubt = True
            raise
        log = self._home.log
        if log is not None:
            log.learn(self._declared)
        if self._published:
            (self._home.filled if log is None else log.committed)()
        self._end()

    def rollback(self) -> None:
        """Roll back whatever is open and give the connection back. Never raises."""
        if self._lent is not None:
            # In doubt until it is known to be clean, whatever interrupts this.
            in_doubt, self._in_doubt = self._in_doubt or self._guarded.nesting.blocks > 0, True
            try:
                with suppress(psycopg.Error):
                    self._line.end_pipeline()
                if not in_doubt:
                    self._in_doubt = not self._line.run(roll_back(self._line.connection))
            finally:
                self._end()

    def _end(self) -> None:
        lent, self._lent = self._lent, None
        if lent is not None:
            self._guarded.restore()
            lent.give_back(in_doubt=self._in_doubt)

    def _run(self, steps: Steps[R]) -> R:
        if self._lent is None:
            raise TransactionLost("this transaction is over")
        try:
            return self._line.run(steps)
        except psycopg.errors.InFailedSqlTransaction as error:
            raise TransactionLost(
                f"{self._home.shown}: a statement before this one failed and its error was "
                "swallowed; PostgreSQL keeps nothing of such a transaction"
            ) from error
        except psycopg.Error as error:
            if is_conflict(error):
                raise interrupted(error, self._home.shown) from error
            raise broker_error(error, self._home.shown) from error

    def _say(self, text: str) -> None:
        if self._lent is None:
            raise TransactionLost("this transaction is over")
        try:
            self._line.run(_spoken(text))
        except psycopg.Error as error:
            raise TransactionLost(
                f"{self._home.shown}: the savepoint of this message is gone ({error}): the "
                "transaction ended behind duly's back and nothing of it was kept"
            ) from error

    def _refuse_open_block(self) -> None:
        """Whoever ends such a block later, the garbage collector at the latest, would undo with
        it what is others' by then.
        """
        if self._guarded.nesting.blocks:
            raise TransactionLost(
                f"{self._home.shown}: a block of connection.transaction() was not ended by the "
                "call that began it. Use it in a with statement, and nowhere in a generator that "
                "may be left half-way. Nothing of this transaction was kept."
            )

    def _admit_by_claim(self, scope: Scope, deliveries: Sequence[Delivery]) -> Admitted:
        if isinstance(deliveries, Span):
            receipts = [deliveries.receipt]
        else:
            receipts = [delivery.receipt for delivery in deliveries]
        held = self._run(self._log().fence(receipts, self._mark))
        if held < len(receipts):
            lost = "some" if isinstance(deliveries, Span) else len(receipts) - held
            raise Superseded(
                f"consumer {scope.consumer!r}: the claim on {lost} of {len(deliveries)} "
                "messages was lost to another worker; nothing was run"
            )
        return Admitted(deliveries)

    def _sweep_inbox(self, scope: Scope, admitted: int) -> None:
        """Clean twice as fast as it fills, so that it never holds much more than it must."""
        sweeper = self._home.sweeper(scope.consumer)
        sweeper.admitted += admitted
        if sweeper.admitted * 2 >= inbox.STRETCH:
            retention_ms = int(scope.inbox_retention_s * 1000)
            self._run(inbox.forget_old(sweeper, self._home.now_ms(), retention_ms))

    def _log(self) -> BrokerLog:
        log = self._home.log
        assert log is not None, "begin refuses a scope by claim where there is no log"
        return log

    def _scoped(self) -> Scope:
        if self._scope is None:
            raise TypeError("this transaction was begun without a scope: it admits nothing")
        return self._scope


def _spoken(text: str) -> Steps[None]:
    yield Say(text)

"""One transaction's beginning and its end, as steps for a driver of either colour.

A COMMIT ends in one of three ways: committed; certainly not; or nobody can say. PostgreSQL
answers the COMMIT of a transaction in which a statement failed with ROLLBACK, and no driver
raises: so the status is looked at before, and the answer after.

Where a handler speaks too, a transaction is known by a mark, a setting that ends with it.
COMMIT is sent in one message behind a statement that fails where the mark is another: who ended
the transaction and went on in a new one does not get that committed.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Literal, NamedTuple

import psycopg
from psycopg.pq import TransactionStatus

from duly.errors import CommitUnknown, TransactionFailed, TransactionInterrupted, TransactionLost
from duly.sql.postgres.errors import code, ended_session, first_line, interrupted, is_conflict

Isolation = Literal["read committed", "repeatable read", "serializable"]

AnyConnection = psycopg.Connection[Any] | psycopg.AsyncConnection[Any]


class Say(NamedTuple):
    """Run statements without name or parameters; receives what the last was answered with."""

    text: str

    def by(self, executor: Any) -> Any:
        """Done by this driver; of an async one, to be awaited."""
        return executor.say(self.text)


Spoken = Generator[Say, Any, None]

# A statement that divides by zero where the mark is not this transaction's.
_CHECK = "select 1 / (coalesce(current_setting('duly.mark', true), '') = '{}')::int"
_LOST = (
    "the transaction ended before its commit: the handler ended it with SQL of its own "
    "(COMMIT, ROLLBACK). Remove that; to undo everything, let an exception leave the handler."
)
_FAILED_INSIDE = (
    "a statement inside failed, its error was swallowed, and PostgreSQL keeps nothing of such "
    "a transaction. Let errors of statements leave the handler, or put a savepoint around them "
    "(with connection.transaction())."
)


def begin(
    mark: int | None,
    *,
    isolation: Isolation = "read committed",
    statement_s: float | None = None,
    idle_s: float | None = None,
    lock_s: float | None = None,
    durable: bool = True,
    fits: str | None = None,
) -> Spoken:
    """Begin a transaction, which ``mark`` tells from every other; None: nobody but duly speaks in
    it.

    ``statement_s``, ``idle_s`` and ``lock_s`` are the server's deadlines for one statement, for
    standing idle, and for waiting for a lock. None: as the role or database has it. ``fits`` is
    SQL that is true where this code may write; where it is not, see `is_left_behind`.
    """
    # What is looked up by index in a large table looks dear to the planner, and compiling it takes
    # the server a hundred times as long as doing it.
    said = [f"begin isolation level {isolation}", "set local jit = off"]
    for name, seconds in (
        ("statement_timeout", statement_s),
        ("idle_in_transaction_session_timeout", idle_s),
        ("lock_timeout", lock_s),
    ):
        if seconds is not None:  # a third of what set_config takes, which has to be planned
            said.append(f"set local {name} = {max(1, int(seconds * 1000))}")
    # A role may have it off: what was acknowledged would die with the server.
    settings = [_set("synchronous_commit", _AT_LEAST_ON if durable else "'off'")]
    if mark is not None:
        settings.append(_set("duly.mark", f"'{mark}'"))
    if fits is not None:
        settings.append(f"1 / {fits}::int")
    yield Say(f"{'; '.join(said)}; select {', '.join(settings)}")


def session_settings(statement_s: float) -> str:
    """SQL that sets for a session what `begin` sets for a transaction, its isolation included."""
    milliseconds = max(1, int(statement_s * 1000))
    settings = (
        _set("default_transaction_isolation", "'read committed'", for_session=True),
        _set("statement_timeout", f"'{milliseconds}'", for_session=True),
        _set("synchronous_commit", _AT_LEAST_ON, for_session=True),
    )
    return f"select {', '.join(settings)}"


def is_left_behind(error: psycopg.Error) -> bool:
    """Whether newer code may have changed the tables: what asks was divided by that they fit; or,
    by itself a transaction, it did not come to ask, for its tables or columns are others.
    """
    return code(error) == "22012" or code(error).startswith("42")


_AT_LEAST_ON = (
    "case current_setting('synchronous_commit') when 'off' then 'on' "
    "else current_setting('synchronous_commit') end"
)


def _set(name: str, value: str, *, for_session: bool = False) -> str:
    return f"set_config('{name}', {value}, {str(not for_session).lower()})"


def commit(connection: AnyConnection, mark: int | None, shown: str) -> Spoken:
    """Commit the transaction that was begun with this mark.

    Raises `TransactionLost` where it is another, none, or failed inside; `TransactionFailed`
    (`TransactionInterrupted`) when it certainly did not commit; and `CommitUnknown`.
    """
    _check(connection.info.transaction_status, shown)
    try:
        answer = yield Say("commit" if mark is None else f"{_CHECK.format(mark)}; commit")
    except psycopg.Error as error:
        raise _meaning(error, connection, shown) from error
    if answer != "COMMIT":
        raise TransactionLost(f"{shown}: COMMIT was answered with {answer}: {_FAILED_INSIDE}")


def _check(status: TransactionStatus, shown: str) -> None:
    match status:
        case TransactionStatus.INTRANS:
            return
        case TransactionStatus.INERROR:
            raise TransactionLost(f"{shown}: {_FAILED_INSIDE}")
        case TransactionStatus.IDLE:
            raise TransactionLost(f"{shown}: {_LOST}")
        case TransactionStatus.ACTIVE:
            raise TransactionLost(
                f"{shown}: the handler left a statement running (a COPY, a stream): end it "
                "before the handler returns. Nothing was kept."
            )
        case _:
            raise TransactionInterrupted(
                f"{shown}: the connection was lost before COMMIT was sent; the server keeps "
                "nothing of it"
            )


def _meaning(error: psycopg.Error, connection: AnyConnection, shown: str) -> Exception:
    """What a COMMIT that failed so means.

    An answer of the server on a connection that goes on is certain: it refused. A server that
    ends a session may do so after the commit was written. Standing idle is certain too: so it
    stood when COMMIT came.
    """
    if code(error) == "25P03":
        return interrupted(error, shown)
    if connection.closed or not code(error) or ended_session(error):
        return CommitUnknown(
            f"{shown}: COMMIT was sent and its answer lost ({first_line(error)}). Whether it "
            "stands shows when the message comes again."
        )
    if code(error) == "22012":
        return TransactionLost(f"{shown}: {_LOST}")
    if code(error) == "25P02":
        return TransactionLost(f"{shown}: {_FAILED_INSIDE}")
    if is_conflict(error):
        return interrupted(error, shown)
    return TransactionFailed(
        f"{shown}: rolled back, with all its effects and messages: {first_line(error)}"
    )


def roll_back(connection: AnyConnection) -> Generator[Say, Any, bool]:
    """Roll back what is open; False: not even that went well, discard the connection."""
    if connection.closed:
        return False
    try:
        status = connection.info.transaction_status
        if status in (TransactionStatus.INTRANS, TransactionStatus.INERROR):
            yield Say("rollback")
        return connection.info.transaction_status == TransactionStatus.IDLE
    except psycopg.Error:
        return False

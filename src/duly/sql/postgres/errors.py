"""What PostgreSQL's errors, and the driver's, mean to duly. No connection string is quoted."""

from __future__ import annotations

import psycopg

from duly.errors import (
    BrokerError,
    BrokerUnavailable,
    BrokerUnusable,
    ConfigurationError,
    TransactionInterrupted,
)

# Another transaction stood in the way; done again, it may go well.
_CONFLICTS = frozenset({"40001", "40P01"})
# By class, or by code where a class is of both kinds: cannot be used just now.
_FOR_NOW = frozenset(
    {
        "08",  # the connection
        "53",  # out of disk, memory, connections
        "57",  # cancelled, shut down, starting up, a statement's deadline
        "58",  # I/O
        "25P03",  # idle in transaction for too long
        "25P04",  # a transaction's deadline
        "25006",  # read-only: a standby, or a primary that has become one
        "55P03",  # a lock's deadline
        "55006",  # in use
        *_CONFLICTS,
    }
)
_WHAT_TO_DO = {
    "28": "Look at user, password and pg_hba.conf.",
    "3D000": "Create the database, or name another.",
    "3F000": "Create the schema, or let a role that may create it start duly once.",
    "42501": "Grant the role what the page on PostgreSQL lists.",
    "53100": "The disk is full: make room.",
    "53300": "Raise max_connections, or let fewer connections be opened.",
    "25006": "This server only reads (a standby?): name the primary, or several hosts with "
    "target_session_attrs=read-write.",
    "25P03": "The transaction stood idle for longer than its handler may run.",
    "57014": "A statement ran into its deadline, or was cancelled.",
    "57P01": "An administrator ended the session.",
    "57P03": "The server starts up or shuts down.",
    "55P03": "Another transaction holds a lock: look for one that is open for long.",
}
_DEFECT = (
    "One of duly's own statements failed: its tables were altered, or this is a defect of duly."
)


def code(error: BaseException) -> str:
    """The SQLSTATE; empty where the driver itself objected."""
    return getattr(error, "sqlstate", None) or ""


def is_conflict(error: BaseException) -> bool:
    """Whether another transaction stood in the way: a deadlock, a serialization failure."""
    return code(error) in _CONFLICTS


def ended_session(error: psycopg.Error) -> bool:
    """Whether the server ended the session with this."""
    return error.diag.severity_nonlocalized in ("FATAL", "PANIC")


def is_driver_error(error: BaseException) -> bool:
    """Whether the driver raised this."""
    return isinstance(error, psycopg.Error)


def broker_error(error: psycopg.Error, shown: str) -> BrokerError:
    """What an error in one of duly's own statements means.

    Only for errors before COMMIT was sent, or where it certainly failed.
    """
    sqlstate, text = code(error), first_line(error)
    advice = _WHAT_TO_DO.get(sqlstate) or _WHAT_TO_DO.get(sqlstate[:2], "")
    if is_for_now(error):
        return BrokerUnavailable(f"{shown}: {text}; nothing was changed. {advice}".rstrip())
    if advice:
        return BrokerUnusable(f"{shown}: {text}. {advice}")
    return BrokerUnusable(f"{shown}: {text} ({type(error).__name__} {sqlstate}). {_DEFECT}")


def is_for_now(error: psycopg.Error) -> bool:
    """Whether trying again later may go well."""
    sqlstate = code(error)
    if not sqlstate:
        # A connection that broke or could not be made has no code; what the driver itself
        # refuses (a value that cannot be dumped) is for good.
        return isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)
    return sqlstate in _FOR_NOW or sqlstate[:2] in _FOR_NOW


def interrupted(error: BaseException, shown: str) -> TransactionInterrupted:
    """The transaction is to be done again."""
    why = first_line(error)
    return TransactionInterrupted(
        f"{shown}: rolled back, with all its effects and messages: {why}. It is done again."
    )


def wrong_url(shown: str) -> ConfigurationError:
    """Of a connection string; the driver's own words would quote it, password and all."""
    return ConfigurationError(
        f"{shown!r} is no connection string that libpq understands: "
        "postgresql://user@host:5432/database?option=value"
    )


def first_line(error: BaseException) -> str:
    """An error's text without DETAIL and CONTEXT, which may quote rows."""
    return str(error).strip().partition("\n")[0] or type(error).__name__

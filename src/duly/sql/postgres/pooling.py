"""What stands between this process and the server: nothing, or a pooler such as PgBouncer.

In transaction mode a pooler lends a session of the server's for the length of a transaction.
What outlives one is then found by somebody else, or by nobody: prepared statements, LISTEN,
advisory locks of the session, SET, temporary tables. duly uses the first three where it may, and
SET on sessions that are its own alone (`duly.sql.postgres.autocommit`): elsewhere what it sets, it
sets for its transaction. Temporary tables it has none.

A pooler is recognised by the process id. The server tells each client that of the process which
serves it; a pooler makes one up, because it has to find the session by it when the client
cancels a statement. Which mode it is in cannot be asked, so it is taken for transaction mode
until the URL says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from duly.errors import ConfigurationError

_MODES = ("transaction", "session")
_SWITCH = {"on": True, "off": False}


@dataclass(frozen=True, slots=True)
class Said:
    """What a URL says about the way to the server; None: nothing."""

    pooler: str | None = None
    prepare: bool | None = None


@dataclass(frozen=True, slots=True)
class Way:
    """``pooled``: sessions are lent by the transaction. ``prepares``: statements are prepared on
    the server once they have been used some times.
    """

    pooled: bool
    prepares: bool


def split(url: str) -> tuple[str, Said]:
    """The URL as libpq understands it, and what its ``pooler`` and ``prepare`` say.

    Raises `ConfigurationError` for a value that neither has.
    """
    address, _, query = url.partition("?")
    pairs = [pair.partition("=") for pair in query.split("&")]
    said = {name: value for name, _, value in pairs if name in ("pooler", "prepare")}
    if not said:
        return url, Said()
    rest = "&".join("".join(pair) for pair in pairs if pair[0] not in said)
    return (f"{address}?{rest}" if rest else address), _read(said)


def _read(said: dict[str, str]) -> Said:
    pooler, prepare = said.get("pooler"), said.get("prepare")
    if pooler is not None and pooler not in _MODES:
        raise ConfigurationError(f"pooler={pooler!r}: there are {', '.join(_MODES)}")
    if prepare is not None and prepare not in _SWITCH:
        raise ConfigurationError(f"prepare={prepare!r}: there are {', '.join(_SWITCH)}")
    return Said(pooler, None if prepare is None else _SWITCH[prepare])


def way(said: Said, connection: Any, served_by: int) -> Way:
    """How this connection reaches the server. ``served_by``: `pg_backend_pid()`, asked on it."""
    recognised = connection.info.backend_pid != served_by
    pooled = said.pooler == "transaction" or (said.pooler is None and recognised)
    return Way(pooled, not pooled if said.prepare is None else said.prepare)

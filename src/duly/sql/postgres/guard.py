"""The connection a handler gets: everything but ending the transaction, which is duly's.

``conn.commit()`` and ``with conn:`` would end it silently and split the effects from the memory
of the message. A guarded connection is the driver's own object under a class that refuses them,
for as long as the transaction lasts; its cursors refuse SQL that would end it. Whoever gets
around both (a cursor of another class, libpq itself) is found before COMMIT, by the
transaction's mark: see `duly.sql.postgres.transactions`. Savepoints of a handler's own are noted
on the way: see `Nesting`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any, NamedTuple, NoReturn

import psycopg
from psycopg import sql

from duly.errors import ConfigurationError

_INSTEAD = (
    "This transaction is duly's: it commits your rows, the memory of the message and what you "
    "publish together, once the handler has returned. "
)
_ENDS = _INSTEAD + "Remove the call; to undo everything, let an exception leave the handler."

# Set back after each transaction: what a handler set for itself is not the next one's.
_SETTINGS = ("row_factory", "cursor_factory", "server_cursor_factory", "prepare_threshold")


def guard(connection: Any) -> Restored:
    """Guard a connection; what is returned takes the guard off again."""
    restored = Restored(connection)
    connection.cursor_factory = _guarded_cursor(connection.cursor_factory)
    kind: Any = type(connection)
    connection.__class__ = _guarded(kind)
    return restored


class Restored:
    """A connection as it was before it was guarded."""

    __slots__ = ("_class", "_connection", "_settings", "nesting")

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._class = type(connection)
        self._settings = [(name, getattr(connection, name)) for name in _SETTINGS]
        self.nesting = Nesting()
        setattr(connection, _NESTING, self.nesting)

    def restore(self) -> None:
        """Take the guard off, and back what a handler set."""
        self._connection.__class__ = self._class
        delattr(self._connection, _NESTING)
        for name, value in self._settings:
            setattr(self._connection, name, value)


class Nesting:
    """The savepoints that a handler sets in a transaction, as far as they can be seen.

    A block, ``with connection.transaction()``, ends with the call that began it unless somebody
    keeps it; of SQL that says SAVEPOINT nobody knows. ``seen`` is called in the middle of either.
    """

    __slots__ = ("_spoken", "blocks", "seen")

    def __init__(self) -> None:
        self.seen: Callable[[], None] | None = None
        self.blocks = 0
        self._spoken = False

    @property
    def may_be_open(self) -> bool:
        """Whether there may be one now."""
        return self._spoken or self.blocks > 0

    def speak(self) -> None:
        """Some SQL is about a savepoint."""
        self._spoken = True
        self._note()

    @contextmanager
    def block(self) -> Iterator[None]:
        """Around a block of the driver's."""
        self.blocks += 1
        self._note()
        try:
            yield
        finally:
            self.blocks -= 1

    def _note(self) -> None:
        if self.seen is not None:
            self.seen()


def is_guarded(connection: Any) -> bool:
    """Whether this is a connection inside a transaction of duly's."""
    return getattr(type(connection), _MARK, False)


# --- connections


def _refuse(what: str) -> Any:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise ConfigurationError(_denied(what))

    return refuse


def _refuse_setting(kind: type[Any], name: str) -> Any:
    # Reading stays as it is: the driver itself looks at autocommit.
    read = getattr(kind, name)
    return property(read.fget, _refuse(f"connection.{name} = ..."))


_MARK = "_duly_guarded"
_NESTING = "_duly_nesting"
_CALLS: Mapping[str, Any] = {
    **{
        name: _refuse(f"connection.{name}()")
        for name in (
            *("commit", "rollback", "close"),
            *("tpc_begin", "tpc_prepare", "tpc_commit", "tpc_rollback"),
        )
    },
    "__enter__": _refuse("'with connection:', which commits at its end"),
    "__aenter__": _refuse("'async with connection:', which commits at its end"),
}
_MODES = ("autocommit", "isolation_level", "read_only", "deferrable")


@functools.cache
def _guarded(kind: type[Any]) -> type[Any]:
    """This class of connections, guarded. Cached: there are two, and an application's own."""
    # One base and no slots: of the same layout, to be put on an object that is there.
    members: dict[str, Any] = {"__slots__": (), _MARK: True, "transaction": _noted_block(kind)}
    members |= {name: refuse for name, refuse in _CALLS.items() if hasattr(kind, name)}
    for name in _MODES:
        members[name] = _refuse_setting(kind, name)
        members[f"set_{name}"] = _refuse(f"connection.set_{name}()")
    return type(f"Guarded{kind.__name__}", (kind,), members)


def _noted_block(kind: type[Any]) -> Any:
    """Its ``transaction()``, as one that is noted."""

    @asynccontextmanager
    async def on_loop(self: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        with getattr(self, _NESTING).block():
            async with kind.transaction(self, *args, **kwargs) as block:
                yield block

    @contextmanager
    def blocking(self: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        with getattr(self, _NESTING).block(), kind.transaction(self, *args, **kwargs) as block:
            yield block

    return on_loop if issubclass(kind, psycopg.AsyncConnection) else blocking


def _denied(what: str) -> str:
    return f"The handler called {what}. {_ENDS}"


# --- cursors


@functools.cache
def _guarded_cursor(kind: type[Any]) -> type[Any]:
    """This class of cursors, refusing SQL that would end the transaction."""
    if issubclass(kind, psycopg.AsyncCursor):
        return type(f"Guarded{kind.__name__}", (_AsyncCursorGuard, kind), {"__slots__": ()})
    return type(f"Guarded{kind.__name__}", (_CursorGuard, kind), {"__slots__": ()})


class _CursorGuard:
    __slots__ = ()

    def execute(self, query: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_end(query, self)
        return super().execute(query, *args, **kwargs)  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]

    def executemany(self, query: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_end(query, self)
        return super().executemany(query, *args, **kwargs)  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]


class _AsyncCursorGuard:
    __slots__ = ()

    # No coroutines around the driver's: each statement would pay for one more.

    def execute(self, query: Any, *args: Any, **kwargs: Any) -> Awaitable[Any]:
        refuse_end(query, self)
        return super().execute(query, *args, **kwargs)  # type: ignore[misc,no-any-return]  # pyright: ignore[reportAttributeAccessIssue]

    def executemany(self, query: Any, *args: Any, **kwargs: Any) -> Awaitable[Any]:
        refuse_end(query, self)
        return super().executemany(query, *args, **kwargs)  # type: ignore[misc,no-any-return]  # pyright: ignore[reportAttributeAccessIssue]


def refuse_end(query: Any, cursor: Any) -> None:
    """Raise `ConfigurationError` for SQL that would end the transaction; note savepoints."""
    if isinstance(query, str):
        text = query
    elif isinstance(query, bytes):
        text = query.decode("utf-8", "replace")
    elif isinstance(query, sql.Composable):
        text = query.as_string(cursor)
    else:
        return  # a template: its text is the driver's to make, and the mark finds what it ends
    found = found_in(text)
    if found.ends is not None:
        raise ConfigurationError(f"The handler executed {found.ends}. {_ENDS}")
    if found.savepoint and (nesting := getattr(cursor.connection, _NESTING, None)) is not None:
        nesting.speak()


class Found(NamedTuple):
    """What some SQL does to the transaction around it: the statement that would end it, and
    whether it is about a savepoint.
    """

    ends: str | None = None
    savepoint: bool = False


_NOTHING = Found()
# A statement that holds none of these words does neither: that spares nearly all a closer look.
_SUSPECT = re.compile(r"\b(?:commit|rollback|abort|end|prepare|savepoint|release)\b", re.IGNORECASE)
_PIECES = re.compile(
    r"""
    --[^\n]*                                  # comments
    | /\*(?:[^*]|\*(?!/))*\*/
    | \$(?P<tag>\w*)\$.*?\$(?P=tag)\$         # a body
    | [eE]'(?:[^'\\]|\\.|'')*'                # strings, names
    | '(?:[^']|'')*'
    | "(?:[^"]|"")*"
    | (?P<word>\w+)
    | (?P<end>;)
    """,
    re.VERBOSE | re.DOTALL,
)


@functools.lru_cache(maxsize=1024)
def found_in(text: str) -> Found:
    """What this SQL would do to the transaction around it."""
    if not _SUSPECT.search(text):
        return _NOTHING
    savepoint = False
    for words in _statements(text):
        if _ends(words):
            return Found(" ".join(words[:3]).upper())
        savepoint |= words[0] in ("savepoint", "release", "rollback")
    return Found(savepoint=savepoint)


def _ends(words: list[str]) -> bool:
    first, rest = words[0], words[1:]
    if first in ("commit", "end", "abort"):
        return True
    if first == "rollback":
        # ROLLBACK [WORK | TRANSACTION] TO a savepoint ends nothing.
        return not (rest[:1] == ["to"] or rest[1:2] == ["to"])
    return first == "prepare" and rest[:1] == ["transaction"]


def _statements(text: str) -> Iterator[list[str]]:
    """The first words of each statement."""
    words: list[str] = []
    for piece in _PIECES.finditer(text):
        if piece["end"]:
            if words:
                yield words
            words = []
        elif piece["word"] and len(words) < 4:
            words.append(piece["word"].lower())
    if words:
        yield words

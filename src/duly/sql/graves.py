"""Dead letters that a store keeps for a broker which keeps none.

A letter is known by its consumer and message, the body included: of two messages with one id and
two bodies both are kept. Whoever buries a letter a second time changes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from typing import Any, Protocol, TypeVar

import msgspec

from duly.inspection import DeadLetter, Selection
from duly.sql.looking import readable
from duly.sql.steps import Ask, Each, Many, Steps

R = TypeVar("R")

_encode_headers = msgspec.json.Encoder().encode


def bury(letters: Sequence[DeadLetter]) -> Steps[None]:
    """Keep these. Of equal ones in one portion, the one that was replayed most often."""
    rows: dict[bytes, tuple[Any, ...]] = {}
    for letter in letters:
        identity = identity_of(letter)
        kept = rows.get(identity)
        if kept is None or letter.replays > kept[-1]:
            rows[identity] = (identity, *_row(letter))
    yield Many("keep_letters", [*rows.values()])


def select(which: Selection, limit: int) -> Steps[list[DeadLetter]]:
    """The latest of those that are meant."""
    rows = yield Ask("letters", (*astuple(which), limit))
    return [_letter(*row) for row in rows]


def gone(letters: Sequence[DeadLetter]) -> Steps[list[DeadLetter]]:
    """Those that are not kept as they are here."""
    keys = [(letter.number, letter.replays) for letter in letters]
    found = yield Each("letter_is_kept", keys)
    return [letter for letter, row in zip(letters, found, strict=True) if row is None]


def remove(letters: Sequence[DeadLetter]) -> Steps[list[DeadLetter]]:
    """Keep these no longer; returns those that were gone."""
    missing = yield from gone(letters)
    yield Many("remove_letters", [(letter.number, letter.replays) for letter in letters])
    return missing


def count() -> Steps[Mapping[tuple[str, str], int]]:
    """How many there are, by consumer and topic."""
    return {(consumer, topic): number for consumer, topic, number in (yield Ask("count_letters"))}


def identity_of(letter: DeadLetter) -> bytes:
    """What tells a letter from every other: short, however long its names are."""
    message = letter.message
    digest = hashlib.blake2b(digest_size=20)
    for text in (letter.subscription, message.topic, message.source, message.id):
        digest.update(text.encode() + b"\0")
    digest.update(message.body)
    return digest.digest()


def _row(letter: DeadLetter) -> tuple[Any, ...]:
    m = letter.message
    headers = _encode_headers(dict(m.headers)).decode() if m.headers else None
    return (
        *(letter.subscription, m.topic, m.source, m.id, m.key, m.time_ms, headers, m.due_ms),
        *(m.body, letter.error, letter.attempts, letter.dead_ms, letter.replays),
    )


def _letter(consumer: str, topic: str, *columns: Any) -> DeadLetter:
    *message, error, attempts, dead_ms, number, replays = columns
    return DeadLetter(consumer, readable(topic, message), error, attempts, dead_ms, number, replays)


class Database(Protocol):
    """A database of duly's, as a graveyard uses it."""

    def read(self, make_steps: Callable[[], Steps[R]]) -> R:
        """Run steps that only look. Raises `BrokerError`."""
        ...

    def write(self, make_steps: Callable[[], Steps[R]]) -> R:
        """Run steps in a transaction, durable on return."""
        ...


class SQLGraveyard:
    """See `duly.inspection.graves.Graveyard`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def bury(self, letters: Sequence[DeadLetter]) -> None:
        """As `Graveyard.bury`."""
        if letters:
            self._database.write(lambda: bury(letters))

    def select(self, which: Selection, limit: int) -> Sequence[DeadLetter]:
        """As `Graveyard.select`."""
        return self._database.read(lambda: select(which, limit))

    def gone(self, letters: Sequence[DeadLetter]) -> Sequence[DeadLetter]:
        """As `Graveyard.gone`."""
        return self._database.read(lambda: gone(letters)) if letters else []

    def remove(self, letters: Sequence[DeadLetter]) -> Sequence[DeadLetter]:
        """As `Graveyard.remove`, in one transaction."""
        return self._database.write(lambda: remove(letters)) if letters else []

    def count(self) -> Mapping[tuple[str, str], int]:
        """As `Graveyard.count`."""
        return self._database.read(count)

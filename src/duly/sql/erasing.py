"""A person's messages removed from the log: found by looking through it, deleted in pieces.

Everything that would tell of a message by its identity goes before the message itself, since
afterwards nobody would know what to look for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from duly.inspection.erasing import Whose
from duly.sql.publishing import identity_hash
from duly.sql.steps import Ask, Many, Steps

# In one transaction, for which writers wait; at least one, whatever its size.
_AT_ONCE = 100
_BYTES_AT_ONCE = 4 * 1024 * 1024
_INCIDENTS = 2_000

Identity = tuple[str, str, str]
"""topic, source, id"""


@dataclass(frozen=True, slots=True)
class Copy:
    """One copy of a message: ``number`` is its position in the log, or that of a dead letter."""

    number: int
    topic_no: int
    bytes: int
    identity: Identity


def in_log(whose: Whose) -> Steps[list[Copy]]:
    """The copies in the log; only reads."""
    return _copies((yield Ask("erase_find", astuple(whose))))


def in_dead(whose: Whose) -> Steps[list[Copy]]:
    """The dead letters; only reads."""
    return _copies((yield Ask("erase_find_dead", astuple(whose))))


def in_identities(whose: Whose) -> Steps[list[Copy]]:
    """The identities that a topic remembers, of an id; only reads."""
    if whose.id is None:
        return []
    return _copies((yield Ask("erase_find_identities", astuple(whose))))


def meant(whose: Whose) -> Steps[set[Identity]]:
    """Every identity that is meant, as far as anything tells it."""
    copies = [*(yield from in_log(whose)), *(yield from in_dead(whose))]
    if whose.id is not None and whose.key is None:
        copies += _copies((yield Ask("erase_topics", astuple(whose))))
    return {copy.identity for copy in copies}


def portions(copies: Sequence[Copy]) -> Iterator[Sequence[Copy]]:
    """So many at a time, and of so many bytes."""
    some: list[Copy] = []
    size = 0
    for copy in copies:
        if some and (len(some) == _AT_ONCE or size + copy.bytes > _BYTES_AT_ONCE):
            yield some
            some, size = [], 0
        some.append(copy)
        size += copy.bytes
    if some:
        yield some


def from_log(copies: Sequence[Copy], now_ms: int) -> Steps[int]:
    """Remove these from the log and from what waits."""
    yield Ask("overwrite_deleted")
    yield from _hash(copies, now_ms)
    rows = [(copy.number,) for copy in copies]
    yield Many("promote_erased", rows)
    yield Many("erase_parked", rows)
    erased: int = yield Many("erase_message", rows)
    return erased


def from_dead(copies: Sequence[Copy], now_ms: int) -> Steps[int]:
    """Remove these dead letters; a key that one held goes on."""
    yield Ask("overwrite_deleted")
    yield from _hash(copies, now_ms)
    rows = [(copy.number,) for copy in copies]
    yield Many("promote_behind", rows)
    erased: int = yield Many("exhume", rows)
    return erased


def from_identities(copies: Sequence[Copy], now_ms: int) -> Steps[int]:
    """Keep hashes of these instead."""
    yield Ask("overwrite_deleted")
    yield from _hash(copies, now_ms)
    return len(copies)


def _hash(copies: Sequence[Copy], now_ms: int) -> Steps[None]:
    """A repeat is dropped as before, by what nobody can read."""
    hashed = [(copy.topic_no, identity_hash(*copy.identity), now_ms) for copy in copies]
    yield Many("remember_erased", hashed)
    yield Many("erase_identity", [(copy.topic_no, *copy.identity[1:]) for copy in copies])


def incidents(after: int, identities: set[Identity]) -> Steps[tuple[int | None, list[int]]]:
    """The next stretch of incidents: where it ends (None: there is none), and which are of these.

    Only reads.
    """
    rows = yield Ask("incidents_from", (after, _INCIDENTS))
    if not rows:
        return None, []
    found = [number for number, *identity, _ in rows if tuple(identity) in identities]
    return rows[-1][0], found


def from_incidents_since(after: int, identities: set[Identity]) -> Steps[None]:
    """The same of those that came later, for the transaction that removes the message: afterwards
    nobody would know whose they were.
    """
    end: int | None = after
    while end is not None:
        end, numbers = yield from incidents(end, identities)
        if numbers:
            yield from from_incidents(numbers)


def from_incidents(numbers: Sequence[int]) -> Steps[int]:
    """Take out whose these were and what they said."""
    yield Ask("overwrite_deleted")
    changed: int = yield Many("erase_incident", [(number,) for number in numbers])
    return changed


def note(count: int, now_ms: int) -> Steps[None]:
    """That it was done, and to how many copies; not to whose."""
    row = (now_ms, "erased", None, None, None, None, None, count, None, "removed by a person")
    yield Ask("note", row)


def _copies(rows: Sequence[tuple[Any, ...]]) -> list[Copy]:
    return [
        Copy(number, topic_no, size or 0, (topic, source, id))
        for number, topic_no, size, topic, source, id in rows
    ]

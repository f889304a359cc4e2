"""`Note`: what has to be known of a message that stays where it is in an ordered queue.

A message in order cannot be published again to carry its history, as others do. So that is noted
beside its queue, in a queue that keeps the newest few snapshots. Each of them has every note of
one writer, who is one process for as long as it works the queue, and a number that grows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from duly.brokers.rabbitmq.wire import History

Identity = tuple[str, str, int]
"""Source, id, and how often people brought it back: what was given up on before is another."""


class Note(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The history of one message, written down when the server had taken it back ``seen`` times.

    ``suspect``: somebody may die, or has died, with it in hand. Otherwise the next time that the
    server takes it back is no sign of that: it waits until ``due_ms``, of ``wait_ms`` in all.
    """

    source: str
    id: str
    replays: int
    seen: int
    charged: int
    repeated: bool
    suspect: bool
    due_ms: int = 0
    wait_ms: int = 0

    @property
    def identity(self) -> Identity:
        """Which message it is about."""
        return self.source, self.id, self.replays

    def wait_s(self, now_ms: int) -> float:
        """How long it has to wait yet; a step of the clock makes that no longer than it was."""
        return min(self.wait_ms, max(0, self.due_ms - now_ms)) / 1000


class Snapshot(msgspec.Struct, frozen=True, array_like=True):
    """All notes of a writer at a time."""

    writer: str
    number: int
    notes: list[Note]


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Snapshot).decode


def written(writer: str, number: int, notes: Iterable[Note]) -> bytes:
    """A snapshot as the server keeps it."""
    return _encode(Snapshot(writer, number, list(notes)))


def merged(bodies: Sequence[bytes]) -> Mapping[Identity, Note]:
    """What snapshots say together.

    Of each writer the last counts. Of several writers who charges more: one that hangs, and does
    not know that another has taken over, must not make a count fall.
    """
    last: dict[str, Snapshot] = {}
    for body in bodies:
        snapshot = _decode(body)
        before = last.get(snapshot.writer)
        if before is None or before.number < snapshot.number:
            last[snapshot.writer] = snapshot
    found: dict[Identity, Note] = {}
    for note in (note for snapshot in last.values() for note in snapshot.notes):
        other = found.get(note.identity)
        if other is None or (other.charged, other.seen) < (note.charged, note.seen):
            found[note.identity] = note
    return found


def judged(taken_back: int, carried: History, note: Note | None) -> tuple[History, bool]:
    """The history of a message that was delivered, and whether it is suspect.

    ``taken_back`` is the server's count, ``carried`` what travels with the message itself.
    """
    if not taken_back:
        return carried, False
    if note is None or note.seen >= taken_back:
        return History(carried.charged, repeated=True), True
    charged = max(carried.charged, note.charged)
    suspect = note.suspect or taken_back > note.seen + 1
    return History(charged, repeated=note.repeated or suspect), suspect

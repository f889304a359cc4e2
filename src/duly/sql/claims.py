"""Claiming: which messages a lane gets next, as ranges of the log.

There are three sources, tried in turn so that none starves another: *parked* messages that
are due, *free* ranges (released, or suspected of having killed their worker), and *fresh*
ones after the cursor. In order by key one more rule holds: a stream that is being worked gives
nothing, and of a stream with free ranges those come first, as they are the oldest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

from duly.sql import steering
from duly.sql.ranges import Range, at, runs
from duly.sql.steps import Ask, Many, Steps
from duly.sql.taking import NOT_ALONE, History, Lane, Part, Room, Row, take

# Ranges that yield nothing (all parked) are passed over so many times in one transaction.
_ROUNDS = 8


@dataclass(slots=True)
class Claimed:
    """What one call claimed. ``again``: there may be more, though nothing came of this call.
    ``full``: it took as much as it might. ``accused``: a message waits that is given out only by
    `claim_accused`.
    """

    token: int
    parts: list[Part]
    again: bool = False
    full: bool = False
    accused: bool = False


@dataclass(slots=True)
class Ahead:
    """A claim to be made in the transaction that settles the one before: `steps`, run in it."""

    make_steps: Callable[[], Steps[Claimed]]
    claimed: Claimed | None = None

    def steps(self) -> Steps[None]:
        """Make the claim; what it comes to is in ``claimed``. Again replaces that."""
        self.claimed = None
        self.claimed = yield from self.make_steps()


class _Candidate(NamedTuple):
    """One parked message that is due. ``size`` is None where the log has lost it."""

    position: int
    attempt: int
    alone: int
    repeated: int
    due_ms: int | None
    size: int | None
    replays: int


def claim(
    lanes: Sequence[Lane],
    limit: int,
    max_bytes: int,
    turn: int,
    now_ms: int,
    lease_until_boot_ms: int,
    token: int = 0,
) -> Steps[Claimed]:
    """Claim up to ``limit`` messages with bodies of up to ``max_bytes`` (at least one message).

    ``lanes`` is one for each topic of the subscription. ``turn`` grows from call to call: it
    says which topic, source and stream come first. ``token``: as no other claim has, or 0: the
    database is to give one.
    """
    room = Room(limit, max_bytes, limit, now_ms, lease_until_boot_ms, token)
    # Divided, not shared out: one number for topic, source and stream at once would never come
    # to some of their combinations.
    turn, start = divmod(turn, len(lanes))
    for lane in (*lanes[start:], *lanes[:start]):
        seen = yield from _look(lane)
        if seen.is_held_back:
            continue
        if room.parts:
            yield from _fresh(lane, room, turn, seen.streams)
        else:
            yield from _first_source(lane, room, turn, seen)
        if room.is_full or (room.parts and room.parts[-1].alone):
            break
    again = room.moved and not room.parts
    return Claimed(room.token, room.parts, again, room.is_full, room.accused)


def claim_accused(
    lanes: Sequence[Lane], now_ms: int, lease_until_boot_ms: int, token: int = 0
) -> Steps[Claimed]:
    """Claim one accused message, if the lanes' worker holds nothing at all in this database.

    A worker that dies with it has died of it. Its other lanes claim nothing meanwhile: see
    `duly.sql.solitude`.
    """
    room = Room(1, 0, 1, now_ms, lease_until_boot_ms, token)
    held_back = yield from steering.held_back()
    for lane in lanes:
        if lane.subscription_no not in held_back:
            yield from _accused(lane, room)
        if room.parts:
            break
    again = room.moved and not room.parts
    return Claimed(room.token, room.parts, again, accused=room.accused)


def _first_source(lane: Lane, room: Room, turn: int, seen: _Outlook) -> Steps[None]:
    """Claim from the first source that has something, beginning with another one each turn."""
    sources: list[Callable[[int], Steps[None]]] = [
        lambda turn: _fresh(lane, room, turn, seen.streams)
    ]
    if seen.is_free:
        sources.append(lambda _: _free(lane, room))
    if seen.due_ms is not None and seen.due_ms <= room.now_ms:
        sources.append(lambda _: _parked(lane, room))
    turn, start = divmod(turn, len(sources))
    for source in (*sources[start:], *sources[:start]):
        yield from source(turn)
        if room.parts:
            return


class _Outlook(NamedTuple):
    """What one look at a subscription shows. ``is_free``: a range is nobody's. ``due_ms``: when
    the next parked message is due. ``streams``: those with messages that were never given out.
    """

    is_held_back: bool
    is_free: bool
    due_ms: int | None
    streams: Sequence[Row]


def _look(lane: Lane) -> Steps[_Outlook]:
    name = "outlook_ordered" if lane.order_by_key else "outlook"
    rows = yield Ask(name, (lane.subscription_no,))
    is_held_back, is_free, due_ms, stream, *_ = rows[0]
    streams = () if stream is None else [row[3:] for row in rows]
    return _Outlook(is_held_back, is_free, due_ms, streams)


def is_ready(lanes: Sequence[Lane], now_ms: int) -> Steps[tuple[bool, int | None]]:
    """Whether a claim would get anywhere, and when the next parked message is due.

    Only reads: idle lanes ask this, and leave the writers' turn to others.
    """
    earliest_ms: int | None = None
    for lane in lanes:
        seen = yield from _look(lane)
        if seen.is_held_back:
            continue
        due_ms = seen.due_ms
        if due_ms is not None:
            earliest_ms = due_ms if earliest_ms is None else min(due_ms, earliest_ms)
        if seen.is_free or (due_ms is not None and due_ms <= now_ms) or seen.streams:
            return True, due_ms
    return False, earliest_ms


# --- fresh ranges -------------------------------------------------------------------------------


def _fresh(lane: Lane, room: Room, turn: int, streams: Sequence[Row]) -> Steps[None]:
    """The next messages after the cursors, of as many streams as there is room for."""
    start = turn % len(streams) if streams else 0
    for stream, cursor_seq, head, largest, latest_due_ms in (*streams[start:], *streams[:start]):
        next_seq = cursor_seq
        for _ in range(_ROUNDS):
            if room.is_full or next_seq >= head:
                break
            first, end = at(stream, next_seq), at(stream, head)
            last = min(end, first + room.messages) - 1
            if (last - first + 1) * largest > room.bytes:
                last = yield from _fitting(first, last, room)
            if last < first:
                break
            held: set[int] = set()
            if latest_due_ms > room.now_ms:
                held = yield from _park_not_due(lane, first, last, room)
            parts = len(room.parts)
            yield from take(lane, room, (first, last), (1, NOT_ALONE, 0, 0), held, largest=largest)
            if len(room.parts) == parts and not held:
                last = (yield from _before_next(last, end)) - 1
            next_seq += last - first + 1
            yield Ask("move_cursor", (next_seq, lane.subscription_no, stream))
            room.moved = True


def _before_next(last: int, end: int) -> Steps[int]:
    """The next position that is kept; after a rewind or an erasure there may be wide gaps."""
    found = yield Ask("first_position", (last + 1, end - 1, -(1 << 62)))
    return found[0][0] if found else end


def _fitting(first: int, last: int, room: Room) -> Steps[int]:
    """How far a range may reach. Before ``first``: no room."""
    last = min(last, first + room.messages - 1)
    [(size,)] = yield Ask("measure", (first, last))
    return (yield from _shrunk(first, last, room)) if size > room.bytes else last


def _shrunk(first: int, last: int, room: Room) -> Steps[int]:
    left = room.bytes
    reach = first - 1
    for position, size in (yield Ask("sizes", (first, last))):
        left -= size
        if left < 0 and (room.parts or reach >= first):
            break
        reach = position
    # Taking one message that is over all by itself leaves no room for others.
    return reach


def _park_not_due(lane: Lane, first: int, last: int, room: Room) -> Steps[set[int]]:
    rows = yield Ask("park_not_due", (lane.subscription_no, first, last, room.now_ms))
    return {position for (position,) in rows}


# --- free ranges --------------------------------------------------------------------------------


def _free(lane: Lane, room: Room) -> Steps[None]:
    """Ranges that are nobody's, the oldest first; a suspect one gives a single message."""
    if (yield from _accused_ranges(lane)):
        room.accused = True
    name = "free_ranges_ordered" if lane.order_by_key else "free_ranges"
    limit = min(room.messages, 200)
    for claim_id, first, last, *history in (yield Ask(name, (lane.subscription_no, limit))):
        alone = history[1]
        if room.is_full or (room.parts and (alone or room.parts[-1].alone)):
            return
        reach = last if not alone else first
        if not alone:
            reach = yield from _fitting(first, last, room)
            if reach < first:
                return
        yield from take(lane, room, (first, reach), (*history,), set())
        room.moved = True
        if reach < last:
            # Nothing later of this stream before the rest of this range: keys keep their order.
            yield Ask("cut_range", (reach + 1, claim_id))
            return
        yield Ask("drop_claim", (claim_id,))


def _accused(lane: Lane, room: Room) -> Steps[None]:
    for claim_id, first, last, *history in (yield from _accused_ranges(lane)):
        room.accused = True
        [(is_held,)] = yield Ask("holds_anything", (lane.worker,))
        if is_held:
            return
        yield from take(lane, room, (first, first), (*history,), set())
        room.moved = True
        if first < last:
            yield Ask("cut_range", (first + 1, claim_id))
        else:
            yield Ask("drop_claim", (claim_id,))


def _accused_ranges(lane: Lane) -> Steps[list[Row]]:
    """The first accused range that may be given out next, if any."""
    name = "accused_ranges_ordered" if lane.order_by_key else "accused_ranges"
    rows: list[Row] = yield Ask(name, (lane.subscription_no,))
    return rows


# --- parked messages ----------------------------------------------------------------------------


def _parked(lane: Lane, room: Room) -> Steps[None]:
    """Parked messages that are due; in order by key each with those that wait behind it."""
    room.moved = True
    chosen = _Chosen(room.messages, room.bytes)
    if lane.order_by_key:
        yield from _choose_in_order(lane, room, chosen)
    else:
        yield from _choose(lane, room, chosen, "parked_due")
    done = [c.position for c in chosen.messages] + chosen.lost
    yield Many("unpark", [(lane.subscription_no, position) for position in done])
    for history, (first, last) in _alike(chosen.messages):
        yield from take(lane, room, (first, last), history, set(), blocked=False)


def _choose(lane: Lane, room: Room, chosen: _Chosen, name: str) -> Steps[None]:
    due = yield Ask(name, (lane.subscription_no, room.now_ms, room.messages))
    for row in due:
        if not chosen.add(_Candidate(*row)):
            return


def _choose_in_order(lane: Lane, room: Room, chosen: _Chosen) -> Steps[None]:
    """The first of each key that is due, then those that wait behind it, as far as they go."""
    subscription_no, hold = lane.subscription_no, lane.hold_key_on_dead
    yield Ask("put_behind", (subscription_no, room.now_ms, hold))
    yield from _choose(lane, room, chosen, "parked_due_ordered")
    for head in tuple(chosen.messages):
        if not chosen.room or head.alone:
            return
        behind = yield Ask("parked_behind", (subscription_no, head.position, chosen.room, hold))
        for row in behind:
            candidate = _Candidate(*row)
            not_due = candidate.due_ms is not None and candidate.due_ms > room.now_ms
            if not_due or not chosen.add(candidate):
                break


class _Chosen:
    """Parked messages that go into one claim: as many as fit, and a suspect one only alone."""

    def __init__(self, room: int, bytes: int) -> None:
        self.room = room
        self.messages: list[_Candidate] = []
        self.lost: list[int] = []
        self._bytes = bytes

    def add(self, candidate: _Candidate) -> bool:
        """Whether it fits; once something does not, nothing after it may come."""
        if candidate.size is None:
            self.lost.append(candidate.position)
            return True
        if self.messages and (
            not self.room
            or candidate.size > self._bytes
            or candidate.alone
            or self.messages[0].alone
        ):
            return False
        self.room -= 1
        self._bytes -= candidate.size
        self.messages.append(candidate)
        return True


def _alike(chosen: Sequence[_Candidate]) -> list[tuple[History, Range]]:
    """Ranges of messages with the same history, in the order of positions."""
    histories: dict[History, list[int]] = {}
    for candidate in sorted(chosen, key=itemgetter(0)):
        history = (candidate.attempt, candidate.alone, candidate.repeated, candidate.replays)
        histories.setdefault(history, []).append(candidate.position)
    found = [(history, run) for history, ps in histories.items() for run in runs(ps)]
    return sorted(found, key=itemgetter(1))

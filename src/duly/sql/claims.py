"""Claiming: which messages a lane gets next, as ranges of the log.

There are three sources, tried in turn so that none starves another: *parked* messages that
are due, *free* ranges (released, or suspected of having killed their worker), and *fresh*
ones after the cursor. In order by key one more rule holds: a stream that is being worked gives
nothing, and of a stream with free ranges those come first, as they are the oldest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, NamedTuple

from duly.sql.ranges import Range, at, runs, stream_of
from duly.sql.steps import Ask, Many, Steps

Row = tuple[Any, ...]
"""position, source, id, time_ms, key, headers, due_ms, body; or position, id and body; or, of
a range without gaps as a span: body; id and body; source, id and body"""

History = tuple[int, int, int, int]
"""attempt, alone, repeated, replays: the same for every message of a claim's range"""

# Ranges that yield nothing (all parked) are passed over so many times in one transaction.
_ROUNDS = 8

NOT_ALONE, SUSPECT, ASKED_FOR_ONE = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Lane:
    """Who claims: one lane of a worker, for one topic of a subscription.

    ``settles_first``: ids come with the bodies, for nothing can be looked up of what is settled;
    ``identities``: they do, and the sources.
    """

    subscription_no: int
    worker: str
    lane: int
    boot_id: str
    order_by_key: bool
    hold_key_on_dead: bool
    bodies_only: bool = False
    settles_first: bool = False
    identities: bool = False


class Part(NamedTuple):
    """Some of what was claimed: rows of one stream with the same history, from ``first`` on.

    ``is_span``: their positions are not in the rows, for there is no gap.
    """

    stream: int
    first: int
    rows: Sequence[Row]
    attempt: int
    alone: bool
    repeated: bool
    is_span: bool
    replays: int = 0


@dataclass(slots=True)
class Claimed:
    """What one call claimed. ``again``: there may be more, though nothing came of this call.
    ``full``: it took as much as it might.
    """

    token: int
    parts: list[Part]
    again: bool = False
    full: bool = False


@dataclass(slots=True)
class Ahead:
    """A claim to be made in the transaction that settles the one before: `steps`, run in it."""

    make_steps: Callable[[], Steps[Claimed]]
    claimed: Claimed | None = None

    def steps(self) -> Steps[None]:
        """Make the claim; what it comes to is in ``claimed``. Again replaces that."""
        self.claimed = None
        self.claimed = yield from self.make_steps()


@dataclass(slots=True)
class _Room:
    """What a claim may still take, and when it is."""

    messages: int
    bytes: int
    limit: int
    now_ms: int
    lease_until_boot_ms: int
    token: int = 0
    parts: list[Part] = field(default_factory=list)
    moved: bool = False

    @property
    def is_full(self) -> bool:
        return self.messages <= 0 or self.bytes <= 0


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
) -> Steps[Claimed]:
    """Claim up to ``limit`` messages with bodies of up to ``max_bytes`` (at least one message).

    ``lanes`` is one for each topic of the subscription. ``turn`` grows from call to call: it
    says which topic, source and stream come first.
    """
    room = _Room(limit, max_bytes, limit, now_ms, lease_until_boot_ms)
    # Divided, not shared out: one number for topic, source and stream at once would never come
    # to some of their combinations.
    turn, start = divmod(turn, len(lanes))
    for lane in (*lanes[start:], *lanes[:start]):
        if room.parts:
            yield from _fresh(lane, room, turn)
        else:
            yield from _first_source(lane, room, turn)
        if room.is_full or (room.parts and room.parts[-1].alone):
            break
    return Claimed(room.token, room.parts, room.moved and not room.parts, room.is_full)


def _first_source(lane: Lane, room: _Room, turn: int) -> Steps[None]:
    """Claim from the first source that has something, beginning with another one each turn."""
    free, due_ms = yield from _outlook(lane)
    sources = [_fresh]
    if free:
        sources.append(_free)
    if due_ms is not None and due_ms <= room.now_ms:
        sources.append(_parked)
    turn, start = divmod(turn, len(sources))
    for source in (*sources[start:], *sources[:start]):
        yield from source(lane, room, turn)
        if room.parts:
            return


def _outlook(lane: Lane) -> Steps[tuple[bool, int | None]]:
    """Whether a range is free to claim, and when the next parked message is due."""
    name = "waiting_ordered" if lane.order_by_key else "waiting"
    [(free, due_ms)] = yield Ask(name, (lane.subscription_no,))
    return bool(free), due_ms


def is_ready(lanes: Sequence[Lane], now_ms: int) -> Steps[tuple[bool, int | None]]:
    """Whether a claim would get anywhere, and when the next parked message is due.

    Only reads: idle lanes ask this, and leave the writers' turn to others.
    """
    earliest_ms: int | None = None
    for lane in lanes:
        free, due_ms = yield from _outlook(lane)
        if due_ms is not None:
            earliest_ms = due_ms if earliest_ms is None else min(due_ms, earliest_ms)
        if free or (due_ms is not None and due_ms <= now_ms) or (yield from _backlog(lane)):
            return True, due_ms
    return False, earliest_ms


def _backlog(lane: Lane) -> Steps[list[Row]]:
    name = "backlog_ordered" if lane.order_by_key else "backlog"
    rows: list[Row] = yield Ask(name, (lane.subscription_no,))
    return rows


# --- fresh ranges -------------------------------------------------------------------------------


def _fresh(lane: Lane, room: _Room, turn: int) -> Steps[None]:
    """The next messages after the cursors, of as many streams as there is room for."""
    streams = yield from _backlog(lane)
    start = turn % len(streams) if streams else 0
    for stream, cursor_seq, head, largest, latest_due_ms in streams[start:] + streams[:start]:
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
            yield from _take(lane, room, (first, last), (1, NOT_ALONE, 0, 0), held)
            next_seq += last - first + 1
            yield Ask("move_cursor", (next_seq, lane.subscription_no, stream))
            room.moved = True


def _fitting(first: int, last: int, room: _Room) -> Steps[int]:
    """How far a range may reach. Before ``first``: no room."""
    last = min(last, first + room.messages - 1)
    [(size,)] = yield Ask("measure", (first, last))
    return (yield from _shrunk(first, last, room)) if size > room.bytes else last


def _shrunk(first: int, last: int, room: _Room) -> Steps[int]:
    left = room.bytes
    reach = first - 1
    for position, size in (yield Ask("sizes", (first, last))):
        left -= size
        if left < 0 and (room.parts or reach >= first):
            break
        reach = position
    # Taking one message that is over all by itself leaves no room for others.
    return reach


def _park_not_due(lane: Lane, first: int, last: int, room: _Room) -> Steps[set[int]]:
    rows = yield Ask("park_not_due", (lane.subscription_no, first, last, room.now_ms))
    return {position for (position,) in rows}


# --- free ranges --------------------------------------------------------------------------------


def _free(lane: Lane, room: _Room, turn: int) -> Steps[None]:  # noqa: ARG001 - one shape for all
    """Ranges that are nobody's, the oldest first; a suspect one gives a single message."""
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
        yield from _take(lane, room, (first, reach), (*history,), set())
        room.moved = True
        if reach < last:
            # Nothing later of this stream before the rest of this range: keys keep their order.
            yield Ask("cut_range", (reach + 1, claim_id))
            return
        yield Ask("drop_claim", (claim_id,))


# --- parked messages ----------------------------------------------------------------------------


def _parked(lane: Lane, room: _Room, turn: int) -> Steps[None]:  # noqa: ARG001 - one shape for all
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
        yield from _take(lane, room, (first, last), history, set(), blocked=False)


def _choose(lane: Lane, room: _Room, chosen: _Chosen, name: str) -> Steps[None]:
    due = yield Ask(name, (lane.subscription_no, room.now_ms, room.messages))
    for row in due:
        if not chosen.add(_Candidate(*row)):
            return


def _choose_in_order(lane: Lane, room: _Room, chosen: _Chosen) -> Steps[None]:
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


# --- taking -------------------------------------------------------------------------------------


def _take(
    lane: Lane,
    room: _Room,
    reach: Range,
    history: History,
    held: set[int],
    *,
    blocked: bool = True,
) -> Steps[None]:
    """Claim a range, less what is ``held`` already or has to wait behind others of its key."""
    first, last = reach
    attempt, alone, repeated, replays = history
    if blocked and lane.order_by_key:
        held = held | (yield from _park_behind(lane, reach, history))
    rows, is_span = yield from _fetch_for(lane, first, last, whole=not held)
    if held:
        rows = [row for row in rows if row[0] not in held]
    if not rows:
        return
    if not room.token:
        [(room.token,)] = yield Ask("next_token")
    kind = alone or (ASKED_FOR_ONE if room.limit == 1 else NOT_ALONE)
    # Where the log has lost a row, a range over it could never be settled whole.
    whole = len(rows) == last - first + 1
    for start, end in [reach] if whole else runs(row[0] for row in rows):
        yield Ask(
            "add_claim",
            (
                lane.subscription_no,
                start,
                end,
                attempt,
                kind,
                repeated,
                replays,
                room.token,
                lane.worker,
                lane.lane,
                lane.boot_id,
                room.lease_until_boot_ms,
            ),
        )
    room.parts.append(
        Part(
            stream_of(first),
            first,
            rows,
            attempt,
            alone == SUSPECT,
            bool(repeated),
            is_span,
            replays,
        )
    )
    room.messages -= len(rows)
    if room.messages:  # else there is nothing more to take
        room.bytes -= sum([len(row[-1]) for row in rows])


def _park_behind(lane: Lane, reach: Range, history: History) -> Steps[set[int]]:
    hold = lane.hold_key_on_dead
    [(blockers,)] = yield Ask("has_blockers", (lane.subscription_no, hold))
    if not blockers:
        return set()
    first, last = reach
    start = at(stream_of(first), 0)
    params = (lane.subscription_no, first, last, start, *history, hold)
    return {position for (position,) in (yield Ask("park_behind", params))}


def _fetch_for(lane: Lane, first: int, last: int, *, whole: bool) -> Steps[tuple[list[Row], bool]]:
    """The rows, and whether they are those of a span."""
    if lane.bodies_only and whole:
        rows: list[Row] = []
        with contextlib.suppress(Exception):  # an id that is no text: the raw fetch below tells
            rows = yield Ask(_span_of(lane), (first, last))
        if len(rows) == last - first + 1:
            return rows, True
    rows = yield from fetch(first, last, bodies_only=lane.bodies_only and not lane.identities)
    return rows, False


def _span_of(lane: Lane) -> str:
    if lane.identities:
        return "fetch_span_with_identities"
    return "fetch_span_with_ids" if lane.settles_first else "fetch_span"


def fetch_ids(first: int, last: int) -> Steps[list[str]]:
    """The ids of a range, as far as they are text. Raises LookupError where it has gaps."""
    rows: list[Row] = yield Ask("fetch_ids", (first, last))
    if len(rows) <= last - first:
        raise LookupError(f"messages of positions {first} to {last} are not in the log any more")
    return [(id or b"").decode(errors="replace") for (id,) in rows]


def fetch(first: int, last: int, *, bodies_only: bool) -> Steps[list[Row]]:
    """The rows of a range, in order."""
    rows: list[Row]
    try:
        rows = yield Ask("fetch_bodies" if bodies_only else "fetch", (first, last))
    except Exception:  # noqa: BLE001 - a column may hold what is no text; else this fails again
        rows = yield Ask("fetch_raw", (first, last))
    return rows

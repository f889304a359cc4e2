"""Taking a range for a lane: its row among the claims, and what of it the lane gets to see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from duly.sql.ranges import Range, at, runs, stream_of
from duly.sql.steps import Ask, Column, Steps

Row = tuple[Any, ...]
"""position, source, id, time_ms, key, headers, due_ms, body; or position, id and body; or, of
a range without gaps as a span: source, id and body"""

History = tuple[int, int, int, int]
"""attempt, alone, repeated, replays: the same for every message of a claim's range"""

GONE = "(gone)"
"""instead of the id of a message that is not in the log any more"""

NOT_ALONE, SUSPECT, ASKED_FOR_ONE, ACCUSED, LEFT_ALONE = range(5)


@dataclass(frozen=True, slots=True)
class Lane:
    """Who claims: one lane of a worker, for one topic of a subscription.

    ``with_ids``: they come with the bodies, for of what is settled the log keeps nothing;
    ``identities``: so they do, and the sources.
    """

    subscription_no: int
    worker: str
    lane: int
    boot_id: str
    order_by_key: bool
    hold_key_on_dead: bool
    bodies_only: bool = False
    with_ids: bool = False
    identities: bool = False


class Part(NamedTuple):
    """Some of what was claimed: rows of one stream with the same history, from ``first`` on.

    ``is_span``: their positions are not in the rows, for there is no gap; where nothing but the
    bodies was fetched, each row is just that. ``largest``: bytes that no body exceeds, where known.
    ``ids``: as one JSON text, and ``source``: that of all; "" where they were not asked for.
    """

    stream: int
    first: int
    rows: Sequence[Any]
    attempt: int
    alone: bool
    repeated: bool
    is_span: bool
    replays: int = 0
    largest: int | None = None
    ids: str = ""
    source: str = ""


@dataclass(slots=True)
class Room:
    """What a claim may still take, and when it is."""

    messages: int
    bytes: int
    limit: int
    now_ms: int
    lease_until_boot_ms: int
    token: int = 0
    parts: list[Part] = field(default_factory=list)
    moved: bool = False
    accused: bool = False

    @property
    def is_full(self) -> bool:
        return self.messages <= 0 or self.bytes <= 0


def take(
    lane: Lane,
    room: Room,
    reach: Range,
    history: History,
    held: set[int],
    *,
    blocked: bool = True,
    largest: int | None = None,
) -> Steps[None]:
    """Claim a range, less what is ``held`` already or has to wait behind others of its key.

    ``largest``: no body of it has more bytes.
    """
    first, last = reach
    attempt, alone, repeated, replays = history
    if blocked and lane.order_by_key:
        held = held | (yield from _park_behind(lane, reach, history))
    rows, is_span, ids, source = yield from _fetch_for(lane, first, last, whole=not held)
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
            alone in (SUSPECT, ACCUSED),
            bool(repeated),
            is_span,
            replays,
            largest,
            ids,
            source,
        )
    )
    room.messages -= len(rows)
    if room.messages:  # else there is nothing more to take
        bodies = [row[-1] for row in rows] if isinstance(rows[0], tuple) else rows
        room.bytes -= sum(map(len, bodies))


def _park_behind(lane: Lane, reach: Range, history: History) -> Steps[set[int]]:
    hold = lane.hold_key_on_dead
    [(blockers,)] = yield Ask("has_blockers", (lane.subscription_no, hold))
    if not blockers:
        return set()
    first, last = reach
    start = at(stream_of(first), 0)
    params = (lane.subscription_no, first, last, start, *history, hold)
    return {position for (position,) in (yield Ask("park_behind", params))}


class _Fetched(NamedTuple):
    """Rows of a range; see `Part`."""

    rows: list[Any]
    is_span: bool = False
    ids: str = ""
    source: str = ""


def _fetch_for(lane: Lane, first: int, last: int, *, whole: bool) -> Steps[_Fetched]:
    if lane.bodies_only and whole:
        try:
            found = yield from _fetch_span(lane, first, last)
        except Exception:  # noqa: BLE001 - an id that is no text: the raw fetch below tells
            found = _Fetched([])
        if len(found.rows) == last - first + 1:
            return found
    bodies_only = lane.bodies_only and not lane.identities
    return _Fetched((yield from fetch(first, last, bodies_only=bodies_only)))


def _fetch_span(lane: Lane, first: int, last: int) -> Steps[_Fetched]:
    ids = source = ""
    if lane.identities:
        [(ids, source, greatest)] = yield Ask("identities_of_span", (first, last))
        if source != greatest:
            rows = yield Ask("fetch_span_with_identities", (first, last))
            return _Fetched(rows, is_span=True)
    elif lane.with_ids:
        [(ids,)] = yield Ask("ids_of_span", (first, last))
    return _Fetched((yield Column("fetch_span", (first, last))), True, ids or "", source or "")


def fetch_ids(first: int, last: int) -> Steps[list[str]]:
    """The ids of a range, as far as they are text, and `GONE` for what is not in the log any more.

    That is no error: they name messages in logs and dead letters, also after a person erased
    one, or after another worker took over, settled them and so removed them.
    """
    rows: list[Row] = yield Ask("fetch_ids", (first, last))
    if len(rows) > last - first:
        return [text_of(id or b"") for (id,) in rows]
    kept = {row[0]: text_of(row[2] or b"") for row in (yield Ask("fetch_raw", (first, last)))}
    return [kept.get(p, GONE) for p in range(first, last + 1)]


def text_of(value: Any) -> str:
    """What stands in a column of text, as far as it is text."""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def fetch(first: int, last: int, *, bodies_only: bool) -> Steps[list[Row]]:
    """The rows of a range, in order."""
    rows: list[Row]
    try:
        rows = yield Ask("fetch_bodies" if bodies_only else "fetch", (first, last))
    except Exception:  # noqa: BLE001 - a column may hold what is no text; else this fails again
        rows = yield Ask("fetch_raw", (first, last))
    return rows

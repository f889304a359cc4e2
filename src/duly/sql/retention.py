"""Retention: what everybody is done with is deleted, a bounded piece at a time."""

from __future__ import annotations

from dataclasses import dataclass, field

from duly.sql.ranges import at
from duly.sql.steps import Ask, Many, Steps

# Rows looked at in one step: a few milliseconds, for which writers wait.
_MESSAGES = 5_000
_IDENTITIES = 2_000
_INCIDENTS = 1_000

# Going through the identities costs as much as storing a tenth of them; they are kept for days.
_ROUND_EVERY_MS = 60_000
# And a worker that starts has a backlog to see to first.
_FIRST_ROUND_MS = 10_000

INCIDENTS_KEPT_S = 30 * 86_400
INCIDENTS_KEPT = 200_000

_Identity = tuple[int, str, str]
_START: _Identity = (0, "", "")


@dataclass(slots=True)
class Broom:
    """How far sweeping got, so that each step goes on where the last one ended.

    ``most``: messages that a step looks at in one stream.
    """

    reached: dict[int, int] = field(default_factory=dict)
    identity: _Identity = _START
    next_round_ms: int | None = None
    most: int = _MESSAGES


def sweep(broom: Broom, now_ms: int) -> Steps[int]:
    """Delete some of what is over: messages, identities, incidents. Returns messages deleted.

    A message goes when every subscription of its topic has settled it and it is older than
    the topic's retention. A topic that nobody subscribes to keeps everything: its first
    consumer may be deployed after its publisher. An identity goes when the topic's identity
    retention is over, whatever became of the message.
    """
    deleted = 0
    for stream, retention_s in (yield Ask("all_streams")):
        horizon_ms = now_ms - int(retention_s * 1000)
        deleted += yield from _sweep_stream(broom, stream, horizon_ms)
    yield from _sweep_identities(broom, now_ms)
    old_ms = now_ms - INCIDENTS_KEPT_S * 1000
    yield Ask("forget_incidents", (old_ms, INCIDENTS_KEPT, _INCIDENTS))
    return deleted


def _sweep_stream(broom: Broom, stream: int, horizon_ms: int) -> Steps[int]:
    [(end,)] = yield Ask("low_water", (stream,))
    start = max(broom.reached.get(stream, 0), at(stream, 0))
    kept = yield Ask("first_kept", (start, end))
    if not kept or kept[0][1] > horizon_ms:
        # Round again: the parked ones that were passed over may be settled by now.
        broom.reached.pop(stream, None)
        return 0
    first: int = kept[0][0]
    last = min(first + broom.most, end) - 1
    deleted: int
    [(parked,)] = yield Ask("any_parked", (first, last, stream))
    if parked:
        deleted = yield Many("trim", [(first, last, horizon_ms, stream)])
    else:  # nearly always, and twice as fast
        deleted = yield Many("trim_all", [(first, last, horizon_ms)])
    broom.reached[stream] = last + 1
    return deleted


def _sweep_identities(broom: Broom, now_ms: int) -> Steps[None]:
    if broom.identity == _START:
        if broom.next_round_ms is None:
            broom.next_round_ms = now_ms + _FIRST_ROUND_MS
        if now_ms < broom.next_round_ms:
            return
        broom.next_round_ms = now_ms + _ROUND_EVERY_MS
    after = broom.identity
    rows = yield Ask("identities_after", (*after, _IDENTITIES))
    # Beyond every topic there is none: the last stretch reaches to the end of the table.
    until = rows[0] if rows else (1 << 62, "", "")
    yield Ask("forget_old", (*after, *until, now_ms))
    broom.identity = until if rows else _START
    if not rows:
        yield Ask("forget_erased", (now_ms,))

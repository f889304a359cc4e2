"""The claim that nearly every claim is, as one statement: the next messages after the cursor.

`duly.sql.claims` asks for an outlook, the bodies, a token, and adds a claim and a cursor: five
turns of a connection. Where a subscription has one topic and no order to keep, where nothing is
parked that is due, nothing is nobody's, and one stream has messages that were never given out,
there is nothing to decide between them. Anything else is claimed as ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from struct import unpack
from typing import Any

from duly.sql import claims
from duly.sql.claims import Claimed
from duly.sql.steps import Ask, Steps
from duly.sql.taking import ASKED_FOR_ONE, NOT_ALONE, Lane, Part

# The server makes one value of all bodies, which has a gigabyte at most.
_MOST_BYTES = 64 * 1024 * 1024


def claim(
    lanes: Sequence[Lane],
    limit: int,
    max_bytes: int,
    turn: int,
    now_ms: int,
    lease_until_boot_ms: int,
) -> Steps[Claimed]:
    """As `claims.claim`, in the turn of the subscription."""
    [lane, *others] = lanes
    if not (others or lane.order_by_key) and lane.bodies_only:
        bytes = min(max_bytes, _MOST_BYTES)
        found = yield Ask(
            "claim_fresh",
            (
                lane.subscription_no,
                limit,
                bytes,
                now_ms,
                ASKED_FOR_ONE if limit == 1 else NOT_ALONE,
                lane.worker,
                lane.lane,
                lane.boot_id,
                lease_until_boot_ms,
                lane.with_ids or lane.identities,
            ),
        )
        for token, *one in found:
            part = yield from _part(lane, *one)
            return Claimed(token, [part], full=len(part.rows) >= limit)
    return (yield from claims.claim(lanes, limit, max_bytes, turn, now_ms, lease_until_boot_ms))


def _part(
    lane: Lane,
    stream: int,
    first: int,
    last: int,
    largest: int,
    sizes: bytes,
    bodies: bytes,
    ids: str | None,
    source: str | None,
    greatest: str | None,
) -> Steps[Part]:
    rows: Sequence[Any] = _cut(bodies, sizes)
    if lane.identities and source != greatest:
        rows, ids, source = (yield Ask("fetch_span_with_identities", (first, last))), "", ""
    known = source if lane.identities else ""
    return Part(
        stream,
        first,
        rows,
        attempt=1,
        alone=False,
        repeated=False,
        is_span=True,
        largest=largest,
        ids=ids or "",
        source=known or "",
    )


def _cut(joined: bytes, sizes: bytes) -> list[bytes]:
    """Values that were sent one behind the other, whose sizes are 32-bit integers."""
    ends = accumulate(unpack(f"!{len(sizes) // 4}i", sizes), initial=0)
    return [joined[start:end] for start, end in pairwise(ends)]

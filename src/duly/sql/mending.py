"""Dead letters, brought back or removed by people: each in one transaction, never half."""

from __future__ import annotations

from collections.abc import Sequence

from duly.sql.steps import Ask, Many, Steps


def replay(numbers: Sequence[int], now_ms: int) -> Steps[list[int]]:
    """Deliver dead letters to their subscriptions again; returns those that are not there.

    Each stands at its old position, so that it comes before the later ones of its key, and
    nobody else sees it: the other subscriptions are past it, or have it before them anyway.
    """
    numbers = list(dict.fromkeys(numbers))
    gone = yield from _missing(numbers)
    rows = [(number,) for number in numbers if number not in gone]
    yield Many("restore", rows)
    yield Many("park_replayed", rows)
    yield from _take_out(rows, now_ms, "replayed", "replayed; had been given up on at attempt ")
    return gone


def discard(numbers: Sequence[int], now_ms: int) -> Steps[list[int]]:
    """Remove dead letters for good; returns those that are not there. Their keys go on."""
    numbers = list(dict.fromkeys(numbers))
    gone = yield from _missing(numbers)
    rows = [(number,) for number in numbers if number not in gone]
    yield Many("promote_behind", rows)
    yield from _take_out(rows, now_ms, "discarded", "discarded; had been given up on at attempt ")
    return gone


def _missing(numbers: Sequence[int]) -> Steps[list[int]]:
    missing = []
    for number in numbers:
        [(there,)] = yield Ask("is_dead", (number,))
        if not there:
            missing.append(number)
    return missing


def _take_out(rows: Sequence[tuple[int]], now_ms: int, kind: str, detail: str) -> Steps[None]:
    yield Many("note_dead", [(number, now_ms, kind, detail) for (number,) in rows])
    yield Many("exhume", rows)

"""Ranges of positions: pure arithmetic, both ends inclusive."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence

SEQ_BITS = 40
"""A position is ``(stream << SEQ_BITS) | seq``: 10 ** 12 messages a stream."""

Range = tuple[int, int]


def stream_of(position: int) -> int:
    """The stream that a position belongs to."""
    return position >> SEQ_BITS


def at(stream: int, seq: int) -> int:
    """The position of a sequence number in a stream."""
    return (stream << SEQ_BITS) | seq


def within_bytes(sizes: Iterable[tuple[int, int]], most_bytes: int) -> list[int]:
    """The first of these (number, bytes) that together stay within a limit; at least one."""
    some: list[int] = []
    total = 0
    for number, size in sizes:
        total += size
        if some and total > most_bytes:
            break
        some.append(number)
    return some


def runs(positions: Iterable[int]) -> list[Range]:
    """Ascending positions as ranges without gaps."""
    found: list[Range] = []
    first = last = -2
    for position in positions:
        if position == last + 1:
            last = position
            continue
        if last >= 0:
            found.append((first, last))
        first = last = position
    if last >= 0:
        found.append((first, last))
    return found


def within(first: int, last: int, positions: Sequence[int]) -> Sequence[int]:
    """Those of the ascending positions that lie in a range."""
    low = bisect_left(positions, first)
    high = bisect_right(positions, last, low)
    return positions if high - low == len(positions) else positions[low:high]


def without(first: int, last: int, gone: Sequence[int]) -> list[Range]:
    """What is left of a range; ``gone`` ascends, has no repeats and lies in it."""
    left: list[Range] = []
    for start, end in runs(gone):
        if start > first:
            left.append((first, start - 1))
        first = end + 1
    if first <= last:
        left.append((first, last))
    return left

"""Deliveries and how they ended, side by side: a settlement may stand for several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from duly.broker import Delivery
from duly.guarantees import Done, Settlement


def paired(
    settlements: Sequence[Settlement], deliveries: Sequence[Delivery]
) -> Iterator[tuple[Settlement, Delivery]]:
    """Each delivery with its settlement, which for a span is one of several."""
    at = 0
    for settlement in settlements:
        count = settlement.count if isinstance(settlement, Done) else 1
        for delivery in deliveries[at : at + count]:
            yield settlement, delivery
        at += count


def not_done(
    settlements: Sequence[Settlement], deliveries: Sequence[Delivery]
) -> Iterator[tuple[Settlement, Delivery]]:
    """Those of `paired` that are not done; no others are looked at."""
    at = 0
    for settlement in settlements:
        if isinstance(settlement, Done):
            at += settlement.count
        else:
            yield settlement, deliveries[at]
            at += 1


def covered(settlements: Sequence[Settlement]) -> int:
    """How many deliveries they settle."""
    return sum([s.count if isinstance(s, Done) else 1 for s in settlements])

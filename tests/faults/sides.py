"""Running many small scenes side by side: most of their time is waiting for the disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

SIDE_BY_SIDE = 8


def all_of(cases: Iterable[T], judge: Callable[[T], Sequence[str]]) -> None:
    """Judge every case; fails with the complaints of all that have some."""
    cases = list(cases)
    assert cases, "nothing was judged"
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        found = list(pool.map(judge, cases))
    bad = [
        f"{case}:\n  " + "\n  ".join(complaints)
        for case, complaints in zip(cases, found, strict=True)
        if complaints
    ]
    assert not bad, f"{len(bad)} of {len(cases)}:\n" + "\n".join(bad[:20])

"""Properties that hold once the faults have stopped: nothing is stuck and nothing leaks."""

from __future__ import annotations

from collections.abc import Iterator

from duly.testing.checker.case import Case
from duly.testing.checker.properties import forbids


@forbids("stuck")
def stuck(case: Case) -> Iterator[str]:
    """Messages still wait though there was time enough for all of them."""
    held = case.terms.hold_key_on_dead and bool(case.dead())
    for each in case.final.waiting:
        if each.subscription != case.terms.subscription:
            continue
        # Behind a dead letter that holds its key, waiting is what was declared.
        left = each.in_flight if held else each.backlog + each.in_flight + each.parked
        if left:
            yield (
                f"{each.topic}: {each.backlog} wait, {each.in_flight} are claimed, "
                f"{each.parked} are parked"
            )


@forbids("leak")
def leak(case: Case) -> Iterator[str]:
    """Something was left open or unsent."""
    yield from case.final.leaks

"""Properties that hold once the faults have stopped: nothing is stuck and nothing leaks."""

from __future__ import annotations

from collections.abc import Iterator

from duly.testing.checker.case import Case
from duly.testing.checker.properties import forbids


@forbids("stuck")
def stuck(case: Case) -> Iterator[str]:
    """Messages still wait though there was time enough for all of them."""
    # Behind a dead letter that holds its key, waiting is what was declared.
    held = len(case.held())
    for each in case.final.waiting:
        mine = each.subscription == case.terms.subscription
        if mine and each.backlog + each.in_flight + each.parked > held:
            yield (
                f"{each.topic}: {each.backlog} wait, {each.in_flight} are claimed, "
                f"{each.parked} are parked"
            )


@forbids("leak")
def leak(case: Case) -> Iterator[str]:
    """Something was left open or unsent."""
    yield from case.final.leaks

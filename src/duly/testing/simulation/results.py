"""What a campaign has shown, in a form that is kept beside the documents."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from duly.testing.simulation.campaign import Cells, Tally
from duly.testing.simulation.points import covered


class Shown(msgspec.Struct, frozen=True):
    """What one kind and guarantee was run under, and what was found.

    ``distinct`` schedules by the faults that hit and the interleaving; ``faults`` that hit, and
    ``crashes`` at each crash point of the specification, where there were any.
    """

    schedules: int
    distinct: int
    faults: Mapping[str, int]
    crashes: Mapping[str, int]
    anomalies: Mapping[str, int]


def shown(cells: Cells) -> dict[str, Shown]:
    """By "kind, guarantee", in order."""
    return {", ".join(cell): _of(cells[cell]) for cell in sorted(cells)}


def _of(tally: Tally) -> Shown:
    crashes = covered(tally.crashes)
    return Shown(
        tally.runs,
        len(tally.traces),
        dict(sorted(tally.faults.items())),
        {name: count for name, count in crashes.items() if count},
        dict(sorted(tally.anomalies.items())),
    )

"""Many schedules: every single crash and every pair of a small scenario, and random ones.

What was run is counted by its trace: the faults that hit and the interleaving.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from time import monotonic

from duly.testing.simulation.plan import Drawn, Given, Hit
from duly.testing.simulation.run import Outcome, run
from duly.testing.simulation.scenario import MEMORY_KINDS, Kind, Scenario, any_scenario

MOST_FAULTS = 4
RATE = 0.03


@dataclass(slots=True)
class Tally:
    """What a campaign has run and found.

    ``crashes`` counts by crash point, ``reached`` how often each was passed at all; ``faults``
    counts by kind. ``failures`` are the first few schedules that broke something.
    """

    runs: int = 0
    traces: set[tuple[str, int]] = field(default_factory=set)
    faults: Counter[str] = field(default_factory=Counter)
    reached: Counter[str] = field(default_factory=Counter)
    crashes: Counter[str] = field(default_factory=Counter)
    anomalies: Counter[str] = field(default_factory=Counter)
    verdicts: Counter[str] = field(default_factory=Counter)
    failures: list[Outcome] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        """Count one schedule."""
        self.runs += 1
        self.traces.add((outcome.scenario.text(), outcome.trace))
        self.faults.update(hit.kind for hit in outcome.hits)
        self.reached.update(outcome.reached)
        self.crashes.update(outcome.crashed)
        self.anomalies.update(outcome.judgement.names())
        self.verdicts[outcome.judgement.verdict] += 1
        if outcome.judgement.anomalies and len(self.failures) < 10:
            self.failures.append(outcome)

    def not_crashed(self) -> list[str]:
        """Points that were passed, and at which no process ever died."""
        return sorted(point for point in self.reached if not self.crashes[point])


def random_schedules(
    first: int, count: int, kinds: tuple[Kind, ...] = MEMORY_KINDS, seconds: float | None = None
) -> Iterator[Outcome]:
    """Schedules of the seeds from ``first`` on: ``count`` of them, or until time is up."""
    until = None if seconds is None else monotonic() + seconds
    for seed in range(first, first + count):
        if until is not None and monotonic() > until:
            return
        yield random_schedule(seed, kinds)


def random_schedule(seed: int, kinds: tuple[Kind, ...] = MEMORY_KINDS) -> Outcome:
    """The schedule that a seed stands for."""
    random = Random(seed)
    return one_of(any_scenario(random, kinds), seed, random)


def one_of(scenario: Scenario, seed: int, random: Random | None = None) -> Outcome:
    """A scenario with the faults that a seed stands for."""
    random = random or Random(seed)
    most = random.randint(0, MOST_FAULTS)
    return run(scenario, seed, Drawn(random, most, RATE))


def crashes(scenario: Scenario, kind: str = "crash", *, pairs: bool = True) -> Iterator[Outcome]:
    """A process dies at each of its points; and of each, its successor at each of its own."""
    plain = run(scenario, 0, Given([]))
    yield plain
    for first in plain.points:
        for number in range(1, plain.points[first] + 1):
            single = run(scenario, 0, Given([Hit(first, number, kind)]))
            yield single
            if pairs:
                yield from _seconds(scenario, single, kind)


def _seconds(scenario: Scenario, single: Outcome, kind: str) -> Iterator[Outcome]:
    if not single.hits:
        return
    letter = single.hits[0].process[0]
    successors = [name for name in single.points if name[0] == letter and name[1:] != "1"]
    for name in successors[:1]:
        for number in range(1, single.points[name] + 1):
            yield run(scenario, 0, Given([*single.hits, Hit(name, number, kind)]))

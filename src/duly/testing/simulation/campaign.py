"""Many schedules: every single crash and every pair of a small scenario, and random ones.

What was run is counted by its trace: the faults that hit and the interleaving.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from random import Random
from time import monotonic

from duly.testing.simulation.covering import COVERING
from duly.testing.simulation.plan import Drawn, Given, Hit
from duly.testing.simulation.run import Outcome, run
from duly.testing.simulation.scenario import Kind, Scenario, any_scenario

MOST_FAULTS = 4
RATE = 0.03
# One share of a campaign; small enough that processes end at nearly the same time.
SHARE = 200
MOST_FAILURES = 10


@dataclass(slots=True)
class Tally:
    """What a campaign has run and found.

    ``crashes`` counts by point, ``reached`` how often each was passed at all; ``faults`` counts
    by kind. ``failures`` are the first few schedules that broke something.
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
        if outcome.judgement.anomalies and len(self.failures) < MOST_FAILURES:
            self.failures.append(outcome)

    def merge(self, part: Tally) -> None:
        """Add what another has counted."""
        self.runs += part.runs
        self.traces |= part.traces
        for mine, other in (
            (self.faults, part.faults),
            (self.reached, part.reached),
            (self.crashes, part.crashes),
            (self.anomalies, part.anomalies),
            (self.verdicts, part.verdicts),
        ):
            mine.update(other)
        self.failures = (self.failures + part.failures)[:MOST_FAILURES]

    def not_crashed(self) -> list[str]:
        """Points that were passed, and at which no process ever died."""
        return sorted(point for point in self.reached if not self.crashes[point])


Cell = tuple[Kind, str]
"""A kind of broker and store, and a guarantee: what is told apart in what was shown."""

Cells = dict[Cell, Tally]


def count(outcomes: Iterator[Outcome]) -> Cells:
    """Run schedules and count them."""
    cells: Cells = {}
    for outcome in outcomes:
        cell = (outcome.scenario.kind, outcome.scenario.guarantee)
        cells.setdefault(cell, Tally()).add(outcome)
    return cells


def merged(cells: Cells) -> Tally:
    """All of it together."""
    whole = Tally()
    for tally in cells.values():
        whole.merge(tally)
    return whole


# --- random schedules


def random_schedules(first: int, count: int, kinds: tuple[Kind, ...]) -> Iterator[Outcome]:
    """The schedules of so many seeds, from ``first`` on."""
    for seed in range(first, first + count):
        yield random_schedule(seed, kinds)


def random_schedule(seed: int, kinds: tuple[Kind, ...]) -> Outcome:
    """The schedule that a seed stands for."""
    random = Random(seed)
    return one_of(any_scenario(random, kinds), seed, random)


def one_of(scenario: Scenario, seed: int, random: Random | None = None) -> Outcome:
    """A scenario with the faults that a seed stands for."""
    random = random or Random(seed)
    most = random.randint(0, MOST_FAULTS)
    return run(scenario, seed, Drawn(random, most, RATE))


def campaign(
    kinds: tuple[Kind, ...],
    *,
    first: int = 0,
    distinct: int | None = None,
    seconds: float | None = None,
    processes: int = 1,
) -> Cells:
    """Random schedules of the seeds from ``first`` on, until so many are distinct, or for so long.

    A process of it that dies ends it with `BrokenProcessPool`.
    """
    cells: Cells = {}
    began = monotonic()
    for part in _shares(first, kinds, processes):
        for cell, tally in part.items():
            cells.setdefault(cell, Tally()).merge(tally)
        if distinct is not None:
            if sum(len(tally.traces) for tally in cells.values()) >= distinct:
                return cells
        elif monotonic() - began >= (seconds or 0.0):
            return cells
    raise AssertionError("seeds do not end")


def _shares(first: int, kinds: tuple[Kind, ...], processes: int) -> Iterator[Cells]:
    shares = ((number, kinds) for number in itertools.count(first, SHARE))
    if processes == 1:
        yield from map(_share, shares)
        return
    # Spawned, for a fork would copy whatever threads and files the caller has. An executor tells
    # when one of its processes dies, where a Pool waits for ever.
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        running = deque(pool.submit(_share, next(shares)) for _ in range(2 * processes))
        try:
            while True:
                # In the order of seeds, so that what is counted is the same on any machine.
                part = running.popleft().result()
                running.append(pool.submit(_share, next(shares)))
                yield part
        finally:
            pool.shutdown(cancel_futures=True)


def _share(share: tuple[int, tuple[Kind, ...]]) -> Cells:
    first, kinds = share
    return count(random_schedules(first, SHARE, kinds))


# --- one scenario


def hunt(scenario: Scenario, name: str, most: int = 3_000) -> Outcome | None:
    """A schedule of this scenario that breaks the property: first every single crash, then random
    ones, up to ``most``.
    """
    found = itertools.chain(
        crashes(scenario, pairs=False), (one_of(scenario, seed) for seed in range(most))
    )
    return next((outcome for outcome in found if name in outcome.judgement.names()), None)


def crashes(
    scenario: Scenario, kind: str = "crash", *, pairs: bool = True, share: tuple[int, int] = (0, 1)
) -> Iterator[Outcome]:
    """A process dies at each of its points; and of each, its successor at each of its own.

    ``share``: which of how many shares of them.
    """
    plain = run(scenario, 0, Given([]))
    mine, shares = share
    if mine == 0:
        yield plain
    first = [
        Hit(name, number, kind)
        for name, points in plain.points.items()
        for number in range(1, points + 1)
    ]
    for hit in first[mine::shares]:
        single = run(scenario, 0, Given([hit]))
        yield single
        if pairs:
            yield from _seconds(scenario, single, kind)


def drains(scenario: Scenario) -> Iterator[Outcome]:
    """The first worker is told to stop, and dies at each of its points behind that."""
    tries = (run(scenario, 0, Given([Hit("w1", n, "stop")])) for n in itertools.count(1))
    stopped = next(outcome for outcome in tries if outcome.hits)
    number = stopped.hits[0].number
    yield stopped
    for later in range(number + 1, stopped.points["w1"] + 1):
        yield run(scenario, 0, Given([*stopped.hits, Hit("w1", later, "crash")]))


def covering(scenarios: Sequence[Scenario] = COVERING) -> Iterator[Outcome]:
    """Every single crash of the covering scenarios, also while draining."""
    for scenario in scenarios:
        yield from crashes(scenario, pairs=False)
        yield from drains(scenario)


def _seconds(scenario: Scenario, single: Outcome, kind: str) -> Iterator[Outcome]:
    if not single.hits:
        return
    letter = single.hits[0].process[0]
    successors = [name for name in single.points if name[0] == letter and name[1:] != "1"]
    for name in successors[:1]:
        for number in range(1, single.points[name] + 1):
            yield run(scenario, 0, Given([*single.hits, Hit(name, number, kind)]))

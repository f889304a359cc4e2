"""A short simulation on every run of the tests, and that a schedule is the same every time."""

from __future__ import annotations

from typing import Any

import pytest

from duly.testing.history import Fault
from duly.testing.simulation.campaign import Tally, crashes, random_schedule, random_schedules
from duly.testing.simulation.plan import Given, Hit, hits_of
from duly.testing.simulation.points import covered
from duly.testing.simulation.run import Outcome, run
from duly.testing.simulation.scenario import GUARANTEES, Scenario, scenario_of
from duly.testing.simulation.shrink import command, shrink

SMALL = [
    Scenario(kind=kind, guarantee=guarantee, messages=2, manners=("ok", "fail once"))
    for kind in ("database", "log", "log-inbox", "queue")
    for guarantee in GUARANTEES
    if not (kind == "queue" and guarantee == "at-most-once")
    and not (kind == "log-inbox" and guarantee != "exactly-once")
]


def told(outcomes: list[Outcome]) -> str:
    """What was broken, and what replays it."""
    return "\n".join(
        f"{anomaly}\n{command(shrink(outcome))}"
        for outcome in outcomes
        for anomaly in outcome.judgement.anomalies[:1]
    )


@pytest.mark.parametrize("kind", ["crash", "vanish"])
@pytest.mark.parametrize("scenario", SMALL, ids=lambda s: f"{s.kind}, {s.guarantee}")
def test_every_single_crash(scenario: Scenario, kind: str) -> None:
    tally = Tally()
    outcomes = list(crashes(scenario, kind, pairs=False))
    for outcome in outcomes:
        tally.add(outcome)
    assert not tally.failures, told(tally.failures)
    assert set(outcomes[0].reached) <= set(tally.crashes), "each point of the plain run"


@pytest.mark.parametrize("kind", ["database", "log", "queue"])
def test_every_pair_of_crashes(kind: Any) -> None:
    tally = Tally()
    for outcome in crashes(Scenario(kind=kind, guarantee="exactly-once", messages=1)):
        tally.add(outcome)
    assert not tally.failures, told(tally.failures)
    assert tally.runs > 100


def test_random_schedules() -> None:
    tally = Tally()
    for outcome in random_schedules(0, 1_200):
        tally.add(outcome)
    assert not tally.failures, told(tally.failures)
    assert len(tally.traces) > 1_150, "nearly every one is another"
    assert tally.verdicts["valid"] > 900
    assert not [point for point, count in covered(tally.crashes).items() if not count]


def test_a_seed_is_one_schedule() -> None:
    for seed in range(40):
        one, two = random_schedule(seed), random_schedule(seed)
        assert (one.trace, one.hits) == (two.trace, two.hits)
        again = run(one.scenario, seed, Given(one.hits))
        assert (again.trace, again.hits) == (one.trace, one.hits), "given its faults, too"


def test_what_a_failure_prints_is_what_it_was() -> None:
    for seed in range(200):
        outcome = random_schedule(seed)
        assert scenario_of(outcome.scenario.text()) == outcome.scenario
        assert hits_of(",".join(hit.text() for hit in outcome.hits)) == list(outcome.hits)


def test_a_fault_that_hit_is_in_the_history() -> None:
    outcome = run(Scenario(), 1, Given([Hit("w1", 3, "pause"), Hit("w9", 1, "crash")]))
    assert outcome.hits == (Hit("w1", 3, "pause"),)
    assert [event.kind for event in outcome.events if isinstance(event, Fault)] == ["pause"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "sqlite-inbox"])
def test_random_schedules_on_sqlite_files(kind: Any) -> None:
    tally = Tally()
    for outcome in random_schedules(0, 40, (kind,)):
        tally.add(outcome)
    assert not tally.failures, told(tally.failures)


def test_a_handler_that_cancels_itself_loses_only_its_own_message() -> None:
    scenario = Scenario(guarantee="at-most-once", manners=("cancel once", "ok"))
    outcome = run(scenario, 0, Given([]))
    assert not outcome.judgement.anomalies

"""A short simulation on every run of the tests, and that a schedule is the same every time.

Every single crash of the covering scenarios runs for the table of guarantees (`test_table`).
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from duly.testing.checker import different_rows
from duly.testing.history import Fault, Read
from duly.testing.simulation.campaign import (
    Tally,
    campaign,
    crashes,
    merged,
    one_of,
    random_schedule,
    random_schedules,
)
from duly.testing.simulation.covering import COVERING
from duly.testing.simulation.plan import Given, Hit, hits_of
from duly.testing.simulation.run import Outcome, run
from duly.testing.simulation.scenario import (
    KINDS,
    MEMORY_KINDS,
    SQLITE_KINDS,
    Scenario,
    scenario_of,
)
from duly.testing.simulation.shrink import command, shrink

AMO: Any = "at-most-once"
ALO: Any = "at-least-once"
EXACT: Any = "exactly-once"


def told(outcomes: list[Outcome]) -> str:
    """What was broken, and what replays it."""
    return "\n".join(
        f"{anomaly}\n{command(shrink(outcome))}"
        for outcome in outcomes
        for anomaly in outcome.judgement.anomalies[:1]
    )


def tally_of(outcomes: Any) -> Tally:
    tally = Tally()
    for outcome in outcomes:
        tally.add(outcome)
    assert not tally.failures, told(tally.failures)
    return tally


@pytest.mark.parametrize(
    "scenario",
    [each for each in COVERING if each.kind in MEMORY_KINDS],
    ids=lambda s: f"{s.kind}, {s.guarantee}",
)
def test_every_single_death_that_nobody_notices(scenario: Scenario) -> None:
    outcomes = list(crashes(scenario, "vanish", pairs=False))
    tally = tally_of(outcomes)
    assert set(outcomes[0].reached) <= set(tally.crashes), "each point of the plain run"


@pytest.mark.parametrize("kind", ["database", "log", "queue"])
def test_every_pair_of_crashes(kind: Any) -> None:
    tally = tally_of(crashes(Scenario(kind=kind, guarantee=EXACT, messages=1)))
    assert tally.runs > 100


def test_random_schedules() -> None:
    tally = tally_of(random_schedules(0, 1_000, MEMORY_KINDS))
    assert len(tally.traces) > 980, "nearly every one is another"
    assert tally.verdicts["valid"] > 750


def test_random_schedules_on_sqlite() -> None:
    tally = tally_of(random_schedules(0, 120, SQLITE_KINDS))
    assert tally.verdicts["valid"] > 80


@pytest.mark.parametrize(
    ("concurrency", "guarantee"), [(1, AMO), (1, ALO), (1, EXACT), (3, AMO), (3, ALO)]
)
def test_coroutines(concurrency: int, guarantee: Any) -> None:
    scenario = Scenario(
        guarantee=guarantee,
        messages=6,
        workers=2,
        manners=("ok", "slow", "hang once", "cancel once", "fail once"),
        asynchronous=True,
        concurrency=concurrency,
        preempt=0.1,
    )
    tally = tally_of(one_of(scenario, seed) for seed in range(60))
    assert tally.verdicts["valid"] > 40


@pytest.mark.parametrize("kind", ["database", "sqlite"])
@pytest.mark.parametrize("guarantee", [AMO, ALO, EXACT])
def test_handlers_of_payloads(kind: Any, guarantee: Any) -> None:
    scenario = Scenario(
        kind=kind,
        guarantee=guarantee,
        messages=6,
        workers=2,
        manners=("ok", "ok", "fail once", "ok", "reject"),
        payloads=True,
        preempt=0.05,
    )
    tally = tally_of(one_of(scenario, seed) for seed in range(30))
    assert tally.verdicts["valid"] > 20


def test_handlers_run_side_by_side() -> None:
    scenario = Scenario(messages=6, asynchronous=True, concurrency=3)
    starts = ends = most = 0
    for event in run(scenario, 0, Given([])).events:
        starts += type(event).__name__ == "Start"
        ends += type(event).__name__ == "End"
        most = max(most, starts - ends)
    assert most == 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_is_one_schedule(kind: Any) -> None:
    for seed in range(12):
        one, two = random_schedule(seed, (kind,)), random_schedule(seed, (kind,))
        assert (one.trace, one.hits) == (two.trace, two.hits)
        again = run(one.scenario, seed, Given(one.hits))
        assert (again.trace, again.hits) == (one.trace, one.hits), "given its faults, too"


def test_what_a_failure_prints_is_what_it_was() -> None:
    for seed in range(200):
        outcome = random_schedule(seed, MEMORY_KINDS)
        assert scenario_of(outcome.scenario.text()) == outcome.scenario
        assert hits_of(",".join(hit.text() for hit in outcome.hits)) == list(outcome.hits)


def test_a_fault_that_hit_is_in_the_history() -> None:
    outcome = run(Scenario(), 1, Given([Hit("w1", 3, "pause"), Hit("w9", 1, "crash")]))
    assert outcome.hits == (Hit("w1", 3, "pause"),)
    assert [event.kind for event in outcome.events if isinstance(event, Fault)] == ["pause"]


def test_a_handler_that_cancels_itself_loses_only_its_own_message() -> None:
    scenario = Scenario(guarantee="at-most-once", manners=("cancel once", "ok"))
    outcome = run(scenario, 0, Given([]))
    assert not outcome.judgement.anomalies


def test_a_campaign_counts_the_same_on_any_number_of_processes() -> None:
    one = campaign(("database",), distinct=190)
    command = [sys.executable, "-m", "duly.testing.simulation", "--processes", "2"]
    ended = subprocess.run(
        [*command, "--schedules", "190", "--kinds", "database"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ended.returncode == 0, ended.stderr
    assert f"{merged(one).runs:,} schedules" in ended.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_whoever_dies_the_rows_are_those_of_a_run_without_faults(kind: Any) -> None:
    """Of any single crash: neither a row more nor one less, and none that is other."""
    plain, *crashed = crashes(Scenario(kind=kind, guarantee=EXACT, messages=2), pairs=False)
    if kind in ("log", "sqlite-cursor"):
        # Nothing drops a repeated publish there, so nobody repeats what its publisher died over.
        crashed = [outcome for outcome in crashed if outcome.hits[0].process[0] != "p"]
    assert len(crashed) > 20
    assert _rows(plain)
    for outcome in crashed:
        assert not different_rows(_rows(plain), _rows(outcome)), command(outcome)


def _rows(outcome: Outcome) -> Any:
    [final] = [event.final for event in outcome.events if isinstance(event, Read)]
    return final.rows

"""PostgreSQL under simulation, and every planted bug of its broker and store caught."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from duly.testing.checker import PROPERTIES
from duly.testing.simulation.campaign import random_schedules
from duly.testing.simulation.plan import Given, hits_of
from duly.testing.simulation.run import run
from duly.testing.simulation.scenario import POSTGRES_KINDS, Scenario, scenario_of
from tests.postgres import planted, planted_broker
from tests.proof.mutations import Mutation, mutated
from tests.proof.test_planted import AT_ONCE, COMMAND, HUNTS_S, hunted
from tests.proof.test_simulation import tally_of
from tests.servers.postgres import OTHER, shared_url

ROOT = Path(__file__).parents[2]
SIMULATED = {**planted.SIMULATED, **planted_broker.SIMULATED}
TESTED = {**planted.TESTED, **planted_broker.TESTED}
ALL: Mapping[str, Mutation | planted.Tested] = {**SIMULATED, **TESTED}


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OTHER, shared_url())


def test_random_schedules() -> None:
    tally = tally_of(random_schedules(0, 60, POSTGRES_KINDS))
    assert tally.verdicts["valid"] > 50


@pytest.mark.slow
def test_many_random_schedules() -> None:
    tally = tally_of(random_schedules(1_000, 150, ("postgres-inbox", "postgres-cursor")))
    assert tally.verdicts["valid"] > 130


@pytest.mark.slow
def test_many_random_schedules_of_the_broker() -> None:
    tally = tally_of(random_schedules(2_000, 60, ("postgres",)))
    assert tally.verdicts["valid"] > 40


Hunt = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def hunts(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[dict[str, Future[Hunt]]]:
    """All that were asked for, begun together: they wait for processes, two at a time."""
    ids = {item.name for item in request.session.items}
    asked = [name for name in ALL if any(id.endswith(f"[{name}]") for id in ids)]
    url = shared_url()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {
            name: pool.submit(_hunt, ALL[name], tmp_path_factory.mktemp("mutated"), url)
            for name in asked
        }
        pool.shutdown(cancel_futures=True)


def _hunt(bug: Mutation | planted.Tested, folder: Path, url: str) -> Hunt:
    if isinstance(bug, Mutation):
        return hunted(bug, folder, {OTHER: url})
    tree = mutated(Mutation(bug.breaks, Scenario(), bug.edits), folder)
    return subprocess.run(
        [*(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"), f"tests/{bug.by}"],
        env={**os.environ, OTHER: url, "PYTHONPATH": f"{tree}{os.pathsep}{ROOT}"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=HUNTS_S,
    )


@pytest.mark.slow
@pytest.mark.timeout(2 * HUNTS_S)
@pytest.mark.parametrize("name", SIMULATED)
def test_it_breaks_the_property_it_is_named_for(name: str, hunts: dict[str, Future[Hunt]]) -> None:
    """And the shipped source breaks none of them under the same schedule."""
    mutation = SIMULATED[name]
    ended = hunts[name].result()
    told = COMMAND.search(ended.stdout)
    assert told, f"{mutation.breaks!r} was not found\n{ended.stdout}{ended.stderr}"
    assert mutation.breaks in ended.stdout
    seed, scenario, faults = told.groups()
    hits = hits_of("" if faults == "none" else faults)
    shipped = run(scenario_of(scenario), int(seed), Given(hits))
    assert not shipped.judgement.anomalies, "without the mutation the same schedule breaks nothing"


@pytest.mark.slow
@pytest.mark.timeout(2 * HUNTS_S)
@pytest.mark.parametrize("name", TESTED)
def test_it_is_caught_by_a_test(name: str, hunts: dict[str, Future[Hunt]]) -> None:
    """A test that the shipped source passes, in this very run."""
    bug = TESTED[name]
    ended = hunts[name].result()
    assert ended.returncode == 1, f"{name} was not caught\n{ended.stdout[-3000:]}{ended.stderr}"
    assert f"FAILED tests/{bug.by}" in ended.stdout


def test_there_are_enough_of_the_broker_and_of_the_store() -> None:
    ofs = planted_broker.SIMULATED.keys() | planted_broker.TESTED.keys()
    assert len(ofs) >= 15
    assert len(planted.SIMULATED.keys() | planted.TESTED.keys()) >= 8
    assert not ofs & (planted.SIMULATED.keys() | planted.TESTED.keys()), "each has a name"
    known = {*PROPERTIES, "latency only"}
    assert {each.breaks for each in ALL.values()} <= known

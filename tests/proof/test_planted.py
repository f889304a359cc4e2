"""Every planted bug is caught by the name of what it breaks, and changes what happened before."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from duly.testing.simulation.plan import Given, hits_of
from duly.testing.simulation.run import run
from duly.testing.simulation.scenario import scenario_of
from tests.proof.mutations import MUTATIONS, Mutation, mutated

# They wait for processes, of which two at a time are enough.
AT_ONCE = 2

# Far longer than any takes on a machine that has time for it.
HUNTS_S = 250

COMMAND = re.compile(r"--seed (\d+) --scenario (\S+) --faults (\S+)")


def hunted(
    mutation: Mutation, folder: Path, more: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the mutated package until the property is broken."""
    tree = mutated(mutation, folder)
    command = [sys.executable, "-m", "duly.testing.simulation"]
    command += ["--scenario", mutation.scenario.text(), "--until", mutation.breaks]
    return subprocess.run(
        command,
        env={**os.environ, **(more or {}), "PYTHONPATH": str(tree)},
        cwd=tree,
        capture_output=True,
        text=True,
        check=False,
        timeout=HUNTS_S,
    )


@pytest.fixture(scope="module")
def hunts(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """All that were asked for, begun together."""
    ids = {item.name for item in request.session.items}
    asked = [name for name in MUTATIONS if f"{test_it_is_caught_by_name.__name__}[{name}]" in ids]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {
            name: pool.submit(hunted, MUTATIONS[name], tmp_path_factory.mktemp("mutated"))
            for name in asked
        }
        pool.shutdown(cancel_futures=True)


@pytest.mark.timeout(2 * HUNTS_S)
@pytest.mark.parametrize("name", MUTATIONS)
def test_it_is_caught_by_name(
    name: str, hunts: dict[str, Future[subprocess.CompletedProcess[str]]]
) -> None:
    mutation = MUTATIONS[name]
    ended = hunts[name].result()
    told = COMMAND.search(ended.stdout)
    assert told, f"{mutation.breaks!r} was not found\n{ended.stdout}{ended.stderr}"
    assert mutation.breaks in ended.stdout
    seed, scenario, faults = told.groups()
    hits = hits_of("" if faults == "none" else faults)
    shipped = run(scenario_of(scenario), int(seed), Given(hits))
    assert not shipped.judgement.anomalies, "without the mutation the same schedule breaks nothing"


def test_what_is_mutated_is_what_runs(tmp_path: Path) -> None:
    """A mutation that cannot be missed, so that no other is judged on the shipped source."""
    mutation = MUTATIONS["settle before the handler"]
    tree = mutated(mutation, tmp_path)
    (tree / "duly" / "errors.py").write_text("raise SystemExit('mutated')\n")
    ended = subprocess.run(
        [sys.executable, "-m", "duly.testing.simulation"],
        env={**os.environ, "PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert "mutated" in ended.stderr

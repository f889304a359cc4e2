"""Whole runs, as a user starts them: real workers, real kills, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from duly.demo.evidence import open_evidence
from duly.demo.verdict import judge
from tests.waiting import alive, eventually

pytestmark = pytest.mark.timeout(180)


def demo(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "duly", "demo", *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
        env={**os.environ, **environment},
    )


def test_a_short_run_keeps_every_promise_and_can_be_judged_again(tmp_path: Path):
    folder = tmp_path / "kept"
    ended = demo(
        "--messages", "3000", "--kills", "8", "--processes", "3", "--json", "--keep", str(folder)
    )  # fmt: skip
    told: dict[str, Any] = json.loads(ended.stdout)
    flows = {flow["name"]: flow for flow in told["flows"]}
    assert {(name, flow["guarantee"]) for name, flow in flows.items()} == {
        ("sensors", "at-most-once"),
        ("rides", "at-least-once"),
        ("rides-not-idempotent", "at-least-once"),
        ("payments", "exactly-once"),
    }
    assert all(flow["verdict"] != "invalid" for flow in flows.values()), told
    assert all(flow["published"] == 3000 for flow in flows.values())
    assert {name: flow["lost"] for name, flow in flows.items() if name != "sensors"} == {
        "rides": 0,
        "rides-not-idempotent": 0,
        "payments": 0,
    }
    assert flows["sensors"]["duplicated"] == flows["payments"]["duplicated"] == 0
    assert 1 <= told["kills_in_work"] <= told["kills"] <= 8
    assert ended.returncode == {"valid": 0, "unknown": 3}[told["verdict"]]
    with open_evidence(folder) as evidence:
        again = {found.name: found for found in judge(evidence)}
    assert {name: found.handled for name, found in again.items()} == {
        name: flow["handled"] for name, flow in flows.items()
    }


def test_a_run_without_kills_shows_nothing_and_loses_nothing():
    ended = demo("--messages", "200", "--kills", "0", "--processes", "1")
    assert ended.returncode == 3, ended.stdout + ended.stderr
    assert "nothing was put to the test" in " ".join(ended.stdout.split())


def test_a_run_with_nothing_to_do_ends():
    told = json.loads(demo("--messages", "0", "--kills", "2", "--json").stdout)
    assert (told["kills"], told["verdict"]) == (0, "unknown")


# At-most-once that settles after the handler, as at-least-once does; and handlers that take
# half a millisecond, so that most kills find some of a claim's messages handled.
PLANTED = """
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import PathFinder
from threading import Event

class Planted(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "duly.worker.lane":
            return None
        spec = PathFinder.find_spec(name, path)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            from duly.demo.journal import Journal
            from duly.guarantees import Guarantee
            write = Journal.write
            def slowly(journal, line):
                write(journal, line)
                Event().wait(0.0005)
            Journal.write = slowly
            module.ROUNDS[Guarantee.AT_MOST_ONCE] = module.rounds.at_least_once
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Planted())
"""


def test_a_planted_bug_is_found(tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text(PLANTED)
    ended = demo(
        "--messages", "3000", "--kills", "12", "--processes", "2", "--json",
        PYTHONPATH=str(tmp_path),
    )  # fmt: skip
    told = json.loads(ended.stdout)
    [sensors, *others] = told["flows"]
    assert (sensors["verdict"], ended.returncode) == ("invalid", 1), told
    assert sensors["why"][0].startswith("double start")
    assert all(flow["verdict"] != "invalid" for flow in others)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "duly", "demo", "--messages", "1000000", "--kills", "50"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    yield process
    process.kill()
    process.wait()


def below(pid: int) -> Sequence[int]:
    """The processes that descend from this one."""
    tasks = Path(f"/proc/{pid}/task")
    found: list[int] = []
    for children in tasks.glob("*/children"):
        for child in map(int, children.read_text().split()):
            found += [child, *below(child)]
    return found


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_an_interrupted_run(
    running: subprocess.Popen[bytes], tmp_path: Path, how: signal.Signals
):
    # The supervisor and four workers.
    eventually(lambda: len(below(running.pid)) >= 5, "the workers work")
    eventually(lambda: list(tmp_path.glob("*/readings.log")), "something was handled")
    family = below(running.pid)
    running.send_signal(how)
    status = running.wait(30)
    eventually(lambda: not any(map(alive, family)), "every process has ended")
    if how is not signal.SIGKILL:
        assert status == 130
        assert list(tmp_path.iterdir()) == []

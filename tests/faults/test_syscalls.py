"""Death in the middle of a COMMIT, and system calls that fail: below every seam.

strace ends a process at its n-th write or sync, or lets that call fail.
"""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from tests.faults import judge, tracing
from tests.faults.conftest import MakeScene
from tests.faults.scene import Scene
from tests.faults.sides import all_of
from tests.faults.tracing import traced

PUBLISHED = range(4)
NUMBERS = range(6)
# How many of each call are tried, spread over all: every one costs a start of Python.
TRIED = 8


def spread(counts: Mapping[str, int], tried: int = TRIED) -> Sequence[tuple[str, int]]:
    """Calls with their numbers, spread over a run."""
    return [
        (call, n)
        for call, times in sorted(counts.items())
        for n in sorted({1 + index * (times - 1) // (tried - 1) for index in range(tried)})
    ]


class Runs:
    """The same process again and again, each on files of its own."""

    def __init__(self, make_scene: MakeScene, **orders: Any) -> None:
        self._make = make_scene
        self._orders = orders
        self._numbers = itertools.count()
        self.hit = 0

    def fresh(self) -> Scene:
        return self._make(f"scene-{next(self._numbers)}", **self._orders)


def integrity(scene: Scene) -> list[str]:
    if not scene.path.exists():
        return []
    connection = sqlite3.connect(scene.path)
    try:
        found = connection.execute("pragma integrity_check").fetchall()
    finally:
        connection.close()
    return [] if found == [("ok",)] else [f"integrity check: {found}"]


# --- publishers


CALLS = "pwrite64,fdatasync,unlink,ftruncate,flock"


def published(scene: Scene) -> list[str]:
    """What the journal says of each publish must be so."""
    state = scene.state()
    complaints = integrity(scene)
    there = set(state.published)
    complaints += [f"{n}: acknowledged and lost" for n in set(scene.noted("acked")) - there]
    refused = set(scene.noted("PublishFailed"))
    return complaints + [f"{n}: certainly not stored, and stored" for n in refused & there]


def test_a_publisher_killed_within_a_call(make_scene: MakeScene):
    """On a file that it makes itself, so that this is the making of the file too."""
    tracing.require()
    runs = Runs(make_scene)
    counts = tracing.count(runs.fresh(), CALLS, "publisher", numbers=[*PUBLISHED])

    def killed(case: tuple[str, int]) -> list[str]:
        scene = runs.fresh()
        inject = f"inject={case[0]}:signal=SIGKILL:when={case[1]}"
        status, _ = traced(
            scene, ["-o", "/dev/null", "-e", inject], "publisher", numbers=[*PUBLISHED]
        )
        runs.hit += status != 0
        complaints = published(scene) if scene.path.exists() else []
        scene.run("publisher", numbers=[*PUBLISHED])
        state = scene.state()
        complaints += [
            f"{n}: stored {state.published[n]} times" for n in PUBLISHED if state.published[n] != 1
        ]
        return complaints + integrity(scene)

    cases = spread(counts)
    all_of(cases, killed)
    assert runs.hit >= len(cases) * 2 // 3, "most of them must have hit"


@pytest.mark.parametrize(
    ("call", "error"),
    [("fdatasync", "EIO"), ("pwrite64", "EIO"), ("pwrite64", "ENOSPC"), ("ftruncate", "EIO")],
)
def test_a_publisher_whose_calls_fail_says_what_is_so(make_scene: MakeScene, call: str, error: str):
    tracing.require()
    runs = Runs(make_scene)
    scene = runs.fresh()
    scene.prepare([])
    counts = tracing.count(scene, call, "publisher", numbers=[*PUBLISHED])

    def failing(case: tuple[str, int]) -> list[str]:
        scene = runs.fresh()
        scene.prepare([])
        inject = f"inject={case[0]}:error={error}:when={case[1]}"
        status, said = traced(
            scene, ["-o", "/dev/null", "-e", inject], "publisher", numbers=[*PUBLISHED]
        )
        # A file that cannot be opened ends the program, with duly's own error.
        complaints = [] if status == 0 or "duly.errors." in said else [said]
        runs.hit += bool(scene.noted("PublishFailed") or scene.noted("PublishUnknown") or status)
        return complaints + published(scene)

    all_of(spread(counts, 8), failing)
    assert runs.hit or call == "ftruncate", "no call failed where it mattered"


# --- workers


def test_an_exactly_once_worker_killed_within_a_call(make_scene: MakeScene):
    tracing.require()
    runs = Runs(make_scene)
    scene = runs.fresh()
    scene.prepare(NUMBERS, damaged=True)
    counts = tracing.count(scene, CALLS, "worker")

    def killed(case: tuple[str, int]) -> list[str]:
        scene = runs.fresh()
        scene.prepare(NUMBERS, damaged=True)
        inject = f"inject={case[0]}:signal=SIGKILL:when={case[1]}"
        status, _ = traced(scene, ["-o", "/dev/null", "-e", inject], "worker")
        runs.hit += status != 0
        scene.run(leave=True)
        return judge.exactly_once(scene, NUMBERS) + integrity(scene)

    cases = spread(counts)
    all_of(cases, killed)
    assert runs.hit >= len(cases) * 2 // 3, "most of them must have hit"


@pytest.mark.parametrize("guarantee", ["exactly-once", "at-least-once"])
@pytest.mark.parametrize(("call", "error"), [("fdatasync", "EIO"), ("pwrite64", "ENOSPC")])
def test_a_worker_whose_calls_fail_keeps_its_promise(
    make_scene: MakeScene, guarantee: str, call: str, error: str
):
    tracing.require()
    runs = Runs(make_scene, guarantee=guarantee)
    scene = runs.fresh()
    scene.prepare(NUMBERS, damaged=True)
    counts = tracing.count(scene, call, "worker")

    def failing(case: tuple[str, int]) -> list[str]:
        scene = runs.fresh()
        scene.prepare(NUMBERS, damaged=True)
        inject = f"inject={case[0]}:error={error}:when={case[1]}"
        status, said = traced(scene, ["-o", "/dev/null", "-e", inject], "worker")
        complaints = [] if status == 0 or "duly.errors." in said else [said]
        scene.run(leave=True)
        judged = judge.exactly_once if guarantee == "exactly-once" else judge.at_least_once
        return complaints + judged(scene, NUMBERS) + integrity(scene)

    all_of(spread(counts, 6), failing)

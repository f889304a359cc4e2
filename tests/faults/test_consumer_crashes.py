"""A worker dies by SIGKILL at every step between claim and settlement; a successor drains.

Every step of a run is found by running it once without a fault, so a new step is tested from
the day it exists. A run in which the chosen step was not reached proves nothing and fails.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.faults import judge
from tests.faults.conftest import MakeScene
from tests.faults.scene import KILLED, Scene
from tests.faults.sides import all_of

NUMBERS = range(6)
BATCH = 3
# DULY_CRASH_PAIRS=500 tries more pairs, and every step of every kind.
PAIRS = int(os.environ.get("DULY_CRASH_PAIRS", "30"))
# Where most steps are the same as in another kind, some of them will do.
EVERY = {"one by one": 3, "by key": 2, "by inbox": 2, "async": 2} if PAIRS <= 30 else {}

Kind = dict[str, Any]

EXACTLY_ONCE: dict[str, Kind] = {
    "by claim": {},
    "async": {"async": True},
    "by inbox": {"store": "effects.db"},
    "by key": {"partitions": 2, "options": {"order_by_key": True, "batch": 3}},
    "one by one": {"options": {"batch": 1}},
}
AT_LEAST_ONCE: dict[str, Kind] = {
    "def": {},
    "async": {"async": True},
    "concurrent": {"async": True, "options": {"concurrency": 3, "batch": 3}},
    "by key": {"partitions": 2, "options": {"order_by_key": True, "batch": 3}},
    "renewed": {
        "options": {"lease_s": 0.3, "batch": 3},
        "misbehaviour": {"n": 1, "how": "wait for a renewal"},
    },
}
AT_MOST_ONCE: dict[str, Kind] = {
    "def": {},
    "async": {"async": True},
    "concurrent": {"async": True, "options": {"concurrency": 3, "batch": 3}},
}
ALL = [
    *(("exactly-once", kind) for kind in EXACTLY_ONCE),
    *(("at-least-once", kind) for kind in AT_LEAST_ONCE),
    *(("at-most-once", kind) for kind in AT_MOST_ONCE),
]
KINDS = {
    "exactly-once": EXACTLY_ONCE,
    "at-least-once": AT_LEAST_ONCE,
    "at-most-once": AT_MOST_ONCE,
}


class Crashes:
    """Scenes that all begin with the same file, and the steps a worker makes on it."""

    def __init__(self, make_scene: MakeScene, guarantee: str, kind: Kind, **orders: Any) -> None:
        self._make = make_scene
        self._orders = {"guarantee": guarantee, **kind, **orders}
        self._template = make_scene("template", **self._orders)
        self._template.prepare(NUMBERS, damaged=True)
        self._numbers = itertools.count()
        self.unreached: list[str] = []

    def fresh(self) -> Scene:
        """A scene with the messages published and nothing handled."""
        name = f"scene-{next(self._numbers)}"
        folder = self._template.folder.with_name(name)
        folder.mkdir()
        for file in self._template.folder.glob("*.db"):
            shutil.copy(file, folder / file.name)
        return self._make(name, **self._orders)

    def steps(self) -> Sequence[str]:
        """The points of a run without a fault, in order."""
        scene = self._traced()
        for _ in range(2):  # with a planted bug a transaction that time cuts short loses the rest
            if len(scene.noted("start")) < len(NUMBERS) - 1:
                scene = self._traced()
        assert len(scene.noted("start")) == len(NUMBERS) - 1, "all but the unreadable one"
        return points_in(scene.folder / "trace")

    def _traced(self) -> Scene:
        scene = self.fresh()
        scene.run(trace=str(scene.folder / "trace"))
        return scene

    def judge(self, *crashes: str) -> list[str]:
        """One worker after another dies at these points, the last one drains."""
        scene = self.fresh()
        deaths = []
        for index, crash in enumerate(crashes):
            status = scene.start(crash=crash).wait()
            if status != KILLED:
                # The second of a pair may find less work than the point needs.
                if index == 0:
                    self.unreached.append(crash)
                assert status == 0, scene.describe()
                continue
            deaths.append((scene.state(), scene.noted("start")))
        # A worker may leave without a word once all is settled, save where that comes first.
        scene.run(leave=self._orders["guarantee"] != "at-most-once")
        found = self._judged(scene, deaths)
        if not found:
            shutil.rmtree(scene.folder)
        return found

    def _judged(self, scene: Scene, deaths: Sequence[Any]) -> list[str]:
        match self._orders["guarantee"]:
            case "exactly-once":
                return judge.exactly_once(scene, NUMBERS)
            case "at-least-once":
                return judge.at_least_once(scene, NUMBERS)
            case _:
                unsettled = deaths[-1][0].unsettled if deaths else list(NUMBERS)
                return judge.at_most_once(scene, NUMBERS, unsettled, BATCH * len(deaths))


def points_in(trace: Path) -> Sequence[str]:
    """The steps of a trace that a second run comes to as well."""
    points = trace.read_text().splitlines()
    claims = sum(point.startswith("after subscription.claim") for point in points)
    # After the last message a worker asks for more as often as time allows.
    return [
        point
        for point in points
        if not point.startswith("before subscription.claim") or int(point.split()[-1]) <= claims
    ]


@pytest.mark.parametrize(("guarantee", "kind"), ALL)
def test_a_worker_killed_at_any_step(make_scene: MakeScene, guarantee: str, kind: str):
    crashes = Crashes(make_scene, guarantee, KINDS[guarantee][kind])
    steps = crashes.steps()[:: EVERY.get(kind, 1)]
    all_of(steps, crashes.judge)
    # A transaction takes what it has time for, and so does not come to the same points each time.
    again, crashes.unreached = crashes.unreached, []
    if again:
        all_of(again, crashes.judge)
    # How handlers that run side by side share their settlements, a relay its messages, and how
    # often a lease is renewed, is a matter of time.
    allowed = len(steps) // 3 if kind in ("concurrent", "by inbox", "renewed") else 0
    assert len(crashes.unreached) <= allowed, f"never came to {crashes.unreached}"


@pytest.mark.timeout(120 + 2 * PAIRS)
@pytest.mark.parametrize(
    ("guarantee", "kind"),
    [
        ("exactly-once", "by claim"),
        ("exactly-once", "by inbox"),
        ("at-least-once", "def"),
        ("at-most-once", "def"),
    ],
)
def test_its_successor_killed_too(make_scene: MakeScene, guarantee: str, kind: str):
    crashes = Crashes(make_scene, guarantee, KINDS[guarantee][kind])
    all_of(pairs(crashes.steps(), PAIRS), lambda pair: crashes.judge(*pair))
    assert len(crashes.unreached) <= (PAIRS // 3 if kind == "by inbox" else 0), crashes.unreached


def pairs(steps: Sequence[str], count: int, seed: int = 1) -> Iterable[tuple[str, str]]:
    """Some pairs of steps, spread over all; the same each time."""
    every = list(itertools.product(steps, steps))
    return Random(seed).sample(every, min(count, len(every)))


# --- these tests, tested


@pytest.mark.parametrize(
    ("guarantee", "kind", "bug"),
    [
        ("at-least-once", "def", "settle before the handler"),
        ("at-most-once", "def", "settle after the handler"),
        ("exactly-once", "by claim", "settle in a second commit"),
        ("exactly-once", "by claim", "settle before the effects commit"),
        ("exactly-once", "by claim", "outputs beside the transaction"),
    ],
)
def test_a_planted_bug_is_caught(make_scene: MakeScene, guarantee: str, kind: str, bug: str):
    crashes = Crashes(make_scene, guarantee, KINDS[guarantee][kind], bug=bug)
    steps = [step for step in crashes.steps() if re.search("settle|commit|begin|start", step)]
    with pytest.raises(AssertionError, match=r"\d+ of \d+:"):
        all_of(steps, crashes.judge)

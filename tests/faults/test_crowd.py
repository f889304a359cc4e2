"""Several workers and publishers on one file, killed again and again, three kinds of consumers."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.faults.conftest import MakeScene
from tests.faults.program import POISON
from tests.faults.scene import KILLED, Child, Scene
from tests.waiting import eventually

PER_PUBLISHER = 150
KILLS = 24
SEED = int(os.environ.get("DULY_CROWD_SEED", "0"))


class Crowd:
    """Processes that are started again when they die."""

    def __init__(self, scene: Scene, workers: int, publishers: int) -> None:
        self.scene = scene
        each = PER_PUBLISHER
        parts = [[*range(each * index, each * (index + 1))] for index in range(publishers)]
        self.roles: list[tuple[str, dict[str, Any]]] = [
            *[("crowd worker", {}) for _ in range(workers)],
            *[("publisher", {"numbers": numbers}) for numbers in parts],
        ]
        self.members: list[Child | None] = [None] * len(self.roles)
        self.numbers = [n for numbers in parts for n in numbers]

    def tend(self) -> bool:
        """Start whoever is dead; whether every publisher is done."""
        for index, (role, orders) in enumerate(self.roles):
            member = self.members[index]
            if member is None or (member.ended.is_set() and member.status != 0):
                assert member is None or member.status == KILLED, self.scene.describe()
                self.members[index] = self.scene.start(role, **orders)
        return all(
            member is not None and member.ended.is_set()
            for member, (role, _) in zip(self.members, self.roles, strict=True)
            if role == "publisher"
        )

    def strike(self, random: Random) -> bool:
        living = [m for m in self.members if m is not None and not m.ended.is_set()]
        if living:
            random.choice(living).kill()
        return bool(living)

    def end(self) -> None:
        for member in self.members:
            if member is not None:
                member.signal(signal.SIGTERM)
                # One that was only being started has no handler of the signal yet.
                assert member.wait() in (0, -signal.SIGTERM), self.scene.describe()


@pytest.mark.parametrize(("workers", "publishers"), [(2, 2), (4, 1)])
def test_a_crowd_under_kills(make_scene: MakeScene, workers: int, publishers: int):
    seed = SEED or int.from_bytes(os.urandom(4))
    print(f"replay: DULY_CROWD_SEED={seed}")  # noqa: T201 - shown where the test fails
    random = Random(seed)
    scene = make_scene()
    scene.prepare([])
    crowd = Crowd(scene, workers, publishers)
    kills, published, next_at = 0, False, 0
    while kills < KILLS or not published:
        published = crowd.tend()
        # Kills are spread over the work: one for so many lines of the journal.
        grown = lines(scene)
        if kills < KILLS and (grown >= next_at or published):
            kills += crowd.strike(random)
            next_at = grown + random.randint(1, 120)
    crowd.tend()
    eventually(
        lambda: crowd.tend() and not scene.state().unsettled, "all is settled", scene.describe, 60
    )
    crowd.end()
    assert verdict(scene, crowd.numbers) == [], scene.folder


def lines(scene: Scene) -> int:
    path: Path = scene.folder / "journal"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def verdict(scene: Scene, numbers: list[int]) -> list[str]:
    state = scene.state()
    complaints = []
    with scene.reading() as connection:
        rows = connection.execute(
            "select u.name, cast(d.id as integer), d.error from duly_dead d"
            " join duly_subscriptions u using (subscription_no)"
        ).fetchall()
    dead = Counter((name, n) for name, n, _ in rows)
    # A message that was alone each time its worker was killed may be given up on, in sight.
    unlucky = {(name, n) for name, n, why in rows if "the worker died" in why}
    once, ended = scene.noted("once"), scene.noted("end")
    for n in numbers:
        if state.published[n] != 1:
            complaints.append(f"{n}: stored {state.published[n]} times")
        wanted = (0, 0, 0) if ("exactly", n) in dead else (1, 1, 1)
        if state.taken(n)[:3] != wanted:
            complaints.append(f"{n}: took effect {state.taken(n)}, not {wanted}")
        if once[n] > 1:
            complaints.append(f"{n}: at-most-once, and started {once[n]} times")
        if not ended[n] and ("least", n) not in dead:
            complaints.append(f"{n}: at-least-once, and no start returned")
        complaints += [
            f"{n}: dead for {name!r}"
            for name in ("exactly", "least")
            if (name, n) in dead and n != POISON and (name, n) not in unlucky
        ]
    if len(unlucky) > KILLS:
        complaints.append(f"{len(unlucky)} given up on by {KILLS} kills")
    if sum(once.values()) < len(numbers) // 2:
        complaints.append(f"at-most-once lost {len(numbers) - sum(once.values())}")
    return complaints

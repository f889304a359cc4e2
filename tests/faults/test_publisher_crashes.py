"""A publisher dies by SIGKILL at every step; another one publishes the same again.

What was acknowledged is there. A business row and its message are there together or not at all.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest

from tests.faults.conftest import MakeScene
from tests.faults.scene import KILLED, Scene, State
from tests.faults.sides import all_of

NUMBERS = [0, 1, 2]

KINDS = [
    ("exactly-once", "publish"),
    ("exactly-once", "publish_many"),
    ("exactly-once", "within"),
    ("exactly-once", "transaction"),
    ("at-least-once", "publish"),
    ("at-most-once", "publish"),
]


class Crashes:
    """Publishers of the same numbers, each on a file of its own."""

    def __init__(self, make_scene: MakeScene, guarantee: str, how: str, **orders: Any) -> None:
        self._make = make_scene
        self._guarantee = guarantee
        self._how = how
        self._orders = orders
        self._count = itertools.count()

    def fresh(self) -> Scene:
        name = f"scene-{next(self._count)}"
        scene = self._make(name, guarantee=self._guarantee, how=self._how, **self._orders)
        scene.prepare([])
        return scene

    def steps(self) -> Sequence[str]:
        scene = self.fresh()
        scene.run("publisher", numbers=NUMBERS, trace=str(scene.folder / "trace"))
        assert not self.missing(scene.state(), set(NUMBERS))
        return (scene.folder / "trace").read_text().splitlines()

    def judge(self, crash: str) -> list[str]:
        scene = self.fresh()
        status = scene.start("publisher", numbers=NUMBERS, crash=crash).wait()
        if status != KILLED:
            return [f"ended with {status} and never came to {crash!r}"]
        state = scene.state()
        complaints = self.torn(state)
        if self._guarantee != "at-most-once":
            complaints += self.missing(state, set(scene.noted("acked")))
        again = [n for n in NUMBERS if not state.effects[n]]
        if self._guarantee == "exactly-once":
            scene.run("publisher", numbers=again)
            complaints += self.missing(scene.state(), set(NUMBERS))
            complaints += self.torn(scene.state())
        return complaints + self.repeated(scene.state())

    def numbers(self, asked: set[int]) -> set[int]:
        if self._how == "publish_many":
            return {n * 10 + each for n in asked for each in range(10)}
        return asked

    def missing(self, state: State, acked: set[int]) -> list[str]:
        return [f"{n}: acknowledged and lost" for n in self.numbers(acked) - set(state.published)]

    def torn(self, state: State) -> list[str]:
        if self._how not in ("within", "transaction"):
            return []
        return [
            f"{n}: business row {state.effects[n]} times, message {state.published[n]} times"
            for n in NUMBERS
            if state.effects[n] != state.published[n]
        ]

    def repeated(self, state: State) -> list[str]:
        return [f"{n}: stored {times} times" for n, times in state.published.items() if times > 1]


@pytest.mark.parametrize(("guarantee", "how"), KINDS)
def test_a_publisher_killed_at_any_step(make_scene: MakeScene, guarantee: str, how: str):
    crashes = Crashes(make_scene, guarantee, how)
    all_of(crashes.steps(), crashes.judge)


def test_a_message_beside_the_transaction_is_caught(make_scene: MakeScene):
    crashes = Crashes(
        make_scene, "exactly-once", "transaction", bug="outputs beside the transaction"
    )
    with pytest.raises(AssertionError, match="business row 1 times, message 0 times"):
        all_of([f"planted: between the two {n}" for n in (1, 2)], crashes.judge)

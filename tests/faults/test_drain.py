"""SIGTERM while handlers run: what has not started is given back, uncharged and unrepeated."""

from __future__ import annotations

import signal
from collections import Counter

import pytest

from tests.faults import judge
from tests.faults.conftest import MakeScene
from tests.faults.scene import Child, Scene
from tests.waiting import eventually

NUMBERS = (0, 1, 3, 5, 6, 7)
OPTIONS = {"batch": 4}
GATE = {"n": 1, "how": "wait at the gate"}


def draining(scene: Scene, drain_s: float) -> Child:
    """A worker that was told to end while a handler is in the middle of its work."""
    scene.prepare(NUMBERS)
    worker = scene.start(
        options=OPTIONS, misbehaviour=GATE, until="told", drain_s=drain_s, trace=trace(scene)
    )
    eventually(lambda: scene.noted("misbehaves"), "a handler waits", scene.describe)
    worker.signal(signal.SIGTERM)
    eventually(lambda: "before drain" in read(scene), "it drains", scene.describe)
    return worker


def trace(scene: Scene) -> str:
    return str(scene.folder / "trace")


def read(scene: Scene) -> str:
    return (scene.folder / "trace").read_text()


def judged(scene: Scene, guarantee: str, unsettled: Counter[int], lost: int) -> list[str]:
    match guarantee:
        case "exactly-once":
            return judge.exactly_once(scene, NUMBERS, ())
        case "at-least-once":
            return judge.at_least_once(scene, NUMBERS, ())
        case _:
            return judge.at_most_once(scene, NUMBERS, unsettled, lost)


@pytest.mark.parametrize("guarantee", ["at-most-once", "at-least-once", "exactly-once"])
def test_a_drain_in_time(make_scene: MakeScene, guarantee: str):
    scene = make_scene(guarantee=guarantee)
    worker = draining(scene, drain_s=20)
    (scene.folder / "go").touch()
    assert worker.wait() == 0, scene.describe()
    unsettled = scene.state().unsettled
    assert unsettled, "it went on with everything"
    scene.run(options=OPTIONS)
    assert judged(scene, guarantee, unsettled, lost=0) == [], scene.describe()
    # Nothing failed and nobody died: nothing may have started twice.
    assert judge.repeats(scene, Counter()) == [], scene.describe()


@pytest.mark.parametrize("guarantee", ["at-most-once", "at-least-once", "exactly-once"])
def test_a_drain_that_is_cut_off(make_scene: MakeScene, guarantee: str):
    scene = make_scene(guarantee=guarantee)
    worker = draining(scene, drain_s=0.3)
    assert worker.wait() == 1, scene.describe()
    unsettled = scene.state().unsettled
    scene.run(options=OPTIONS)
    assert judged(scene, guarantee, unsettled, lost=3) == [], scene.describe()
    with scene.reading() as connection:
        charged = connection.execute(
            "select count(*) from duly_incidents where detail like '%, charged'"
        ).fetchone()
    assert charged == (0,)


@pytest.mark.parametrize("guarantee", ["at-most-once", "at-least-once", "exactly-once"])
def test_killed_while_it_drains(make_scene: MakeScene, guarantee: str):
    scene = make_scene(guarantee=guarantee)
    worker = draining(scene, drain_s=20)
    worker.kill()
    unsettled = scene.state().unsettled
    scene.run(options=OPTIONS)
    assert judged(scene, guarantee, unsettled, lost=3) == [], scene.describe()

"""The machine's wall clock is stepped by an hour: leases and retries do not care, due times do."""

from __future__ import annotations

import time
from collections import Counter

import pytest

from duly.testing.chaos.surroundings import step
from tests.faults import judge
from tests.faults.conftest import MakeScene
from tests.faults.scene import Child, Scene
from tests.waiting import eventually

NUMBERS = range(4)
HOUR_S = 3600
# Every process of a scene goes by the one clock of its machine.
CLOCK = {"what": "clock", "with": {"offset_s": 0}}


def started(scene: Scene, child: Child) -> set[int]:
    mine = [words for words in scene.journal() if int(words[-1]) == child.pid]
    return {int(words[1]) for words in mine if words[0] == "start"}


@pytest.mark.parametrize("by_s", [HOUR_S, -HOUR_S])
@pytest.mark.parametrize("guarantee", ["at-least-once", "at-most-once", "exactly-once"])
def test_a_lease_is_as_long_as_ever(make_scene: MakeScene, guarantee: str, by_s: int):
    numbers = (0, 1, 3, 5)
    scene = make_scene(guarantee=guarantee, before=CLOCK)
    scene.prepare(numbers)
    options = {"batch": 3, "lease_s": 1.0}
    gate = {"n": 1, "how": "wait at the gate"}
    holder = scene.start(options=options, misbehaviour=gate)
    eventually(lambda: scene.noted("misbehaves"), "a handler waits", scene.describe)
    other = scene.start(options=options, until="told")
    if guarantee != "exactly-once":  # there nobody comes in before the transaction has ended
        eventually(lambda: 5 in started(scene, other), "the other works", scene.describe)
    step(scene.folder / "clock", by_s)
    # Longer than the lease, which its holder renews, whatever the time of day.
    with pytest.raises(AssertionError):
        eventually(lambda: {0, 1, 3} & started(scene, other), "taken away", timeout_s=1.5)
    (scene.folder / "go").touch()
    assert holder.wait() == 0, scene.describe()
    other.signal(15)
    assert other.wait() == 0, scene.describe()
    match guarantee:
        case "exactly-once":
            assert judge.exactly_once(scene, numbers, ()) == []
        case "at-least-once":
            assert judge.at_least_once(scene, numbers, ()) == []
            assert judge.repeats(scene, Counter()) == [], scene.describe()
        case _:
            assert judge.at_most_once(scene, numbers, numbers, 0) == []


@pytest.mark.parametrize("by_s", [HOUR_S, -HOUR_S])
@pytest.mark.parametrize("guarantee", ["at-least-once", "exactly-once"])
def test_a_retry_waits_as_long_as_it_was_meant_to(make_scene: MakeScene, guarantee: str, by_s: int):
    scene = make_scene(guarantee=guarantee, before=CLOCK)
    scene.prepare(NUMBERS)
    options = {"batch": 3, "first_s": 2.0, "attempts": 2}
    worker = scene.start(options=options, until="told")
    eventually(lambda: set(scene.state().unsettled) == {2}, "one is parked", scene.describe)
    began = time.monotonic()
    assert not scene.state().dead
    step(scene.folder / "clock", by_s)
    scene.run("publisher", numbers=[7])
    eventually(lambda: scene.noted("start")[7], "others are handled", scene.describe)
    eventually(lambda: scene.state().dead[2] == 1, "its second attempt", scene.describe)
    assert time.monotonic() - began > 1, "the clock's step is no time that has passed"
    worker.signal(15)
    assert worker.wait() == 0
    judged = judge.exactly_once if guarantee == "exactly-once" else judge.at_least_once
    assert judged(scene, [*NUMBERS, 7], {2}) == []


def test_a_retry_settled_after_a_step_in_its_transaction_waits_no_longer(make_scene: MakeScene):
    scene = make_scene(before=CLOCK)
    scene.prepare(NUMBERS)
    gate = {"n": 1, "how": "wait at the gate"}
    worker = scene.start(options={"batch": 3}, misbehaviour=gate, until="told")
    eventually(lambda: scene.noted("misbehaves"), "a handler waits", scene.describe)
    step(scene.folder / "clock", HOUR_S)
    (scene.folder / "go").touch()
    eventually(lambda: scene.state().dead[2] == 1, "all its attempts", scene.describe, 5)
    worker.signal(15)
    assert worker.wait() == 0


def test_a_due_time_is_a_time_of_day(make_scene: MakeScene):
    scene = make_scene(before=CLOCK)
    scene.prepare([])
    scene.run("publisher", numbers=[0], delay_s=HOUR_S / 2)
    worker = scene.start(until="told")
    eventually(lambda: scene.noted("ready"), "the worker works", scene.describe)
    step(scene.folder / "clock", -HOUR_S)
    scene.run("publisher", numbers=[7])
    eventually(lambda: scene.noted("start")[7], "others are handled", scene.describe)
    assert not scene.noted("start")[0], "half an hour too early"
    step(scene.folder / "clock", HOUR_S)
    eventually(lambda: scene.noted("start")[0], "it is due", scene.describe, 10)
    worker.signal(15)
    assert worker.wait() == 0
    assert judge.exactly_once(scene, [0, 7], ()) == []

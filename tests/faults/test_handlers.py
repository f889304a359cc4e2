"""Handlers at their worst: the culprit alone pays, its batch mates take effect exactly once."""

from __future__ import annotations

from typing import Any

import pytest

from tests.faults import judge
from tests.faults.conftest import MakeScene
from tests.faults.misbehaviour import DEATHS, ENDINGS
from tests.faults.scene import Scene

NUMBERS = range(6)
CULPRIT = 3
ATTEMPTS = 2
FAULTY = {2, CULPRIT}  # number 2 always raises: they must not be mixed up

OPTIONS = {"batch": 10, "attempts": ATTEMPTS, "max_run_s": 0.5, "lease_s": 5.0}


def drain(scene: Scene, how: str, **orders: Any) -> int:
    """Start workers, one after another, until one has drained; returns how many died."""
    misbehaviour = {"n": CULPRIT, "how": how}
    for deaths in range(10):
        worker = scene.start(
            options=OPTIONS, misbehaviour=misbehaviour, supervised=True, leave=True, **orders
        )
        if worker.wait() == 0:
            return deaths
    raise AssertionError(f"still not drained after ten deaths\n{scene.describe()}")


def charged(scene: Scene) -> set[int]:
    """Whose attempts a worker's death was charged to."""
    with scene.reading() as connection:
        rows = connection.execute(
            "select cast(id as integer) from duly_incidents"
            " where kind = 'redelivery' and detail like '%, charged'"
        ).fetchall()
    return {n for (n,) in rows}


@pytest.mark.parametrize("store", ["duly.db", "effects.db"])
@pytest.mark.parametrize("how", DEATHS)
def test_exactly_once_a_handler_that_ends_its_process(make_scene: MakeScene, how: str, store: str):
    scene = make_scene(**({} if store == "duly.db" else {"store": store, "relay": False}))
    scene.prepare(NUMBERS)
    deaths = drain(scene, how)
    assert judge.exactly_once(scene, NUMBERS, FAULTY) == [], scene.describe()
    assert charged(scene) == {CULPRIT}
    # The first death, of a batch, charges nobody; then one an attempt.
    assert deaths == 1 + ATTEMPTS
    assert scene.noted("misbehaves")[CULPRIT] <= deaths


@pytest.mark.parametrize("how", DEATHS)
def test_at_least_once_a_handler_that_ends_its_process(make_scene: MakeScene, how: str):
    scene = make_scene(guarantee="at-least-once")
    scene.prepare(NUMBERS)
    deaths = drain(scene, how)
    assert judge.at_least_once(scene, NUMBERS, FAULTY) == [], scene.describe()
    assert charged(scene) == {CULPRIT}
    assert deaths == 1 + ATTEMPTS


@pytest.mark.parametrize("how", DEATHS)
def test_at_most_once_a_handler_that_ends_its_process(make_scene: MakeScene, how: str):
    scene = make_scene(guarantee="at-most-once")
    scene.prepare(NUMBERS)
    misbehaviour = {"n": CULPRIT, "how": how}
    worker = scene.start(
        options={**OPTIONS, "batch": 2}, misbehaviour=misbehaviour, supervised=True
    )
    assert worker.wait() != 0
    unsettled = scene.state().unsettled
    scene.run(options=OPTIONS)
    # What was settled together with the culprit and stood behind it may be lost, nothing else.
    assert judge.at_most_once(scene, NUMBERS, unsettled, lost=0) == [], scene.describe()
    assert scene.noted("start")[CULPRIT] == 1


@pytest.mark.parametrize("how", [*ENDINGS, "raise", "swallow a rollback"])
def test_a_handler_that_ends_its_transaction(make_scene: MakeScene, how: str):
    scene = make_scene()
    scene.prepare(NUMBERS)
    assert drain(scene, how) == 0
    assert judge.exactly_once(scene, NUMBERS, FAULTY) == [], scene.describe()
    # Uncharged, to find out whose fault it is: in its batch, and again with savepoints.
    assert scene.noted("misbehaves")[CULPRIT] <= 2 + ATTEMPTS


@pytest.mark.parametrize("store", ["duly.db", "effects.db"])
@pytest.mark.parametrize("how", ["swallow a constraint", "every ending, suppressed"])
def test_what_a_handler_swallows_costs_nothing(make_scene: MakeScene, how: str, store: str):
    """A statement that failed alone, a commit that was refused: the handler may go on."""
    scene = make_scene(**({} if store == "duly.db" else {"store": store, "relay": False}))
    scene.prepare(NUMBERS)
    assert drain(scene, how) == 0
    assert judge.exactly_once(scene, NUMBERS, {2}) == [], scene.describe()


def test_a_full_database_swallowed_leaves_no_half(make_scene: MakeScene):
    scene = make_scene()
    scene.prepare(NUMBERS)
    few_pages = {"what": "few pages", "with": {"spare": 200}}
    assert drain(scene, "swallow a full disk", before=few_pages) == 0
    state = scene.state()
    assert state.taken(CULPRIT) in {(1, 1, 1, 0), (0, 0, 0, 1)}, scene.describe()
    mates = [n for n in NUMBERS if n != CULPRIT]
    assert judge.exactly_once(scene, mates, {2}) == [], scene.describe()


@pytest.mark.parametrize("guarantee", ["at-least-once", "exactly-once"])
@pytest.mark.parametrize("how", ["hangs", "swallows its cancellation"])
def test_an_async_handler_that_hangs(make_scene: MakeScene, guarantee: str, how: str):
    scene = make_scene(guarantee=guarantee, **{"async": True})
    scene.prepare(NUMBERS)
    asked = {"n": CULPRIT, "how": how}
    worker = scene.start(options=OPTIONS, async_misbehaviour=asked, supervised=True, leave=True)
    assert worker.wait() == 0, scene.describe()
    judged = judge.exactly_once if guarantee == "exactly-once" else judge.at_least_once
    assert judged(scene, NUMBERS, FAULTY) == [], scene.describe()
    assert "max_run_s" in scene.state().why_dead[CULPRIT]


def test_cancelled_from_inside_is_a_failure(make_scene: MakeScene):
    """It comes again like any other that failed, and not when its lease has run out."""
    scene = make_scene(guarantee="at-least-once")
    scene.prepare(NUMBERS)
    scene.run(
        options={**OPTIONS, "lease_s": 0.3},
        misbehaviour={"n": CULPRIT, "how": "CancelledError", "once": True},
        leave=True,
    )
    assert judge.at_least_once(scene, NUMBERS, {2}) == [], scene.describe()

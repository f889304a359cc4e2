"""A worker stopped (SIGSTOP) past its lease, whose work another has done when it goes on."""

from __future__ import annotations

import signal
from collections import Counter
from typing import Any

import pytest

from tests.faults import judge
from tests.faults.conftest import MakeScene
from tests.faults.scene import Child, Scene
from tests.waiting import eventually

NUMBERS = range(4)
LEASE_S = 0.4
OPTIONS = {"batch": 3, "lease_s": LEASE_S}


def pause_and_succeed(scene: Scene, stop: str) -> Child:
    """One worker stops itself there; another drains after its lease; the first goes on."""
    scene.prepare(NUMBERS)
    trace = scene.folder / "zombie"
    zombie = scene.start(options=OPTIONS, stop=stop, trace=str(trace), until="told")
    eventually(zombie.is_stopped, f"the worker stops {stop}", scene.describe)
    # It leaves once all is settled, unless it runs its handlers only then.
    leave = scene.orders["guarantee"] != "at-most-once"
    successor = scene.run(options=OPTIONS, leave=leave)
    done = by(scene, successor)
    assert done, "the successor has started nothing"
    claims = trace.read_text().count("before subscription.claim")
    zombie.signal(signal.SIGCONT)
    eventually(
        lambda: trace.read_text().count("before subscription.claim") > claims,
        "the zombie has come to an end with what it had",
        scene.describe,
    )
    zombie.signal(signal.SIGTERM)
    assert zombie.wait() == 0, scene.describe()
    return zombie


def by(scene: Scene, child: Child, what: str = "start") -> Counter[int]:
    """What this process noted so."""
    return Counter(
        int(words[1])
        for words in scene.journal()
        if words[0] == what and int(words[-1]) == child.pid
    )


def refused(scene: Scene) -> int:
    """How many settlements the database has refused."""
    with scene.reading() as connection:
        (count,) = connection.execute(
            "select coalesce(sum(count), 0) from duly_incidents where kind = 'stale-settle'"
        ).fetchone()
    return int(count)


@pytest.mark.parametrize("stop", ["after subscription.claim 1", "before store.begin 1"])
@pytest.mark.parametrize("store", ["duly.db", "effects.db"])
def test_exactly_once_a_zombie_cannot_commit(make_scene: MakeScene, stop: str, store: str):
    # Without its relay: stopped inside it, it would hold the other file's lock.
    scene = make_scene(**({} if store == "duly.db" else {"store": store, "relay": False}))
    zombie = pause_and_succeed(scene, stop)
    assert judge.exactly_once(scene, NUMBERS, {2}) == []
    if store == "duly.db":
        assert not by(scene, zombie), "superseded, and it ran handlers"


def test_exactly_once_by_inbox_a_zombie_that_has_committed_is_not_run_again(make_scene: MakeScene):
    scene = make_scene(store="effects.db", relay=False)
    pause_and_succeed(scene, "after session.commit 1")
    assert judge.exactly_once(scene, NUMBERS, {2}) == []
    assert refused(scene)


@pytest.mark.parametrize("stop", ["handler: started 1", "before subscription.settle 1"])
def test_at_least_once_a_zombies_settlement_is_refused(make_scene: MakeScene, stop: str):
    scene = make_scene(guarantee="at-least-once")
    zombie = pause_and_succeed(scene, stop)
    assert judge.at_least_once(scene, NUMBERS, {2}) == []
    assert refused(scene)
    assert by(scene, zombie, "end"), "the zombie went on, and its settlement was refused"
    (died,) = scene.state().dead.values()
    assert died == 1


@pytest.mark.parametrize("stop", ["after subscription.claim 1", "before subscription.settle 1"])
@pytest.mark.parametrize("kind", [{}, {"async": True}])
def test_at_most_once_a_zombie_starts_nothing(
    make_scene: MakeScene, stop: str, kind: dict[str, Any]
):
    scene = make_scene(guarantee="at-most-once", **kind)
    zombie = pause_and_succeed(scene, stop)
    assert judge.at_most_once(scene, NUMBERS, NUMBERS, 0) == []
    assert not by(scene, zombie)


@pytest.mark.parametrize("end", ["killed", "goes on"])
def test_stopped_inside_its_transaction_nobody_else_runs(make_scene: MakeScene, end: str):
    """SQLite's lock makes a zombie impossible here; publishers are told who holds it."""
    scene = make_scene()
    scene.prepare(NUMBERS)
    impatient = {"what": "impatient", "with": {"busy_s": 4 * LEASE_S}}
    publisher = scene.start("publisher", numbers=[9], before=impatient, gates={"9": "go"})
    eventually(lambda: scene.noted("opened"), "the publisher has the file open", scene.describe)
    holder = scene.start(options=OPTIONS, stop="handler: one table written 1")
    eventually(holder.is_stopped, "the worker stops inside its transaction", scene.describe)
    successor = scene.start(options=OPTIONS)
    (scene.folder / "go").touch()
    assert publisher.wait() == 0, scene.describe()
    # It waited for longer than the lease; the successor would have had the time.
    assert scene.noted("acked") == {}
    assert not by(scene, successor)
    said = publisher.said()
    assert f"process {holder.pid}" in said
    assert "end it" in said
    if end == "killed":
        holder.kill()
    else:
        holder.signal(signal.SIGCONT)
        assert holder.wait() == 0, scene.describe()
    assert successor.wait() == 0, scene.describe()
    assert judge.exactly_once(scene, NUMBERS, {2}) == []
    assert 9 not in scene.state().published, "refused, and stored"


def test_a_missing_fence_is_caught(make_scene: MakeScene):
    scene = make_scene(bug="no fence")
    pause_and_succeed(scene, "before store.begin 1")
    assert judge.exactly_once(scene, NUMBERS, {2})

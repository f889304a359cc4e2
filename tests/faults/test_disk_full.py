"""A disk without a byte left: what is refused is certainly not stored, and work goes on later."""

from __future__ import annotations

import os
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from duly import App, RetryPolicy, Topic, Transaction
from duly.testing.chaos.surroundings import fill
from duly.worker import Worker
from tests.faults import judge
from tests.faults.conftest import MakeScene
from tests.faults.scene import Scene, reading
from tests.waiting import eventually

NUMBERS = range(6)


class Disk:
    """A disk that a test fills and empties."""

    def __init__(self, folder: Path) -> None:
        self.database = folder / "duly.db"
        self.filler = folder / "filler"

    def fill(self) -> None:
        fill(self.filler)

    def make_room(self) -> None:
        self.filler.unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A disk of eight megabytes, where one may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(["mount", *options], capture_output=True, check=False)
        why_not = mounted.stderr.decode().strip() if mounted.returncode else ""
    except FileNotFoundError:
        why_not = "there is no mount here"
    if why_not:
        assert os.environ.get("CI") != "true", why_not
        pytest.skip(f"no disk to fill here: {why_not}")
    yield Disk(folder)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def stored(scene: Scene, how: str) -> set[int]:
    published = set(scene.state().published)
    return {n // 10 for n in published} if how == "publish_many" else published


REFUSALS = (
    *("PublishFailed", "PublishIncomplete", "BrokerUnavailable"),
    *("TransactionFailed", "TransactionInterrupted"),
)


def refused(scene: Scene) -> set[int]:
    return {n for refusal in REFUSALS for n in scene.noted(refusal)}


@pytest.mark.parametrize("how", ["publish", "publish_many", "transaction"])
def test_what_a_full_disk_refuses_is_not_stored(make_scene: MakeScene, disk: Disk, how: str):
    scene = make_scene(how=how, database=str(disk.database))
    scene.prepare([])
    gates = {"3": "full", "6": "room"}
    publisher = scene.start("publisher", numbers=[*range(9)], gates=gates)
    eventually(lambda: len(scene.noted("acked")) == 3, "three are published", scene.describe)
    disk.fill()
    (scene.folder / "full").touch()
    eventually(
        lambda: len(scene.noted("acked")) + len(refused(scene)) == 6, "six ended", scene.describe
    )
    disk.make_room()
    (scene.folder / "room").touch()
    assert publisher.wait() == 0, scene.describe()
    assert refused(scene), "the disk was not full"
    assert stored(scene, how) == set(scene.noted("acked")), scene.describe()
    assert set(scene.noted("acked")) == {*range(9)} - refused(scene)
    assert {6, 7, 8} <= stored(scene, how)
    assert "make room" in publisher.said()


def test_a_file_that_may_not_grow_refuses_as_a_full_disk_does(make_scene: MakeScene):
    """The same where nobody may mount a disk: a limit on the size of files."""
    scene = make_scene()
    scene.prepare([])
    small = {"what": "small files", "with": {"max_bytes": 200_000}}
    publisher = scene.run("publisher", numbers=[*range(400)], before=small)
    acked = set(scene.noted("acked"))
    failed = set(scene.noted("PublishFailed"))
    assert len(failed) > 10, publisher.said()
    assert acked | failed == {*range(400)}
    assert set(scene.state().published) == acked
    scene.run("publisher", numbers=sorted(failed))
    assert set(scene.state().published) == {*range(400)}


@pytest.mark.parametrize("guarantee", ["exactly-once", "at-least-once"])
def test_a_worker_pauses_and_goes_on(make_scene: MakeScene, disk: Disk, guarantee: str):
    scene = make_scene(guarantee=guarantee, database=str(disk.database))
    scene.prepare(NUMBERS)
    worker = scene.start(misbehaviour={"n": 1, "how": "fill the disk"}, options={"batch": 2})
    eventually(lambda: "pauses" in worker.said(), "the worker pauses", scene.describe)
    assert "make room" in worker.said()
    disk.make_room()
    eventually(lambda: worker.ended.is_set() or disk.filler.exists(), "on it goes", scene.describe)
    if disk.filler.exists():
        disk.make_room()
        disk.filler.touch()  # once more would be once too often
    assert worker.wait() == 0, scene.describe()
    judged = judge.exactly_once if guarantee == "exactly-once" else judge.at_least_once
    assert judged(scene, NUMBERS, {2}) == [], scene.describe()


@pytest.mark.parametrize("size", [10, 2_500_000])
def test_the_full_disk_of_a_store_is_charged_to_no_message(
    tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture, size: int
):
    """Where the broker is elsewhere and could note it: at the commit, or, with more than SQLite
    keeps in memory until then, in the middle of the handler.
    """
    app = App("shop", f"sqlite:///{tmp_path / 'duly.db'}", store=f"sqlite:///{disk.database}")
    numbers = Topic("numbers", int, guarantee="exactly-once")

    @app.consumer(numbers, name="once", guarantee="exactly-once", retry=RetryPolicy(attempts=1))
    def store(number: int, tx: Transaction[sqlite3.Connection]) -> None:
        effect = (number, size if number == 1 else 10)
        tx.connection.execute("insert into effects values (?, zeroblob(?))", effect)

    with sqlite3.connect(disk.database) as connection:
        connection.execute("create table effects (number integer not null, body blob)")
    connection.close()
    with app, Worker(app):
        app.publish(numbers, 0)
        eventually(lambda: effects_in(disk.database) == [0], "the first is stored")
        disk.fill()
        app.publish(numbers, 1)
        eventually(
            lambda: caplog.text.count("pauses") > 3, "the worker pauses", lambda: caplog.text
        )
        assert "Make room" in caplog.text or "make room" in caplog.text
        disk.make_room()
        app.publish(numbers, 2)
        eventually(
            lambda: effects_in(disk.database) == [0, 1, 2], "on it goes", lambda: caplog.text
        )
        assert app.dead_letters() == []


def effects_in(path: Path) -> list[int]:
    with reading(path) as connection:
        rows = connection.execute("select number from effects order by number").fetchall()
    return [number for (number,) in rows]


def test_an_at_most_once_publisher_counts_what_it_drops(make_scene: MakeScene, disk: Disk):
    scene = make_scene(guarantee="at-most-once", database=str(disk.database))
    scene.prepare([])
    gates = {"3": "full", "6": "room"}
    publisher = scene.start("publisher", numbers=[*range(9)], gates=gates, drops={"6": 3})
    eventually(lambda: len(scene.state().published) == 3, "three are stored", scene.describe)
    disk.fill()
    (scene.folder / "full").touch()
    eventually(lambda: scene.noted("dropped"), "three are dropped", scene.describe)
    disk.make_room()
    (scene.folder / "room").touch()
    assert publisher.wait() == 0, scene.describe()
    [words] = [words for words in scene.journal() if words[0] == "drops"]
    state = scene.state()
    assert max(state.published.values()) == 1
    assert int(words[1]) + len(state.published) == 9, scene.describe()
    with scene.reading() as connection:
        recorded = connection.execute(
            "select sum(count) from duly_incidents where kind = 'dropped'"
        ).fetchone()
    assert recorded == (int(words[1]),), "counted where others can see it"

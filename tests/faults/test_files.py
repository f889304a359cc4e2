"""Files that are locked, damaged, gone or not what they seem; messages that are too large."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import duly
from tests.faults import judge
from tests.faults.conftest import MakeScene
from tests.faults.program import inputs
from tests.faults.scene import Scene
from tests.waiting import eventually

NUMBERS = range(6)
IMPATIENT = {"what": "impatient", "with": {"busy_s": 0.3}}

APP = """
import duly
numbers = duly.Topic("numbers", int, guarantee="exactly-once")
app = duly.App("shop", {url!r})

@app.consumer(numbers, name="consumer", guarantee="exactly-once")
def handle(number: int, tx: duly.Transaction) -> None:
    pass
"""


def run_duly(folder: Path, url: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """``duly run`` on an application with this broker, until it ends by itself."""
    (folder / "shop.py").write_text(APP.format(url=url))
    return subprocess.run(
        [sys.executable, "-m", "duly", "run", "shop:app"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )


def plain_text(path: Path) -> None:
    path.write_text("this is a letter, and no database\n" * 1000)


def truncated(path: Path) -> None:
    with duly.App("shop", f"sqlite:///{path}") as app:
        app.publish_many(inputs("exactly-once"), list(range(500)))
    os.truncate(path, path.stat().st_size // 3)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no database": (plain_text, "no SQLite database"),
    "truncated": (truncated, "damaged"),
    "a directory": (Path.mkdir, "is a directory"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_no_database_is_said_once(tmp_path: Path, damage: str):
    path = tmp_path / "shop.db"
    make, words = DAMAGES[damage]
    make(path)
    before = path.read_bytes() if path.is_file() else b""
    ended = run_duly(tmp_path, f"sqlite:///{path}")
    said = ended.stdout + ended.stderr
    assert ended.returncode == 2, said
    assert words in said
    assert "Traceback" not in said
    assert (path.read_bytes() if path.is_file() else b"") == before, "nothing is changed"


def test_a_missing_directory_is_said_once(tmp_path: Path):
    ended = run_duly(tmp_path, f"sqlite:///{tmp_path}/nowhere/shop.db")
    assert ended.returncode == 2
    assert "does not exist" in ended.stdout + ended.stderr


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everything")
def test_a_file_of_somebody_else_is_said_once(tmp_path: Path):
    path = tmp_path / "shop.db"
    path.touch()
    path.chmod(0o444)
    ended = run_duly(tmp_path, f"sqlite:///{path}")
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert "needs to read and write" in ended.stdout + ended.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("mode", [0o444, 0o000])
def test_what_nobody_may_write_is_refused_to_nobody(make_scene: MakeScene, mode: int):
    scene = make_scene()
    for folder in (scene.folder, *scene.folder.parents):
        if folder.stat().st_uid == 0 and not folder.stat().st_mode & 0o001:
            folder.chmod(0o755)
    scene.prepare([])
    scene.path.chmod(mode)
    child = scene.start("publisher", numbers=[1], before={"what": "nobody"})
    assert child.wait() == 1
    assert "BrokerUnusable" in child.said()
    assert "needs to read and write" in child.said()


# --- locked by somebody else


@pytest.mark.parametrize("lock", ["immediate", "exclusive"])
def test_a_foreign_lock_refuses_publishes_by_their_deadline(make_scene: MakeScene, lock: str):
    scene = make_scene()
    scene.prepare([])
    gates = {"1": "locked", "2": "free"}
    publisher = scene.start("publisher", numbers=[0, 1, 2], gates=gates, before=IMPATIENT)
    eventually(lambda: scene.noted("acked"), "the first is published", scene.describe)
    foreign = sqlite3.connect(scene.path, isolation_level=None)
    foreign.execute(f"begin {lock}")
    (scene.folder / "locked").touch()
    eventually(lambda: scene.noted("PublishFailed"), "the second is refused", scene.describe)
    foreign.execute("rollback")
    foreign.close()
    (scene.folder / "free").touch()
    assert publisher.wait() == 0
    assert set(scene.state().published) == {0, 2}
    assert "Another program" in publisher.said()


@pytest.mark.parametrize("guarantee", ["exactly-once", "at-least-once"])
def test_a_worker_waits_out_a_foreign_lock(make_scene: MakeScene, guarantee: str):
    scene = make_scene(guarantee=guarantee)
    scene.prepare(NUMBERS)
    options = {"batch": 2}
    worker = scene.start(
        options=options, before=IMPATIENT, misbehaviour={"n": 3, "how": "wait at the gate"}
    )
    if guarantee == "at-least-once":
        eventually(lambda: scene.noted("misbehaves"), "a handler waits", scene.describe)
        foreign = sqlite3.connect(scene.path, isolation_level=None)
        foreign.execute("begin immediate")
        (scene.folder / "go").touch()
        eventually(lambda: "pauses" in worker.said(), "the worker pauses", scene.describe)
        foreign.execute("rollback")
        foreign.close()
    else:
        (scene.folder / "go").touch()
    assert worker.wait() == 0, scene.describe()
    judged = judge.exactly_once if guarantee == "exactly-once" else judge.at_least_once
    assert judged(scene, NUMBERS, {2}) == [], scene.describe()


# --- damaged rows

DEAD = {
    "headers that are no JSON": "headers = 'not json'",
    "headers that are a list": "headers = '[1, 2]'",
    "headers of bytes": "headers = x'ff00fe'",
    "a body that is a number": "body = 3",
    "a body of other text": "body = 'three'",
    "a source of bytes": "source = x'fffe'",
}
# What nobody has to read for the handler is in nobody's way.
EITHER = {
    "a body of text": "body = '3'",
    "an id of bytes": "id = x'ff00fe'",
    "a key of bytes": "key = x'ff'",
    "a time of text": "time_ms = 'yesterday'",
}


@pytest.mark.parametrize("row", [*DEAD, *EITHER])
@pytest.mark.parametrize("guarantee", ["exactly-once", "at-most-once"])
def test_a_damaged_row_is_dead_and_the_others_are_handled(
    make_scene: MakeScene, row: str, guarantee: str
):
    scene = make_scene(guarantee=guarantee)
    scene.prepare(NUMBERS)
    damage(scene, {**DEAD, **EITHER}[row])
    scene.run()
    with scene.reading() as connection:
        why = [
            error
            for (error,) in connection.execute("select error from duly_dead")
            if "damaged" in error or "decoded" in error
        ]
    handled = set(scene.noted("start"))
    assert handled - {3} == set(NUMBERS) - {3}, scene.describe()
    assert len(why) + (3 in handled) == 1, "handled or dead, with the reason"
    assert why or row in EITHER


def damage(scene: Scene, change: str) -> None:
    connection = sqlite3.connect(scene.path, isolation_level=None)
    changed = connection.execute(f"update duly_messages set {change} where id = '3'")
    assert changed.rowcount == 1
    connection.close()


# --- too large


def test_a_hundred_megabytes_are_refused_before_they_are_written(tmp_path: Path):
    blobs = duly.Topic("blobs", bytes, guarantee="at-least-once")
    path = tmp_path / "shop.db"
    with duly.App("shop", f"sqlite:///{path}") as app:
        app.publish(blobs, b"small")
        before = sizes(tmp_path)
        with pytest.raises(duly.MessageTooLarge, match="the limit is 1,048,576"):
            app.publish(blobs, b"x" * 100_000_000)
        assert sizes(tmp_path) == before
        app.publish(blobs, b"small again")
        assert sizes(tmp_path) != before


def sizes(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        path.name: (path.stat().st_size, path.read_bytes())
        for path in folder.glob("*.db*")
        if path.is_file()
    }


# --- gone while it is used


def deleted(scene: Scene) -> None:
    for path in scene.folder.glob("duly.db*"):
        if path.is_file():
            path.unlink()


def moved(scene: Scene) -> None:
    scene.path.rename(scene.path.with_suffix(".moved"))


def replaced(scene: Scene) -> None:
    deleted(scene)
    sqlite3.connect(scene.path).close()
    scene.path.touch()


@pytest.mark.parametrize("go", [deleted, moved, replaced])
@pytest.mark.parametrize("how", ["publish", "transaction"])
def test_nothing_is_acknowledged_into_a_file_that_is_gone(
    make_scene: MakeScene, go: Callable[[Scene], None], how: str
):
    scene = make_scene(how=how)
    scene.prepare([])
    publisher = scene.start("publisher", numbers=[0, 1], gates={"1": "gone"})
    eventually(lambda: scene.noted("acked"), "the first is published", scene.describe)
    go(scene)
    (scene.folder / "gone").touch()
    publisher.wait()
    assert set(scene.noted("acked")) == {0}, "acknowledged into a file that nobody can open"
    assert "was deleted, moved or replaced" in publisher.said()


@pytest.mark.parametrize("guarantee", ["exactly-once", "at-least-once"])
def test_a_worker_says_that_its_file_is_gone(make_scene: MakeScene, guarantee: str):
    scene = make_scene(guarantee=guarantee)
    scene.prepare(NUMBERS)
    worker = scene.start(
        until="told", options={"batch": 2}, misbehaviour={"n": 1, "how": "wait at the gate"}
    )
    eventually(lambda: scene.noted("misbehaves"), "a handler waits", scene.describe)
    deleted(scene)
    (scene.folder / "go").touch()
    eventually(lambda: "was deleted" in worker.said(), "the worker says so", scene.describe)
    assert not {3, 4, 5} & set(scene.noted("start")), "it works on in a file that is gone"


def test_a_file_put_back_is_worked_on(make_scene: MakeScene):
    scene = make_scene(guarantee="at-least-once")
    scene.prepare(NUMBERS)
    worker = scene.start(options={"batch": 2}, misbehaviour={"n": 1, "how": "wait at the gate"})
    eventually(lambda: scene.noted("misbehaves"), "a handler waits", scene.describe)
    moved(scene)
    (scene.folder / "go").touch()
    eventually(lambda: "pauses" in worker.said(), "the worker pauses", scene.describe)
    scene.path.with_suffix(".moved").rename(scene.path)
    assert worker.wait() == 0, scene.describe()
    assert judge.at_least_once(scene, NUMBERS, {2}) == []

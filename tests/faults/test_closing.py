"""What is left of a database file when nobody uses it any more."""

from __future__ import annotations

import os
from pathlib import Path

from duly import App, Topic
from duly.worker import Worker

numbers: Topic[int] = Topic("numbers", int, guarantee="at-least-once")


def test_a_closed_app_has_nothing_open_and_leaves_one_file(db_path: Path, db_url: str):
    with App("closing", db_url) as app:
        app.consumer(numbers, name="c", guarantee="at-least-once")(lambda number: None)
        app.publish(numbers, 1)
        with Worker(app):
            pass
    assert [name for name in open_files() if name.startswith(str(db_path))] == []
    left = {path.name for path in db_path.parent.iterdir()}
    assert left == {"duly.db", "duly.db-duly"}, "the log must be moved into the database"


def open_files() -> list[str]:
    folder = f"/proc/{os.getpid()}/fd"
    found = []
    for fd in os.listdir(folder):  # noqa: PTH208 - numbers, of which one is gone at once
        try:
            found.append(os.readlink(f"{folder}/{fd}"))  # noqa: PTH115
        except FileNotFoundError:
            continue
    return found

"""fork() with an open app: the child is told, the parent notices nothing."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from tests.sqlite.programs import run, running

DECLARE = """
    import os, sys, multiprocessing, signal, threading
    import duly
    from duly.worker import Worker

    url = f"sqlite:///{sys.argv[1]}"
    numbers = duly.Topic("numbers", int, guarantee="exactly-once", retention_s=1000.0)
    app = duly.App("forks", url)

    def child_of(work):
        pid = os.fork()
        if pid == 0:
            try:
                work()
            except duly.ConfigurationError as error:
                os.write(1, f"refused: {error}\\n".encode())
            except BaseException as error:
                os.write(1, f"wrong: {error!r}\\n".encode())
            else:
                os.write(1, b"done\\n")
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
"""


def published(path: Path) -> list[str]:
    connection = sqlite3.connect(path)
    assert connection.execute("pragma integrity_check").fetchone() == ("ok",)
    rows = connection.execute("select id from duly_messages order by position").fetchall()
    connection.close()
    return [id for (id,) in rows]


@pytest.mark.parametrize(
    "use",
    [
        "app.publish(numbers, 2, id='child')",
        "app.publish_many(numbers, [2], ids=['child'])",
        "app.transaction().__enter__()",
        "Worker(app).start()",
        "duly.App('another', url).publish(numbers, 2, id='child')",
    ],
)
def test_a_forked_child_is_told_and_its_parent_unharmed(db_path: Path, use: str):
    lines = run(
        DECLARE
        + f"""
    @app.consumer(numbers, name="c", guarantee="at-least-once")
    def handle(number: int) -> None:
        pass

    app.publish(numbers, 1, id="before")
    child_of(lambda: {use})
    app.publish(numbers, 3, id="after")
    child_of(lambda: None)
    app.publish(numbers, 4, id="at last")
    app.close()
    print("closed")
    """,
        db_path,
    )
    assert lines[0].startswith("refused: "), lines
    assert "forked" in lines[0]
    assert lines[1:] == ["done", "closed"]
    assert published(db_path) == ["before", "after", "at last"]


def test_a_child_forked_before_anything_is_open_works(db_path: Path):
    lines = run(
        DECLARE
        + """
    child_of(lambda: (app.publish(numbers, 1, id="child"), app.close()))
    app.publish(numbers, 2, id="parent")
    app.close()
    """,
        db_path,
    )
    assert lines == ["done"]
    assert published(db_path) == ["child", "parent"]


def test_a_child_that_ends_takes_nothing_with_it(db_path: Path):
    """A child that exits as Python does, running its exit handlers, beside a parent at work."""
    lines = run(
        DECLARE
        + """
    handled = []

    @app.consumer(numbers, name="c", guarantee="exactly-once", batch=5)
    def handle(number: int, tx: duly.Transaction) -> None:
        handled.append(number)

    with Worker(app) as worker:
        for n in range(100):
            app.publish(numbers, n, id=str(n))
            if n % 20 == 10:
                pid = os.fork()
                if pid == 0:
                    sys.exit(0)
                assert os.waitpid(pid, 0)[1] == 0
        while len(handled) < 100:
            threading.Event().wait(0.01)
    app.close()
    print(sorted(handled) == list(range(100)))
    """,
        db_path,
    )
    assert lines[-1] == "True", lines
    assert published(db_path) == [str(n) for n in range(100)]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_multiprocessing(tmp_path: Path, method: str):
    """By fork with an open app they are told; by spawn, and by fork before opening, they work."""
    program = tmp_path / "program.py"
    program.write_text(
        f"""
import multiprocessing, sys
import duly

numbers = duly.Topic("numbers", int, guarantee="exactly-once", retention_s=1000.0)
app = duly.App("forks", "sqlite:///{tmp_path}/duly.db")


def publish(n):
    try:
        app.publish(numbers, n, id=str(n))
    except duly.ConfigurationError:
        return "told"
    return "published"


if __name__ == "__main__":
    context = multiprocessing.get_context("{method}")
    with context.Pool(2) as pool:
        before = pool.map(publish, range(10))
    app.publish(numbers, 100, id="100")
    with context.Pool(2) as pool:
        after = pool.map(publish, range(10, 20))
    app.publish(numbers, 101, id="101")
    app.close()
    print(set(before), set(after))
"""
    )
    lines = run(f"import runpy; runpy.run_path({str(program)!r}, run_name='__main__')")
    after = "told" if method == "fork" else "published"
    assert lines[-1] == f"{{'published'}} {{'{after}'}}", lines
    ids = set(published(tmp_path / "duly.db"))
    wanted = {*range(10), 100, 101} | (set(range(10, 20)) if method == "spawn" else set())
    assert ids == {str(n) for n in wanted}


def test_a_parent_killed_leaves_no_lock_to_its_child(db_path: Path):
    """The child has inherited its open files; the next process must not wait for it."""
    with running(
        DECLARE
        + """
    app.publish(numbers, 1, id="parent")
    if os.fork() == 0:
        print("child", flush=True)
        sys.stdin.readline()
        os._exit(0)
    print("parent", flush=True)
    sys.stdin.readline()
    """,
        db_path,
    ) as parent:
        assert {parent.line(), parent.line()} == {"parent", "child"}
        parent.kill()
        run(DECLARE + "\n    app.publish(numbers, 2, id='next')\n    app.close()", db_path)
    assert published(db_path) == ["parent", "next"]

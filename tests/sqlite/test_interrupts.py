"""Whoever is interrupted, by Ctrl-C mostly, leaves nothing behind that others wait for.

A signal's handler runs between two calls of the main thread, and may raise there. So here every
call is interrupted once, at each place where Python looks for signals: as a function begins, and
as one of C's has ended.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import duly
from duly.sql.sqlite.place import lock_folder
from duly.sql.sqlite.turn import Turn

news: duly.Topic[int] = duly.Topic("news", int, guarantee="at-least-once")
views: duly.Topic[int] = duly.Topic("views", int, guarantee="at-most-once")
ONE_BY_ONE = ("duly", "threading.py", "contextlib.py")


class Interrupted(BaseException):
    """As KeyboardInterrupt, which pytest would take for its own."""


class Interrupting:
    """Interrupts its thread as Python looks for signals for the nth time within duly."""

    def __init__(self, nth: int) -> None:
        self._left = nth
        self.at = ""

    def __call__(self, frame: FrameType, event: str, _arg: Any) -> None:
        within = any(part in frame.f_code.co_filename for part in ONE_BY_ONE)
        if within and event in ("call", "c_return"):
            self._left -= 1
            if self._left == 0:
                sys.setprofile(None)
                self.at = f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}"
                raise Interrupted

    @property
    def came(self) -> bool:
        return self._left <= 0


def run(call: Callable[[], Any], what: str) -> BaseException | None:
    """Run it on a thread of its own; what it raised."""
    raised: list[BaseException] = []

    def on_thread() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error.with_traceback(None))  # with which it holds what it left open

    thread = threading.Thread(target=on_thread, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive(), f"{what} hangs"
    return raised[0] if raised else None


def publish(app: duly.App) -> None:
    app.publish(news, 1)


def publish_many(app: duly.App) -> None:
    app.publish_many(news, [1, 2])


def publish_loosely(app: duly.App) -> None:
    app.publish(views, 1)


def transact(app: duly.App) -> None:
    with app.transaction() as tx:
        tx.connection.execute("insert into effects values (1)")
        tx.publish(news, 1)


# Where an object is let go, or SQLite calls back, nobody can be told of what is raised.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("call", [publish, publish_many, publish_loosely, transact])
def test_wherever_it_is_interrupted_others_go_on(
    db_url: str, db_path: Path, call: Callable[[duly.App], None]
) -> None:
    with duly.App("shop", broker=db_url) as app:
        with app.transaction() as tx:
            tx.connection.execute("create table effects (value int)")
        call(app)
        other = Turn(lock_folder(db_path))
        nth = 0
        while True:
            nth += 1
            interrupting = Interrupting(nth)

            def interrupted(interrupting: Interrupting = interrupting) -> None:
                sys.setprofile(interrupting)
                try:
                    call(app)
                finally:
                    sys.setprofile(None)

            run(interrupted, f"interrupted for the {nth}th time, it")
            taken = run(lambda: other.acquire(5), f"another, interrupted at {interrupting.at},")
            assert taken is None, interrupting.at
            other.release()
            raised = run(lambda: call(app), f"the next one, interrupted at {interrupting.at},")
            assert raised is None, interrupting.at
            if not interrupting.came:
                break
        other.close()
        assert nth > 20


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("call", [publish, transact])
def test_wherever_its_waiting_is_interrupted_others_go_on(
    db_url: str, db_path: Path, call: Callable[[duly.App], None]
) -> None:
    """Another has the turn for a moment: a thread waits for it, and goes on waiting."""
    other = Turn(lock_folder(db_path))
    for nth in range(1, 120):
        with duly.App("shop", broker=db_url) as app:  # which has no such thread yet
            with app.transaction() as tx:
                tx.connection.execute("create table if not exists effects (value int)")
            interrupting = Interrupting(nth)
            other.acquire(5)
            letting_go = threading.Timer(0.02, other.release)
            letting_go.start()

            def interrupted(app: duly.App = app, by: Interrupting = interrupting) -> None:
                sys.setprofile(by)
                try:
                    call(app)
                finally:
                    sys.setprofile(None)

            run(interrupted, f"interrupted for the {nth}th time, it")
            letting_go.join()
            again = run(partial(call, app), f"the next one, interrupted at {interrupting.at},")
            assert again is None, interrupting.at
            taken = run(lambda: other.acquire(5), f"another, interrupted at {interrupting.at},")
            assert taken is None, interrupting.at
            other.release()
    other.close()

"""`FileGround`: a SQLite file as operations use it. Its turn is the only one there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from duly.brokers.sqlite.clock import Clock
from duly.sql.sqlite import DatabaseFile
from duly.sql.steps import Steps

R = TypeVar("R")


class FileGround:
    """See `duly.sql.operated.Ground`: who writes has the file, and wakes who waits."""

    def __init__(self, file: DatabaseFile, clock: Clock) -> None:
        self._file = file
        self.now_ms = clock.wall_ms

    def read(self, make_steps: Callable[[], Steps[R]]) -> R:
        """Run steps that only look."""
        return self._file.read(make_steps)

    def write(self, make_steps: Callable[[], Steps[R]]) -> R:
        """Run steps in a transaction."""
        return self._file.write(make_steps)

    def settle_positions(self) -> None:
        """They are given when a message is stored."""

    def stir(self) -> None:
        """Every write does."""

    def mend(self, numbers: Sequence[int], steps: Steps[R]) -> Steps[R]:  # noqa: ARG002
        """In the file's turn."""
        return steps

    def steer(self, name: str, steps: Steps[R]) -> Steps[R]:  # noqa: ARG002
        """In the file's turn."""
        return steps

    def take_back(self, name: str, steps: Steps[R]) -> Steps[R]:  # noqa: ARG002
        """In the file's turn."""
        return steps

    def tidy(self, name: str, steps: Steps[R]) -> Steps[R]:  # noqa: ARG002
        """In the file's turn."""
        return steps

    def erase(self, steps: Steps[R]) -> Steps[R]:
        """In the file's turn."""
        return steps

    def await_holders(self, positions: Sequence[int]) -> None:
        """Nobody is in the middle of anything."""

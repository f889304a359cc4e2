"""`SchemaGround`: a PostgreSQL database as operations use it, beside workers of many hosts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from duly.sql import locks
from duly.sql.postgres import Database
from duly.sql.steps import Steps

R = TypeVar("R")


class SchemaGround:
    """See `duly.sql.operated.Ground`.

    ``settle`` gives positions to what is committed, and ``told`` wakes whoever waits.
    """

    def __init__(
        self,
        database: Database,
        now_ms: Callable[[], int],
        settle: Callable[[], object],
        told: Callable[[], None],
    ) -> None:
        self._database = database
        self._settle = settle
        self.now_ms = now_ms
        self.stir = told
        self.mend = locks.mending
        self.steer = locks.steering
        self.take_back = locks.taking_back
        self.tidy = locks.tidying
        self.erase = locks.erasing

    def read(self, make_steps: Callable[[], Steps[R]]) -> R:
        """Run steps that only look."""
        return self._database.read(make_steps)

    def write(self, make_steps: Callable[[], Steps[R]]) -> R:
        """Run steps in a transaction, and again where another stood in its way."""
        return self._database.write(make_steps)

    def settle_positions(self) -> None:
        """A tick."""
        self._settle()

    def await_holders(self, positions: Sequence[int]) -> None:
        """In a transaction of its own, which holds nothing that they might wait for."""
        self._database.write(lambda: locks.await_holders(positions), durable=False)

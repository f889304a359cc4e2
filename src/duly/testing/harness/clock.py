"""The time of a test: it stands still until it is moved, or is the machine's."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from types import ModuleType

from duly import message


class Clock:
    """Time that passes only when it is moved, in seconds since 1970 UTC.

    A handler that takes long loses no lease by it, and a retry that waits an hour costs a test
    nothing.
    """

    stands_still = True

    def __init__(self, begin_s: float | None = None) -> None:
        self._now_s = time.time() if begin_s is None else begin_s

    def __call__(self) -> float:
        return self._now_s

    def wall_ms(self) -> int:
        """The same in milliseconds."""
        return int(self() * 1000)

    @property
    def now(self) -> datetime:
        """The same as a moment, in UTC."""
        return datetime.fromtimestamp(self(), UTC)

    def advance(self, seconds: float) -> None:
        """Let so many seconds pass at once."""
        if seconds < 0:
            raise ValueError(f"advance({seconds}): time does not run backwards")
        self._now_s += seconds


class MachineClock(Clock):
    """The machine's own time, for brokers that came open and go by it: passing time is waited."""

    stands_still = False

    def __call__(self) -> float:
        return time.time()

    def advance(self, seconds: float) -> None:
        """Wait for so many seconds."""
        time.sleep(seconds)


@contextmanager
def told_by(clock: Clock) -> Iterator[None]:
    """Whoever of duly asks for the time of day in this process is told the clock's."""
    before, ours = message.now_ms, clock.wall_ms
    if not clock.stands_still:
        yield
        return
    try:
        _replace(before, ours)
        yield
    finally:
        # Also in modules that were imported meanwhile.
        _replace(ours, before)


def _replace(old: object, new: object) -> None:
    for module in _duly():
        if vars(module).get("now_ms") == old:
            module.now_ms = new  # type: ignore[attr-defined]


def _duly() -> Iterator[ModuleType]:
    for name, module in list(sys.modules.items()):
        if name.startswith("duly.") and isinstance(module, ModuleType):
            yield module

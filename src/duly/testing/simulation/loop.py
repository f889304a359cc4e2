"""The event loop of one simulated process: no thread, no sockets, and time as it is told."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

# Seconds since 1970 are no finer than this: a timer closer than that is due.
RESOLUTION_S = 1e-6


class Time(Protocol):
    """Where a loop gets its time from, and how it waits when nothing else can happen in it."""

    def now(self) -> float:
        """Seconds."""
        ...

    def sleep(self, seconds: float) -> None:
        """Let so many pass."""
        ...


class SimulatedLoop(asyncio.BaseEventLoop):
    """Callbacks in the order in which they became ready.

    `turn` lets those run that are ready now, as a loop's thread would between two steps of the
    lane's. `until` runs one coroutine to its end, sleeping where it sleeps.
    """

    def __init__(self, time: Time, entered: Callable[[bool], None]) -> None:
        super().__init__()
        self._time = time
        self._entered = entered
        self._waits = False
        # What BaseEventLoop asks of a real loop: to wait for input, of which there is none.
        self._selector = self
        self._clock_resolution = RESOLUTION_S

    def time(self) -> float:
        """Seconds, as the world has it."""
        return self._time.now()

    def turn(self) -> None:
        """Run what is ready."""
        self._waits = False
        self.call_soon(self.stop)
        self._enter(self.run_forever)

    def until(self, call: Awaitable[Any]) -> Any:
        """Await ``call``; no other process does anything meanwhile."""
        self._waits = True
        return self._enter(lambda: self.run_until_complete(call))

    def cancel(self) -> set[asyncio.Task[Any]]:
        """Cancel what has not ended."""
        tasks = asyncio.all_tasks(self)
        for task in tasks:
            task.cancel()
        return tasks

    def end(self) -> None:
        """Cancel what is left, as nobody will ever go on with it."""
        if self.is_closed():
            return
        tasks = self.cancel()
        if tasks:
            self.until(asyncio.wait(tasks))
            for task in tasks:
                _ = task.cancelled() or task.exception()  # asked, so that nobody complains
        self.close()

    def _enter(self, run: Callable[[], Any]) -> Any:
        self._entered(True)
        try:
            return run()
        finally:
            self._entered(False)

    # --- what BaseEventLoop needs

    def select(self, timeout: float | None) -> list[Any]:
        """Nothing ever comes from outside; waiting lets time pass."""
        if self._waits:
            assert timeout is not None, "a coroutine waits for what nobody will do"
            if timeout > 0:
                self._time.sleep(max(timeout, RESOLUTION_S))
        return []

    def _process_events(self, event_list: list[Any]) -> None:
        """There are none."""

    def _write_to_self(self) -> None:
        """Nothing has to be woken: all of this is one thread."""

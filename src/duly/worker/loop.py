"""The event loop a worker owns, on a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Coroutine, Iterator
from typing import Any


class LoopThread:
    """One event loop on one thread, from construction until `stop`."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="duly-loop", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def run(self, call: Awaitable[Any]) -> Any:
        """Await ``call`` on the loop and return its result, from any other thread."""
        return asyncio.run_coroutine_threadsafe(_awaited(call), self.loop).result()

    def answers(self, timeout_s: float) -> bool:
        """Whether it gets round to anything within so many seconds: a handler may block it."""
        probe = asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self.loop)
        try:
            probe.result(timeout_s)
        except TimeoutError:
            return False
        return True

    def stop(self, timeout_s: float = 2.0) -> None:
        """Cancel what is left, give it ``timeout_s`` seconds to end, and stop the loop."""
        if self.loop.is_closed():
            return
        ending = asyncio.run_coroutine_threadsafe(_cancel_all(timeout_s), self.loop)
        try:
            ending.result(timeout_s + 1)
        except TimeoutError:
            return  # something blocks the loop; the thread is a daemon and ends with the process
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(timeout_s)
        if not self._thread.is_alive():
            self.loop.close()


def _awaited(call: Awaitable[Any]) -> Coroutine[Any, Any, Any]:
    if isinstance(call, Coroutine):
        return call

    async def wait() -> Any:
        return await call

    return wait()


async def shake_off(task: asyncio.Task[Any]) -> None:
    """Undo what cancellation was asked of the current task, which goes on; another that comes
    meanwhile is raised.
    """
    while task.cancelling():
        task.uncancel()
    # One that was not delivered yet would hit whatever is awaited next.
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.sleep(0)
    if task.cancelling():
        raise asyncio.CancelledError


async def _cancel_all(timeout_s: float) -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=timeout_s)
    await asyncio.get_running_loop().shutdown_asyncgens()


class TimeLimit:
    """How long a consumer's handlers may run, kept with one timer for all that are running.

    Their limit is the same, so who began first is over first. A timer for each is a seventh of what
    a handler costs that waits for a moment, with hundreds in flight.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._running: dict[_Run, None] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._held = 0

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """While calls follow one another: the timer stays where it is between them."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
            self._rest()

    async def keep(self, call: Any, task: asyncio.Task[Any]) -> Any:
        """Await a handler in its task, cancelled with `TimeoutError` when its time is over."""
        loop = task.get_loop()
        run = _Run(task, loop.time() + self._limit_s)
        self._running[run] = None
        if self._timer is None:
            self._timer = loop.call_at(run.until, self._look)
        try:
            returned = await call
        except BaseException as error:
            # What else was cancelled is not the limit's to explain.
            only_this = self._end(run) and task.uncancel() <= run.cancelling
            if only_this and isinstance(error, asyncio.CancelledError | TimeoutError):
                raise self._over() from error
            raise
        # Looked at here too: a handler may swallow its cancellation.
        if self._end(run):
            task.uncancel()
            raise self._over()
        return returned

    def _over(self) -> TimeoutError:
        return TimeoutError(f"the handler ran longer than max_run_s={self._limit_s:g}")

    def _end(self, run: _Run) -> bool:
        del self._running[run]
        self._rest()
        return run.is_over

    def _rest(self) -> None:
        if self._timer is not None and not self._running and not self._held:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        for run in self._running:
            if run.is_over:
                continue  # cancelled, and has not ended yet
            loop = run.task.get_loop()
            if run.until > loop.time():
                self._timer = loop.call_at(run.until, self._look)
                return
            run.is_over = True
            run.task.cancel()


class _Run:
    """One call under way. ``cancelling``: how often its task was asked to end before."""

    __slots__ = ("cancelling", "is_over", "task", "until")

    def __init__(self, task: asyncio.Task[Any], until: float) -> None:
        self.task = task
        self.until = until
        self.cancelling = task.cancelling()
        self.is_over = False

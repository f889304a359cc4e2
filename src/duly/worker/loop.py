"""The event loop a worker owns, on a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Coroutine
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


async def _cancel_all(timeout_s: float) -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=timeout_s)
    await asyncio.get_running_loop().shutdown_asyncgens()


async def within_limit(call: Any, limit_s: float) -> None:
    """Await a handler, cancelled with `TimeoutError` after ``limit_s`` seconds."""
    limit = asyncio.timeout(limit_s)
    try:
        async with limit:
            await call
    except TimeoutError:
        if not limit.expired():
            raise  # the handler's own
    # Checked here too: a handler may swallow its cancellation.
    if limit.expired():
        raise TimeoutError(f"the handler ran longer than max_run_s={limit_s:g}")

"""What blocks, beside event loops: an app's threads, by what they may have to wait for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    # Slow to import, and not needed by those who have no event loop.
    from concurrent.futures import ThreadPoolExecutor

R = TypeVar("R")
Kind = Literal["publish", "begin", "end"]
"""What a thread does. Whoever begins a transaction, or publishes, may wait for one that is open to
end, so that what ends it has threads of its own; and in a transaction one may publish elsewhere.
"""

_OF_A_KIND = 4


class Threads:
    """Made when they are needed. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pools: dict[Kind, ThreadPoolExecutor] = {}

    def of(self, kind: Kind) -> ThreadPoolExecutor:
        """Those of one kind."""
        from concurrent.futures import ThreadPoolExecutor

        with self._lock:
            pool = self._pools.get(kind)
            if pool is None:
                pool = ThreadPoolExecutor(_OF_A_KIND, thread_name_prefix=f"duly-{kind}")
                self._pools[kind] = pool
            return pool

    async def run(self, kind: Kind, call: Callable[..., R], *args: Any) -> R:
        """Run what blocks on a thread of this kind, in the caller's context."""
        import asyncio

        context = copy_context()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.of(kind), lambda: context.run(call, *args))

    def close(self) -> None:
        """End them, when they have done what they do."""
        with self._lock:
            pools, self._pools = [*self._pools.values()], {}
        for pool in pools:
            pool.shutdown()

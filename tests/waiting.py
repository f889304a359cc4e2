"""Waiting for a condition with a deadline; tests never sleep."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

_never = threading.Event()


def eventually(
    condition: Callable[[], object],
    what: str,
    describe: Callable[[], str] = lambda: "",
    timeout_s: float = 30.0,
) -> None:
    """Wait until ``condition`` holds; fails with what was awaited and how things are."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"after {timeout_s} s still not: {what}\n{describe()}"
        _never.wait(0.01)


def alive(pid: int) -> bool:
    """Whether the process runs; one that is dead and not reaped yet does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"

"""The clocks that the broker goes by; tests bring their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from duly.message import now_ms
from duly.sql.sqlite import boot_id, boot_ms


@dataclass(frozen=True, slots=True)
class Clock:
    """``wall_ms`` tells due times and ages, ``boot_ms`` and ``boot_id`` leases (no clock step
    moves them), ``monotonic_s`` how long something waits in this process.
    """

    wall_ms: Callable[[], int] = now_ms
    boot_ms: Callable[[], int] = boot_ms
    boot_id: Callable[[], str] = boot_id
    monotonic_s: Callable[[], float] = monotonic

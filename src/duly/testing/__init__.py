"""Testing with duly: the harness for applications, and the instruments of proof.

`running` lets an application work within a test::

    with duly.testing.running(app) as t:
        t.publish(orders, Order("o-1"))
        t.drain()
        assert t.payloads(receipts) == [...]

Beside it lie histories, the checker that judges them, faults, simulation and chaos, for anybody
who tests a broker or a store. Nothing that runs in production imports this room, and it imports
what is heavy when that is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from duly.testing.harness import (
        Clock,
        DeadLettered,
        Failure,
        Faults,
        MachineClock,
        NotDrained,
        NotHit,
        RunApp,
        Running,
        running,
    )

__all__ = [
    "Clock",
    "DeadLettered",
    "Failure",
    "Faults",
    "MachineClock",
    "NotDrained",
    "NotHit",
    "RunApp",
    "Running",
    "running",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from duly.testing import harness

    return getattr(harness, name)

"""The harness for everyday tests of an application: see `running`."""

from duly.testing.faulty import Faults, NotHit
from duly.testing.harness.clock import Clock, MachineClock
from duly.testing.harness.failures import DeadLettered, Failure, NotDrained
from duly.testing.harness.running import RunApp, Running, running

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

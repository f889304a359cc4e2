"""Worker processes: started, restarted when they die, ended when they hang, drained on a signal.

`Supervisor` is the parent's half, `Lifeline` the worker's; a socket pair is between them. The
supervisor runs any command that speaks to its lifeline, so it knows neither apps nor brokers.
"""

from __future__ import annotations

from duly.supervisor.child import Child, Report
from duly.supervisor.lifeline import SLOT_VARIABLE, Lifeline
from duly.supervisor.supervisor import (
    CUT_OFF,
    DRAINED,
    REFUSED,
    Patience,
    Supervisor,
)

__all__ = [
    "CUT_OFF",
    "DRAINED",
    "REFUSED",
    "SLOT_VARIABLE",
    "Child",
    "Lifeline",
    "Patience",
    "Report",
    "Supervisor",
]

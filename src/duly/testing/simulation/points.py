"""The crash points of the specification, and the points of the simulation that stand for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

CRASH_POINTS: Mapping[str, tuple[str, ...]] = {
    "publisher: before": ("publisher: before", "publish: before"),
    "publisher: business row written": ("publisher: business row written",),
    "publisher: outbox row written": ("publish in transaction: after",),
    "publisher: sent to the broker, no confirm": ("publish: after",),
    "publisher: confirmed": ("publisher: done",),
    "relay: read": ("unsent: after",),
    "relay: confirmed, not marked": ("sent: before",),
    "relay: marked": ("sent: after", "between steps, after sent"),
    "claim sent, no answer": ("claim: after",),
    "claimed, not started": ("between steps, after claim",),
    "decoded": ("begin: before",),
    "transaction begun": ("begin: after",),
    "admitted": ("admit: after", "between steps, after admit"),
    "before the handler": ("handler: before",),
    "between statements of the handler": (
        "handler: one row written",
        "handler: both rows written",
        "handler: in the middle",
    ),
    "handler returned": ("handler: after",),
    "a savepoint": (
        "savepoint: after",
        "release savepoint: after",
        "rollback to savepoint: after",
    ),
    "outbox flushed": ("publish in transaction: after",),
    "settled in the transaction": ("settle in transaction: after",),
    "COMMIT sent, cut before it was applied": ("commit: before",),
    "COMMIT sent, cut after it was applied": ("commit: after",),
    "committed, not settled": ("between steps, after commit",),
    "settle sent, no answer": ("settle: after",),
    "settled": ("between steps, after settle",),
    "retry written": ("settle of Retry: after", "settle in transaction of Retry: after"),
    "attempts exhausted": ("settle of Dead: after", "settle in transaction of Dead: after"),
    "lease renewed": ("extend: after",),
    "parked message promoted": ("claim of a retry: after",),
    "drain": ("close: before", "close: after", "drain: its time is over"),
    "another's expired claim taken": ("claim of a suspect: after",),
}
"""Not reached by this simulation: schema migration and the second signal (real processes), and
cleaning of inbox and outbox, which no call of the seam shows."""


def covered(crashes: Counter[str]) -> Mapping[str, int]:
    """How often a process died at each crash point of the specification."""
    return {name: sum(crashes[point] for point in points) for name, points in CRASH_POINTS.items()}

"""Schedules: a tick's messages and the memory of it, in one transaction."""

from __future__ import annotations

from duly.broker import Outcome
from duly.errors import IdentityConflict, PublishFailed
from duly.sql.steps import Ask, Steps


def find(schedule: str) -> Steps[int | None]:
    """The last tick that was published; None for a schedule that is new."""
    rows = yield Ask("reached_tick", (schedule,))
    return int(rows[0][0]) if rows else None


def every() -> Steps[dict[str, int]]:
    """How far each schedule is, by its name."""
    return dict((yield Ask("reached_ticks")))


def start(schedule: str, now_ms: int) -> Steps[int]:
    """The same, for which a new schedule starts now."""
    yield Ask("start_schedule", (schedule, now_ms))
    [(reached_ms,)] = yield Ask("reached_tick", (schedule,))
    return int(reached_ms)


def tick(
    schedule: str, reached_ms: int, to_ms: int, publish: Steps[list[Outcome]]
) -> Steps[list[Outcome] | None]:
    """Publish (by these steps) and move the schedule on; None where another process has moved it.

    Raises the first `PublishFailed` other than a conflict of identity, which no other attempt
    could end: whoever published under the tick's id stays the first.
    """
    if not (yield Ask("move_tick", (schedule, reached_ms, to_ms))):
        return None
    outcomes = yield from publish
    for outcome in outcomes:
        if isinstance(outcome, PublishFailed) and not isinstance(outcome, IdentityConflict):
            raise outcome
    return outcomes

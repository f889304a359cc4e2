"""`Scheduler`: publishes what is due, step by step; every worker drives one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from threading import Event as Flag

from duly.broker import Published
from duly.errors import BrokerError, CommitUnknown, PublishFailed
from duly.message import now_ms
from duly.schedules.broker import Ticking
from duly.schedules.schedule import Schedule

log = logging.getLogger("duly.schedules")

# Steps of the wall clock have to be seen, so nobody pauses longer.
_LONGEST_PAUSE_S = 1.0
_FIRST_RETRY_S = 0.2
_LONGEST_RETRY_S = 60.0
# The clock may be corrected by so much without a word.
_AHEAD_MS = 60_000


class _Plan:
    """One schedule, and how far it is as far as this process knows (None: to be asked)."""

    __slots__ = ("failures", "key", "reached_ms", "retry_ms", "schedule", "warned")

    def __init__(self, schedule: Schedule, source: str) -> None:
        self.schedule = schedule
        self.key = schedule.key(source)
        self.reached_ms: int | None = None
        self.retry_ms = 0
        self.failures = 0
        self.warned = False


class Scheduler:
    """The schedules of an app in one process; others do the same, and each tick is one's.

    ``step`` publishes what is due and says how long to pause; a thread (`run`) or a test drives
    it. ``wall_ms`` gives milliseconds since 1970 UTC. The topics must be declared at the broker.

    Which ticks are due follows from the wall clock and from the last tick that was published,
    which the broker moves in the transaction that stores the messages. It only moves forward: a
    clock that is set back ticks nothing a second time, it waits until it comes to where it was.
    """

    def __init__(
        self,
        schedules: Sequence[Schedule],
        broker: Ticking,
        source: str,
        *,
        wall_ms: Callable[[], int] = now_ms,
    ) -> None:
        self._plans = [_Plan(schedule, source) for schedule in schedules]
        self._broker = broker
        self._source = source
        self._wall_ms = wall_ms
        self.published = 0

    def step(self) -> float:
        """Publish every tick that is due. Returns the seconds to pause before the next step."""
        return min([self._advance(plan) for plan in self._plans], default=_LONGEST_PAUSE_S)

    def publish_due(self) -> int:
        """Publish every tick that is due, and return how many were. Raises what a step would log
        and try again: for tests, which are not to pass over it.
        """
        before, time_ms = self.published, self._wall_ms()
        for plan in self._plans:
            self._publish_due(plan, time_ms)
        return self.published - before

    def run(self, stop: Flag) -> None:
        """Step until told to stop; a tick under way is published first."""
        while not stop.is_set():
            stop.wait(self.step())

    def _advance(self, plan: _Plan) -> float:
        time_ms = self._wall_ms()
        if 0 < plan.retry_ms - time_ms <= _LONGEST_RETRY_S * 1000:  # else the clock was set back
            return _pause_s(plan.retry_ms - time_ms)
        try:
            self._publish_due(plan, time_ms)
        except Exception as error:  # noqa: BLE001 - a payload's function may raise anything
            return self._failed(plan, error, time_ms)
        plan.failures = plan.retry_ms = 0
        assert plan.reached_ms is not None, "asked for above"
        following = next(plan.schedule.ticks.after(plan.reached_ms), None)
        return _LONGEST_PAUSE_S if following is None else _pause_s(following - time_ms)

    def _publish_due(self, plan: _Plan, time_ms: int) -> None:
        if plan.reached_ms is None:
            plan.reached_ms = self._broker.reached(plan.key, time_ms)
        reached_ms, schedule = plan.reached_ms, plan.schedule
        self._warn_of_clock(plan, reached_ms, time_ms)
        due = schedule.ticks.since(reached_ms, time_ms, schedule.most)
        if not due:
            return
        messages = [schedule.message(tick_ms, self._source) for tick_ms in due]
        outcomes = self._broker.tick(plan.key, reached_ms, due[-1], messages)
        if outcomes is None:
            plan.reached_ms = self._broker.reached(plan.key, time_ms)
            return
        plan.reached_ms = due[-1]
        self.published += sum(isinstance(outcome, Published) for outcome in outcomes)
        if (missed := next(schedule.ticks.after(reached_ms))) < due[0]:
            log.warning(
                "schedule %s: ticks since %s were missed; of them the latest %d are published",
                schedule.name, schedule.id_of(missed), len(due),
            )  # fmt: skip

    def _failed(self, plan: _Plan, error: Exception, time_ms: int) -> float:
        """Nothing was published, or nobody can say: look how far it is, and try again."""
        plan.reached_ms = None
        delay_s = min(_FIRST_RETRY_S * 2.0 ** min(plan.failures, 16), _LONGEST_RETRY_S)
        plan.failures += 1
        plan.retry_ms = time_ms + int(delay_s * 1000)
        expected = isinstance(error, BrokerError | CommitUnknown | PublishFailed)
        log.error(
            "schedule %s: a tick is not published yet, again in %.1f s: %s: %s",
            plan.schedule.name, delay_s, type(error).__name__, error,
            exc_info=None if expected else error,
        )  # fmt: skip
        return min(delay_s, _LONGEST_PAUSE_S)

    def _warn_of_clock(self, plan: _Plan, reached_ms: int, time_ms: int) -> None:
        if reached_ms <= time_ms + _AHEAD_MS:
            plan.warned = False
        elif not plan.warned:
            plan.warned = True
            log.warning(
                "schedule %s has published up to %s, which this machine's clock has yet to reach: "
                "it was ahead. Nothing ticks until then; to start anew, give the schedule another "
                "name.",
                plan.schedule.name, plan.schedule.id_of(reached_ms),
            )  # fmt: skip


def _pause_s(milliseconds: int) -> float:
    return min(max(milliseconds / 1000, 0.001), _LONGEST_PAUSE_S)

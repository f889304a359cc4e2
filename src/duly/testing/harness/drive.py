"""Driving the lanes of a test until nothing is left that could be done now."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from math import inf
from random import Random
from typing import Any

from duly.app import App
from duly.broker import Broker
from duly.inspection import SubscriptionState
from duly.store import Outbox, Parked, with_parked
from duly.testing.faulty import Died, Faults
from duly.testing.harness.clock import Clock
from duly.testing.harness.failures import Failures, NotDrained
from duly.testing.harness.seams import Seen
from duly.testing.harness.stepped import Driven, SteppedWorker, lane_of
from duly.worker.concurrent import ConcurrentLane

# How long at-most-once messages may take from their buffer to the broker.
FLUSH_S = 5.0
# While handlers are in flight on an event loop, how often to look whether they have ended.
LOOK_S = 0.0005
# How often lanes look again when what waited for a worker of its own does not any more.
LOOKS = 2
# Looking for a due time that nobody has told: this far at first, then twice as far, to a year.
FIRST_GUESS_S = 0.05
LAST_GUESS_S = 366 * 86400.0
LOOK_AGAIN_S = 0.2


class Drive:
    """Steps lanes, relay and buffer in turn, on the calling thread."""

    def __init__(
        self,
        app: App,
        worker: SteppedWorker | None,
        broker: Broker,
        outbox: Outbox | None,
        clock: Clock,
        calls: Seen,
        failures: Failures,
        faults: Faults | None,
        seed: int,
    ) -> None:
        self._app = app
        self._worker = worker
        self._broker: Any = broker
        self._outbox = outbox
        self._clock = clock
        self._seen = calls
        self._failures = failures
        self._faults = faults
        self._random = Random(seed)
        self._paused_s = inf
        self._guess_s, self._looks = FIRST_GUESS_S, LOOKS
        self._deadline = inf

    def run(self, *, advance: bool, expected: bool, timeout_s: float) -> None:
        """Work until nothing is due; with ``advance`` until nothing waits for its time either."""
        self._deadline = time.monotonic() + timeout_s
        self._guess_s, self._looks = FIRST_GUESS_S, LOOKS
        while True:
            self._paused_s = inf
            moved = self._all_once()
            if expected:
                self._failures.pass_over()
            else:
                self._failures.tell()
            if moved:
                self._guess_s, self._looks = FIRST_GUESS_S, LOOKS
                self._check_time()
                continue
            wait_s = self._next_s(advance)
            if wait_s is None:
                return
            self._check_time()
            self._clock.advance(wait_s)

    def _all_once(self) -> bool:
        moved = self._in_turn() if self._faults is None else self._interleaved()
        moved |= self._relay()
        # Last, and each time: what handlers give to the buffer is there to be handled next.
        return self._app._publisher.flush(FLUSH_S) or moved

    def _in_turn(self) -> bool:
        """One round of each lane; whether there was anything in it."""
        moved = [self._round(driven) for driven in self._lanes()]
        return any(moved)

    def _round(self, driven: Driven) -> bool:
        before = _progress(driven)
        self._step(driven)
        while not driven.idle():
            self._step(driven)
        return _moved(driven, before)

    def _interleaved(self) -> bool:
        """One round of each lane, step by step in any order: what one has claimed or handled,
        and not yet settled, another may find free.
        """
        under_way = {driven: _progress(driven) for driven in self._lanes()}
        moved = False
        while under_way:
            driven = self._random.choice(list(under_way))
            alive = self._step(driven)
            # Whoever came in now would wait for the transaction, on the thread that has it open.
            while alive and self._seen.transactions and not driven.idle():
                alive = self._step(driven)
            if not alive:
                living = self._lanes()
                under_way = {e: before for e, before in under_way.items() if e in living}
                moved = True
            elif driven.idle():
                moved |= _moved(driven, under_way.pop(driven))
        return moved

    def _lanes(self) -> Sequence[Driven]:
        return () if self._worker is None else self._worker.lanes

    def _step(self, driven: Driven) -> bool:
        """One step of a lane; False where its process died of it."""
        assert self._worker is not None, "lanes belong to a worker"
        try:
            pause_s = driven.step()
        except BaseException as error:
            by_fault = self._faults is not None and self._faults.made(error)
            if not by_fault and not isinstance(error, Died):
                raise
            self._worker.replace_the_dead(driven, self._broker)
            return False
        if pause_s:
            self._paused_s = min(self._paused_s, pause_s)
        if isinstance(driven, ConcurrentLane) and not driven.idle():
            time.sleep(LOOK_S)
        self._check_time()
        return True

    def _relay(self) -> bool:
        relay = None if self._worker is None else self._worker.relay
        if relay is None or self._outbox is None:
            return False
        unsent = self._outbox.backlog().unsent
        if not unsent:
            return False
        pause_s = relay.step()
        moved = self._outbox.backlog().unsent != unsent
        if not moved:
            self._paused_s = min(self._paused_s, max(pause_s, 0.01))
        return moved

    # --- waiting

    def _next_s(self, advance: bool) -> float | None:
        """How much time has to pass for anything to happen; None: nothing needs to."""
        states = self.states()
        held = sum(state.in_flight for state in states)
        unsent = self._outbox is not None and self._outbox.backlog().unsent
        stopped = self._paused_s < inf
        if stopped and (held or unsent or any(state.backlog for state in states)):
            return self._paused_s
        if any(state.backlog for state in states) and (wait_s := self._kept_waiting_s()):
            return wait_s
        if held and (advance or self._faults is not None):
            return self._longest_lease_s()  # whoever holds it is gone
        if not advance or not any(state.parked for state in states):
            return None
        return self._next_due_s()

    def _kept_waiting_s(self) -> float:
        """How long what is due may wait for a worker of its own, where the broker knows that. It
        may just have ceased to wait, behind the lanes that looked before: they look once more.
        """
        wait_s: float | None = getattr(self._broker, "keeps_waiting_s", None)
        if wait_s is None or (wait_s == 0.0 and self._looks == 0):
            return 0.0
        self._looks -= wait_s == 0.0
        return wait_s + 0.001

    def _next_due_s(self) -> float | None:
        now = self._clock()
        due = [d for d in self._due_times() if d > now]
        if due:
            return min(due) - now + 0.001
        if self._may_be_held_for_ever() or self._guess_s > LAST_GUESS_S:
            return None
        guess_s, self._guess_s = self._guess_s, self._guess_s * 2
        return guess_s if self._clock.stands_still else min(guess_s, LOOK_AGAIN_S)

    def _due_times(self) -> Sequence[float]:
        given = [m.due_ms / 1000 for m in self._seen.messages if m.due_ms is not None]
        return [*given, *self.retries]

    retries: Sequence[float] = ()
    """The times at which failed messages are to be tried again."""

    parked: Parked | None = None
    """What waits in the store, where a log goes on behind it."""

    def _may_be_held_for_ever(self) -> bool:
        holding = {
            lane_of(driven).consumer.name
            for driven in self._lanes()
            if lane_of(driven).consumer.options.hold_key_on_dead
        }
        return any(state.dead and state.name in holding for state in self.states())

    def _longest_lease_s(self) -> float:
        assert self._worker is not None, "what is claimed was claimed by a worker"
        return max(consumer.options.lease_s for consumer in self._worker.consumers) + 0.001

    def states(self) -> Sequence[SubscriptionState]:
        """How far the consumers that are worked here have come."""
        look: Callable[[], Sequence[SubscriptionState]] = self._broker.subscriptions
        names = {c.name for c in self._worker.consumers} if self._worker is not None else set()
        waiting = () if self.parked is None else self.parked.waiting()
        return [state for state in with_parked(look(), waiting) if state.name in names]

    def _check_time(self) -> None:
        if time.monotonic() < self._deadline:
            return
        left = "; ".join(
            f"{s.name}: {s.backlog} wait, {s.in_flight} are claimed, {s.parked} are parked"
            for s in self.states()
        )
        counts = {} if self._worker is None else self._worker.counts()
        started = ", ".join(f"{name} handled {c.handled}" for name, c in counts.items())
        raise NotDrained(
            f"it does not come to rest ({left}; so far {started}). A handler that publishes to "
            "a topic which leads back to it never ends; t.drain(timeout_s=...) gives more time"
        )


def _progress(driven: Driven) -> tuple[int, bool]:
    """How much a lane has claimed, and whether some of it is left for its next round, which may
    begin now.
    """
    lane = lane_of(driven)
    permits = lane.around.permits
    waits = permits is not None and permits.are_owed
    return lane.counts.claimed, bool(lane.pending) and not waits


def _moved(driven: Driven, before: tuple[int, bool]) -> bool:
    after = _progress(driven)
    return after[0] != before[0] or before[1] or after[1]

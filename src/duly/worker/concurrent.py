"""A lane with many ``async def`` handlers in flight at once.

It claims as places become free, starts each message as a task of the worker's loop, and
settles whatever has ended in one go; a slow handler keeps its own place and no other. For
at-least-once and at-most-once only: the messages of a transaction run in order, one lane each.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections import deque
from collections.abc import Generator
from typing import Any

from duly import errors, events
from duly.broker import Delivery, Receipt
from duly.guarantees import Done, Guarantee, Release, Settlement
from duly.logs import CURRENT
from duly.worker.beforehand import settle_before
from duly.worker.lane import Lane
from duly.worker.steps import NO_WORK, Pause, Step, Unfit, blocking

# While handlers are in flight a claim waits no longer than this, so that what ends is settled.
SETTLE_EVERY_S = 0.02
# With no place free, how long to wait for one before looking whether to stop.
LOOK_EVERY_S = 0.25

Sequential = list[tuple[Delivery, Any]]
"""Messages that run one after the other."""


class ConcurrentLane:
    """Works a `Lane`'s messages with up to ``concurrency`` handlers in flight.

    One thread calls `step`; handlers run on ``loop``. Between the two go only the deque of
    what has ended and an event that says so.
    """

    def __init__(self, lane: Lane, loop: asyncio.AbstractEventLoop) -> None:
        self.lane = lane
        self._loop = loop
        self._places = lane.consumer.options.concurrency
        self._ordered = lane.consumer.options.order_by_key
        self._settles_first = lane.consumer.guarantee is Guarantee.AT_MOST_ONCE
        # When each was started; 0: it waits behind another of its key.
        self._in_flight: dict[Receipt, float] = {}
        self._ended: deque[tuple[Receipt, Settlement | None]] = deque()
        self._something_ended = threading.Event()
        self._settling: Generator[Step, None, None] | None = None
        # Claimed, and waits until it can run with nothing beside it.
        self._alone: Sequential = []
        self._alone_runs = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._broken: BaseException | None = None

    # --- on the lane's thread

    def step(self) -> float:
        """Settle what has ended, claim for the free places, start that; seconds to pause."""
        if self._broken is not None:
            raise self._broken
        try:
            if self._settling is None and self._ended:
                ended = self._take_ended()
                self._settling = self.lane.settle(ended, len(ended), claims=self._room())
            if self._settling is not None:
                pause = next(self._settling, None)
                if isinstance(pause, Pause):
                    return pause.seconds
                self._settling = None
            return self._fill()
        except errors.SubscriptionEnded:
            raise
        except (errors.BrokerError, errors.TransactionError) as error:
            self.lane.end_round()
            return self.lane.pause_after(error).seconds

    def receipts(self) -> list[Receipt]:
        """What is claimed and not settled, for whoever extends the leases."""
        # At-most-once there is nothing to keep: what waits alone is settled.
        alone = [] if self._settles_first else self._alone
        waiting = [delivery.receipt for delivery, _ in alone]
        return [*self.lane.receipts(), *waiting, *list(self._in_flight)]

    def oldest_start(self) -> float | None:
        """The clock's time at which the oldest handler in flight was started."""
        return min([start for start in list(self._in_flight.values()) if start], default=None)

    def idle(self) -> bool:
        """Whether nothing is in flight, waits to be settled, or is settled and has to start."""
        settled = self._settles_first and self._alone
        return not (self._in_flight or self._ended or self._settling or settled)

    def close(self) -> None:
        """Cancel what is in flight, unsettled, and give back what never started."""
        if self._tasks:
            self._loop.call_soon_threadsafe(self._cancel)
        self.lane.close()

    def _take_ended(self) -> list[Settlement]:
        settlements: list[Settlement] = []
        while self._ended:
            receipt, settlement = self._ended.popleft()
            self._in_flight.pop(receipt, None)
            if settlement is not None:
                settlements.append(settlement)
        if not self._in_flight:
            self._alone_runs = False
        return settlements

    def _room(self) -> int:
        """For how many messages what ends leaves room, to be claimed as it is settled."""
        if self._alone or self._alone_runs:
            return 0
        return min(self._places - len(self._in_flight), self.lane.consumer.options.batch)

    def _fill(self) -> float:
        free = self._places - len(self._in_flight)
        if self._alone_runs or self.lane.stopping or not free or self._alone:
            self._start_alone()
            self._await_end(LOOK_EVERY_S)
            return 0.0
        limit = min(free, self.lane.consumer.options.batch)
        wait_s = self.lane.around.wait_s
        work = self.lane.claim(limit, min(wait_s, SETTLE_EVERY_S) if self._in_flight else wait_s)
        if work and self._settles_first:
            count = len(work)
            work = settle_before(self.lane, work)
            self._never_start(count - len(work))
        self.lane.in_round = NO_WORK
        if work and work[0][0].alone:
            self._alone = list(work)
            self._start_alone()
        elif work:
            self._start(list(work))  # once: of a span each is made when it is asked for
        elif self.lane.around.permits is not None:
            if not self._in_flight:
                return SETTLE_EVERY_S
            self._await_end(SETTLE_EVERY_S)
        return 0.0

    def _start_alone(self) -> None:
        # A message whose last worker died runs with nothing beside it, or its neighbours
        # would be charged with the next death.
        may_start = self._settles_first or not self.lane.stopping
        if self._alone and not self._in_flight and may_start:
            self._alone_runs = True
            self._start(self._alone)
            self._alone = []

    def _never_start(self, count: int) -> None:
        # Their permits were taken when they were claimed.
        if self.lane.around.permits is not None:
            self.lane.around.permits.give_back(count)

    def _start(self, items: Sequential) -> None:
        self._in_flight.update((delivery.receipt, 0.0) for delivery, _ in items)
        self._something_ended.clear()
        self._loop.call_soon_threadsafe(self._create_tasks, self._sequences(items))

    def _sequences(self, work: Sequential) -> list[Sequential]:
        if not self._ordered:
            return [[item] for item in work]
        by_key: dict[str | None, Sequential] = {}
        sequences: list[Sequential] = []
        for item in work:
            key = item[0].message.key
            if key is None or key not in by_key:
                sequences.append([item])
                by_key[key] = sequences[-1]
            else:
                by_key[key].append(item)
        return sequences

    def _await_end(self, timeout_s: float) -> None:
        if self._in_flight and not self._ended:
            self._something_ended.wait(min(timeout_s, self.lane.around.wait_s))
            self._something_ended.clear()

    # --- on the loop's thread

    def _create_tasks(self, sequences: list[Sequential]) -> None:
        for sequence in sequences:
            task = self._loop.create_task(self._run(sequence))
            self._tasks.add(task)
            task.add_done_callback(functools.partial(self._task_ended, sequence))

    def _task_ended(self, sequence: Sequential, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            return
        if not self.lane.caller.abandoned:
            # By a handler, before it had begun: once it has, that is the handler's failure.
            self._create_tasks([sequence])
            return
        # By the worker, which settles nothing of it, and may give it back.
        self._ended.extend((delivery.receipt, None) for delivery, _ in sequence)
        self._something_ended.set()

    async def _run(self, sequence: Sequential) -> None:
        try:
            await self._run_in_turn(sequence)
        except asyncio.CancelledError:
            raise  # by the worker, which ends: that settles nothing
        except BaseException as error:  # noqa: BLE001 - ends the lane, not the loop
            self._broken = error
            self._something_ended.set()

    async def _run_in_turn(self, sequence: Sequential) -> None:
        blocked = self.lane.blocked()
        for delivery, argument in sequence:
            settlement: Settlement | None
            if argument.__class__ is Unfit:
                settlement = blocking(blocked, delivery, argument.settlement(delivery.receipt))
                self._never_start(1)
            elif (blocked is not None and blocked.holds(delivery)) or (
                self.lane.stopping and not self._settles_first
            ):
                settlement = Release(delivery.receipt)
                self._never_start(1)
            elif delivery.receipt in self.lane.caller.lost and not self._settles_first:
                settlement = None  # another has it by now
                self._never_start(1)
            else:
                self._in_flight[delivery.receipt] = start = self.lane.around.clock()
                settlement = await self._outcome(delivery, argument)
                self._tell_handled(settlement, start)
                if settlement is not None:
                    blocking(blocked, delivery, settlement)
            if self._settles_first:
                settlement = None
            self._ended.append((delivery.receipt, settlement))
            self._something_ended.set()

    async def _outcome(self, delivery: Delivery, argument: object) -> Settlement | None:
        lane = self.lane
        CURRENT.set((lane.consumer.name, delivery))
        try:
            await lane.caller.await_one(argument)
        except Exception as error:  # noqa: BLE001 - whatever the handler raises
            if self._settles_first:
                lane.report_failure(delivery, error)
                return None
            return lane.failure(delivery, error)
        return Done(delivery.receipt)

    def _tell_handled(self, settlement: Settlement | None, start: float) -> None:
        around = self.lane.around
        if around.watchers:
            count = int(isinstance(settlement, Done))
            seen = events.Handled(self.lane.consumer.name, count, around.clock() - start)
            events.tell(around.watchers, seen)

    def _cancel(self) -> None:
        self.lane.caller.abandon()
        for task in self._tasks:
            task.cancel()

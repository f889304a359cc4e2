"""`Lane`: one claimer of a subscription. It claims, waits, settles and looks after the dead."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence

from duly.broker import Ahead, Delivery, Receipt, SubscribeOptions
from duly.brokers.sqlite.clock import Clock, StepWatch
from duly.brokers.sqlite.sweeper import Sweeper
from duly.errors import BrokerError, CommitUnknown
from duly.guarantees import Done, Retry, Settlement
from duly.sql import log, steering
from duly.sql.rows import NextClaim, Reading
from duly.sql.solitude import Solitude
from duly.sql.sqlite import DatabaseFile, is_alive
from duly.sql.steps import Steps

logger = logging.getLogger("duly.sqlite")

# How often a lane looks whether those who hold claims are alive, and so how long the messages
# of a killed worker wait at most. A look costs a read and one system call a worker.
_LOOK_S = 0.1
# How often a lane looks again that must claim nothing now, or only what its worker is not free for.
_ASIDE_S = 0.05


class Lane:
    """One lane's `Subscription` of a SQLite broker, which also claims ahead."""

    def __init__(
        self,
        file: DatabaseFile,
        clock: Clock,
        sweeper: Sweeper,
        steps: StepWatch,
        solitude: Solitude,
        lanes: Sequence[log.Lane],
        topics: Mapping[int, str],
        options: SubscribeOptions,
        closed: Callable[[Lane], None],
    ) -> None:
        self._file = file
        self._clock = clock
        self._sweeper = sweeper
        self._steps = steps
        self._solitude = solitude
        self._lanes = lanes
        self._me = lanes[0].worker
        self._number = lanes[0].subscription_no
        self._lease_ms = int(options.lease_s * 1000)
        self._remembered = options.remembered
        self._when_closed = closed
        self._turn = 0
        self._has_work = True
        self._was_full = False
        self._passed_accused = False
        self._looked_s = float("-inf")
        self._looked_at = -1
        self._look_in_s = 0.0
        self._reading = Reading(self._file.read, topics)
        self._paused = False
        self._closed = False
        self._claiming = threading.Lock()

    @property
    def paused(self) -> bool:
        """Whether a person holds the subscription back; see `duly.broker.Pausable`."""
        return self._paused

    def claim(self, limit: int, max_bytes: int, wait_s: float) -> Sequence[Delivery]:
        """Claim messages, waiting for the first; see `Subscription.claim`."""
        until_s = self._clock.monotonic_s() + wait_s
        self._solitude.end(self)
        while not self._closed:
            seen = self._file.changes()
            self._look_after_the_dead(seen)
            due_ms: int | None = None
            aside = self._stands_aside()
            if not self._has_work and not aside:
                self._has_work, due_ms = self._is_ready()
            if self._has_work and not aside:
                alone = self._solitude.is_closed_for(self._number)
                deliveries = self._claim_now(limit, max_bytes, alone=alone)
                if deliveries:
                    return deliveries
                may_alone = self._solitude.is_closed_for(self._number)
                aside = self._passed_accused and alone == may_alone
                if not aside:
                    continue  # what there was is parked, or another was faster: look again
            left_s = until_s - self._clock.monotonic_s()
            if left_s <= 0:
                break
            if aside:
                self._solitude.wait(min(left_s, _ASIDE_S))
                continue
            self._sweeper.idle()
            self._file.wait(seen, self._pause_s(seen, left_s, due_ms))
        return []

    def _stands_aside(self) -> bool:
        """Whether another lane of this process has the worker for itself."""
        if not self._solitude.is_closed_to(self._number):
            return False
        if self._solitude.is_run:
            now = self._clock.boot_id(), self._clock.boot_ms()
            if not self._file.read(lambda: log.holds_accused(self._me, *now)):
                # Settled, though its lane has not come back yet, or lost.
                self._solitude.end_lost()
        elif not self._file.read(log.accused_waits):
            self._solitude.give_up()  # settled, given up on, or another worker has it
        return self._solitude.is_closed_to(self._number)

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[Receipt]:
        """Settle durably, unless it is remembered elsewhere; returns the refused."""
        settle = self._settle_steps(settlements)
        return self._file.write(settle, durable=self._is_to_last(settlements))

    def _is_to_last(self, settlements: Sequence[Settlement]) -> bool:
        """Whether this is lost with the power unless it is synced. The death of the process never
        loses it.
        """
        return not self._remembered or not all(isinstance(each, Done) for each in settlements)

    def note_repeats(self, deliveries: Sequence[Delivery]) -> None:
        """Note what had taken effect before; see `duly.broker.NotesRepeats`."""
        receipts = [delivery.receipt for delivery in deliveries]
        number, now_ms = self._lanes[0].subscription_no, self._clock.wall_ms()
        self._file.write(lambda: log.note_repeats(receipts, number, now_ms), durable=False)

    def _settle_steps(
        self, settlements: Sequence[Settlement]
    ) -> Callable[[], Steps[Sequence[Receipt]]]:
        number = self._number

        def steps() -> Steps[Sequence[Receipt]]:
            # A retry's time is reckoned from the clock as it is once the file's turn has come:
            # waiting for that may take long, and others may have followed a step meanwhile.
            if any(isinstance(settlement, Retry) for settlement in settlements):
                now_ms = yield from self._steps.follow()
            else:
                now_ms = self._clock.wall_ms()
            return (yield from log.settle(settlements, now_ms, subscription_no=number))

        return steps

    def ahead(self, limit: int, max_bytes: int) -> NextClaim | None:
        """The next claim; None when the last one left nothing, and now and then, so that
        `claim` looks after the dead.
        """
        if not self._was_full or self._solitude.is_closed:
            return None
        if self._is_time_to_look(self._file.changes()):
            return None
        return NextClaim(self._claim_steps(limit, max_bytes, follow=False), take=self._take)

    def settle_and_claim(
        self, settlements: Sequence[Settlement], ahead: Ahead
    ) -> Sequence[Receipt]:
        """As `settle`, and claim in the same transaction; returns the refused."""
        if not isinstance(ahead, NextClaim):
            raise TypeError(f"{type(ahead).__name__} is no claim of this lane")
        settle = self._settle_steps(settlements)

        def both() -> Steps[Sequence[Receipt]]:
            refused = yield from settle()
            yield from ahead.steps()
            return refused

        with self._claiming:
            steps = settle if self._closed else both
            return self._file.write(steps, durable=self._is_to_last(settlements))

    def extend(self, receipts: Iterable[Receipt], lease_s: float) -> Sequence[Receipt]:
        """Hold the named messages for ``lease_s`` more seconds; returns the lost."""
        wanted = list(receipts)
        until = self._clock.boot_ms() + int(lease_s * 1000)
        return self._file.write(lambda: log.extend(wanted, until), durable=False)

    def close(self) -> None:
        """End a waiting claim and give back what is claimed and unsettled, uncharged."""
        if self._closed:
            return
        self._closed = True
        self._file.notify()
        self._solitude.end(self)
        self._solitude.open(self._number)  # who is left closes it again
        self._when_closed(self)
        try:
            with self._claiming:  # a claim that is being made must not outlive its lane
                self._file.write(lambda: log.release_lanes(self._lanes), durable=False)
        except (BrokerError, CommitUnknown) as error:
            # Others find out by themselves: this worker is dead by then, or its leases are over.
            logger.warning("a closing lane could not give back what it holds: %s", error)

    def _is_ready(self) -> tuple[bool, int | None]:
        numbers = [lane.subscription_no for lane in self._lanes]

        def look() -> Steps[tuple[bool, int | None]]:
            self._paused = yield from steering.is_paused(numbers)
            if not self._paused and not (yield from self._steps.is_followed()):
                return True, None  # the claim follows the clock, and finds what is due by it
            return (yield from log.is_ready(self._lanes, self._clock.wall_ms()))

        return self._file.read(look)

    def _claim_now(self, limit: int, max_bytes: int, *, alone: bool) -> Sequence[Delivery]:
        steps = self._claim_alone_steps() if alone else self._claim_steps(limit, max_bytes)
        with self._claiming:
            if self._closed:
                return []
            claimed = self._file.write(steps, durable=False)
        if alone:
            self._run_alone(claimed)
        return self._take(claimed)

    def _claim_steps(
        self, limit: int, max_bytes: int, *, follow: bool = True
    ) -> Callable[[], Steps[log.Claimed]]:
        """``follow``: steps of the clock first. A claim made ahead leaves that to the next other
        one, which comes within `_LOOK_S`: all that it does is to let retries begin.
        """
        self._turn += 1
        turn = self._turn

        def steps() -> Steps[log.Claimed]:
            # Looked at in the file's turn: what is claimed earlier, who closed the door sees.
            if self._solitude.is_closed_to(self._number):
                return log.Claimed(0, [], again=True)
            # Read when the file's turn has come: what is due, and from when on the lease counts.
            if follow:
                yield from self._steps.follow()
            now_ms, lease_until = self._clock.wall_ms(), self._clock.boot_ms() + self._lease_ms
            token = self._file.new_token()
            return (
                yield from log.claim(
                    self._lanes, limit, max_bytes, turn, now_ms, lease_until, token
                )
            )

        return steps

    def _claim_alone_steps(self) -> Callable[[], Steps[log.Claimed]]:
        def steps() -> Steps[log.Claimed]:
            now_ms, lease_until = self._clock.wall_ms(), self._clock.boot_ms() + self._lease_ms
            token = self._file.new_token()
            return (yield from log.claim_accused(self._lanes, now_ms, lease_until, token))

        return steps

    def _run_alone(self, claimed: log.Claimed) -> None:
        if claimed.parts:
            self._solitude.run(self._number, self)
        elif not claimed.accused:
            self._solitude.open(self._number)  # another worker has it

    def _take(self, claimed: log.Claimed) -> Sequence[Delivery]:
        self._was_full = claimed.full
        self._passed_accused = claimed.accused
        self._has_work = bool(claimed.parts) or claimed.again or claimed.accused
        if claimed.accused:
            self._solitude.close(self._number)
        deliveries, damaged = self._reading.deliveries(claimed)
        if damaged:
            self.settle(damaged)
        if deliveries:
            self._sweeper.claimed(len(deliveries))
        return deliveries

    def _pause_s(self, seen: int, left_s: float, due_ms: int | None) -> float:
        if due_ms is not None:
            left_s = min(left_s, (due_ms - self._clock.wall_ms()) / 1000)
        # A look before the latest change may have missed a claim, whose holder may die silently.
        since_s = self._clock.monotonic_s() - self._looked_s
        look_in_s = self._look_in_s if seen == self._looked_at else _LOOK_S
        return max(0.0, min(left_s, look_in_s - since_s))

    def _look_after_the_dead(self, seen: int) -> None:
        """Free what dead workers and ended leases held; now and then, for it costs a read."""
        if not self._is_time_to_look(seen):
            return
        self._looked_s, self._looked_at = self._clock.monotonic_s(), seen
        holders = self._file.read(lambda: log.holders(self._lanes))
        boot_id, boot_ms = self._clock.boot_id(), self._clock.boot_ms()
        dead = {
            worker
            for worker in {worker for worker, _, _ in holders}
            if worker != self._me and not is_alive(self._file.folder, worker)
        }
        over = any(boot != boot_id or until <= boot_ms for _, boot, until in holders)
        if dead or over:
            now_ms = self._clock.wall_ms()
            self._file.write(lambda: log.take_over(dead, boot_id, boot_ms, now_ms), durable=False)
            self._has_work = True
        self._look_in_s = self._next_look_s(holders, boot_ms)

    def _is_time_to_look(self, seen: int) -> bool:
        # A look before the latest change may have missed a claim, whose holder may die silently.
        look_in_s = self._look_in_s if seen == self._looked_at else _LOOK_S
        return self._clock.monotonic_s() - self._looked_s >= look_in_s

    def _next_look_s(self, holders: Sequence[tuple[str, str, int]], boot_ms: int) -> float:
        if any(worker != self._me for worker, _, _ in holders):
            return _LOOK_S
        # My own claims can only be lost by their lease.
        ends_ms = min((until for _, _, until in holders), default=boot_ms + 3_600_000)
        return max(_LOOK_S, (ends_ms - boot_ms) / 1000)

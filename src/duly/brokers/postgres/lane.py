"""`Lane`: one claimer of a subscription. It claims, waits, settles and looks after the dead."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from duly.broker import Ahead, Delivery, Receipt
from duly.brokers.postgres.bell import Bell
from duly.brokers.postgres.clock import SERVER, Clock, StepWatch
from duly.brokers.postgres.listener import Listener
from duly.brokers.postgres.sweeper import Sweeper
from duly.brokers.postgres.ticker import Ticker
from duly.errors import BrokerError, CommitUnknown
from duly.guarantees import Done, Retry, Settlement
from duly.sql import fresh, locks, log, steering
from duly.sql.postgres import Database
from duly.sql.rows import NextClaim, Reading
from duly.sql.solitude import Solitude
from duly.sql.steps import Ask, Steps

logger = logging.getLogger("duly.postgres")

# How often a lane looks whether those who hold claims are alive. A look costs a read or two.
_LOOK_S = 0.25
# How often a lane looks again that must claim nothing now, or only what its worker is not free for.
_ASIDE_S = 0.05


@dataclass(frozen=True, slots=True)
class Shared:
    """What the lanes of a broker have in common."""

    database: Database
    clock: Clock
    steps: StepWatch
    bell: Bell
    listener: Listener
    ticker: Ticker
    sweeper: Sweeper
    solitude: Solitude
    compare_clocks: Callable[[], None]


class Lane:
    """One lane's `Subscription` of a PostgreSQL broker, which also claims ahead."""

    def __init__(
        self,
        shared: Shared,
        lanes: Sequence[log.Lane],
        topics: Mapping[int, str],
        lease_s: float,
        closed: Callable[[Lane], None],
    ) -> None:
        self._database = shared.database
        self._clock = shared.clock
        self._shared = shared
        self._bell = shared.bell
        self._lanes = lanes
        self._solitude = shared.solitude
        self._number = lanes[0].subscription_no
        self._passed_accused = False
        self._lease_ms = int(lease_s * 1000)
        self._when_closed = closed
        self._turn = 0
        self._has_work = True
        self._was_full = False
        self._looked_s = float("-inf")
        # By subscription: no claim with a lower token is held. See `locks.held_from`.
        self._held_from: dict[int, int] = {}
        self._last_token = 0
        self._reading = Reading(self._database.read, topics)
        self._paused = False
        self._closed = False
        self._claiming = threading.Lock()
        # Whoever splits a claim must not do it while another looks at its pieces.
        self._settling = threading.Lock()

    @property
    def paused(self) -> bool:
        """Whether a person holds the subscription back; see `duly.broker.Pausable`."""
        return self._paused

    def claim(self, limit: int, max_bytes: int, wait_s: float) -> Sequence[Delivery]:
        """Claim messages, waiting for the first; see `Subscription.claim`."""
        until_s = self._clock.monotonic_s() + wait_s
        self._solitude.end(self)
        while not self._closed:
            seen = self._bell.seen()
            self._look_after_the_dead()
            due_ms: int | None = None
            if not self._was_full and self._shared.ticker.tick():
                self._has_work = True
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
            self._shared.sweeper.idle()
            self._bell.wait(seen, self._pause_s(left_s, due_ms))
        return []

    def _stands_aside(self) -> bool:
        """Whether another lane of this process has the worker for itself."""
        if not self._solitude.is_closed_to(self._number):
            return False
        if self._solitude.is_run:
            me, lease_ms = self._lanes[0].worker, self._clock.lease_ms()
            if not self._database.read(lambda: log.holds_accused(me, SERVER, lease_ms)):
                # Settled, though its lane has not come back yet, or lost.
                self._solitude.end_lost()
        elif not self._database.read(log.accused_waits):
            self._solitude.give_up()  # settled, given up on, or another worker has it
        return self._solitude.is_closed_to(self._number)

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[Receipt]:
        """Settle durably; returns the refused."""
        settle = self._settle_steps(settlements)
        with self._settling:
            refused = self._database.write(settle)
        self._tell(settlements)
        return refused

    def note_repeats(self, deliveries: Sequence[Delivery]) -> None:
        """Note what had taken effect before; see `duly.broker.NotesRepeats`."""
        receipts = [delivery.receipt for delivery in deliveries]
        number, now_ms = self._number, self._clock.wall_ms()
        self._database.write(lambda: log.note_repeats(receipts, number, now_ms), durable=False)

    def _settle_steps(
        self, settlements: Sequence[Settlement]
    ) -> Callable[[], Steps[Sequence[Receipt]]]:
        number = self._number
        if any(isinstance(settlement, Retry) for settlement in settlements):
            self._shared.steps.follow()

        def steps() -> Steps[Sequence[Receipt]]:
            now_ms = self._clock.wall_ms()
            return (yield from log.settle(settlements, now_ms, subscription_no=number))

        return steps

    def _tell(self, settlements: Sequence[Settlement]) -> None:
        """Who waits for what these made free. Others find a retry by looking."""
        if all(isinstance(settlement, Done) for settlement in settlements):
            if self._lanes[0].order_by_key:
                self._bell.stir()
        else:
            self._bell.ring()

    def ahead(self, limit: int, max_bytes: int) -> NextClaim | None:
        """The next claim; None when the last one left nothing, and now and then, so that
        `claim` looks after the dead.
        """
        if not self._was_full or self._solitude.is_closed or self._is_time_to_look():
            return None
        return NextClaim(self._claim_steps(limit, max_bytes), take=self._take)

    def settle_and_claim(
        self, settlements: Sequence[Settlement], ahead: Ahead
    ) -> Sequence[Receipt]:
        """Settle durably, and claim in the same transaction; returns the refused."""
        if not isinstance(ahead, NextClaim):
            raise TypeError(f"{type(ahead).__name__} is no claim of this lane")
        settle = self._settle_steps(settlements)

        def settled_and_claimed() -> Steps[Sequence[Receipt]]:
            refused = yield from settle()
            yield from ahead.steps()
            return refused

        def both() -> Steps[Sequence[Receipt]]:
            return locks.with_turn(set(), settled_and_claimed())

        with self._claiming, self._settling:
            refused = self._database.write(settle if self._closed else both)
        self._tell(settlements)
        return refused

    def extend(self, receipts: Iterable[Receipt], lease_s: float) -> Sequence[Receipt]:
        """Hold the named messages for ``lease_s`` more seconds; returns the lost."""
        wanted = list(receipts)
        until = self._clock.lease_ms() + int(lease_s * 1000)
        with self._settling:
            return self._database.write(lambda: log.extend(wanted, until))

    def close(self) -> None:
        """End a waiting claim and give back what is claimed and unsettled, uncharged."""
        if self._closed:
            return
        self._closed = True
        self._bell.stir()
        self._solitude.end(self)
        self._solitude.open(self._number)  # who is left closes it again
        self._when_closed(self)
        try:
            with self._claiming:  # a claim that is being made must not outlive its lane
                self._database.write(lambda: log.release_lanes(self._lanes))
        except (BrokerError, CommitUnknown) as error:
            # Others find out by themselves: this worker's session is over, or its leases are.
            logger.warning("a closing lane could not give back what it holds: %s", error)
            return
        self._bell.ring()

    # --- claiming

    def _is_ready(self) -> tuple[bool, int | None]:
        self._shared.steps.follow()
        numbers, now_ms = [lane.subscription_no for lane in self._lanes], self._clock.wall_ms()

        def look() -> Steps[tuple[bool, int | None]]:
            self._paused = yield from steering.is_paused(numbers)
            ready = log.is_ready(self._lanes, now_ms)
            return (yield from locks.held_from(self._held_from, ready))

        return self._database.read(look)

    def _claim_now(self, limit: int, max_bytes: int, *, alone: bool) -> Sequence[Delivery]:
        steps = self._claim_alone_steps() if alone else self._claim_steps(limit, max_bytes)
        with self._claiming:
            if self._closed:
                return []
            claimed = self._database.write(steps)
        if alone:
            self._run_alone(claimed)
        return self._take(claimed)

    def _claim_alone_steps(self) -> Callable[[], Steps[log.Claimed]]:
        def claim() -> Steps[log.Claimed]:
            now_ms, lease_until = self._clock.wall_ms(), self._clock.lease_ms() + self._lease_ms
            return (yield from log.claim_accused(self._lanes, now_ms, lease_until))

        return lambda: locks.claiming(self._lanes, locks.held_from(self._held_from, claim()))

    def _run_alone(self, claimed: log.Claimed) -> None:
        if claimed.parts:
            self._solitude.run(self._number, self)
        elif not claimed.accused:
            self._solitude.open(self._number)  # another worker has it

    def _claim_steps(self, limit: int, max_bytes: int) -> Callable[[], Steps[log.Claimed]]:
        self._turn += 1
        turn = self._turn
        self._shared.steps.follow()

        def claim() -> Steps[log.Claimed]:
            if self._solitude.is_closed_to(self._number):
                return log.Claimed(0, [], again=True)
            # Read when the subscription's turn has come: what is due, and from when on the
            # lease counts.
            now_ms, lease_until = self._clock.wall_ms(), self._clock.lease_ms() + self._lease_ms
            return (
                yield from fresh.claim(self._lanes, limit, max_bytes, turn, now_ms, lease_until)
            )

        return lambda: locks.claiming(self._lanes, locks.held_from(self._held_from, claim()))

    def _take(self, claimed: log.Claimed) -> Sequence[Delivery]:
        self._was_full = claimed.full
        self._last_token = max(self._last_token, claimed.token)
        self._passed_accused = claimed.accused
        self._has_work = bool(claimed.parts) or claimed.again or claimed.accused
        if claimed.accused:
            self._solitude.close(self._number)
        deliveries, damaged = self._reading.deliveries(claimed)
        if damaged:
            self.settle(damaged)
        if deliveries:
            self._shared.sweeper.claimed(len(deliveries))
        return deliveries

    def _pause_s(self, left_s: float, due_ms: int | None) -> float:
        if due_ms is not None:
            left_s = min(left_s, (due_ms - self._clock.wall_ms()) / 1000)
        since_s = self._clock.monotonic_s() - self._looked_s
        return max(0.0, min(left_s, self._shared.listener.look_s, _LOOK_S - since_s))

    # --- the dead

    def _is_time_to_look(self) -> bool:
        return self._clock.monotonic_s() - self._looked_s >= _LOOK_S

    def _look_after_the_dead(self) -> None:
        """Free what dead workers and ended leases held; now and then, for it costs a read."""
        if not self._is_time_to_look():
            return
        self._looked_s = self._clock.monotonic_s()
        self._shared.compare_clocks()
        holders = self._database.read(self._holders)
        lease_ms = self._clock.lease_ms()
        dead = self._shared.listener.dead({worker for worker, _, _ in holders})
        if dead or any(until <= lease_ms for _, _, until in holders):
            self._database.write(lambda: self._take_over(dead, lease_ms))
            self._has_work = True
            self._bell.stir()

    def _holders(self) -> Steps[list[tuple[str, str, int]]]:
        """Who holds claims, having found out from which token on there are any."""
        for lane in self._lanes:
            number = lane.subscription_no
            [(oldest,)] = yield Ask("oldest_token", (number, self._held_from.get(number, 0)))
            # Where none is held, all up to what this lane has claimed itself are over.
            self._held_from[number] = self._last_token if oldest is None else oldest
        return (yield from locks.held_from(self._held_from, log.holders(self._lanes)))

    def _take_over(self, dead: set[str], lease_ms: int) -> Steps[int]:
        now_ms = self._clock.wall_ms()
        return (yield from locks.taking_over(log.take_over(dead, SERVER, lease_ms, now_ms)))

"""`Lane`: one claimer of a subscription. It claims, waits, settles and looks after the dead."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from duly.broker import Ahead, Delivery, Receipt
from duly.brokers.sqlite.clock import Clock, StepWatch
from duly.brokers.sqlite.rows import deliveries_of, message_of
from duly.brokers.sqlite.sweeper import Sweeper
from duly.guarantees import Retry, Settlement
from duly.message import Message
from duly.sql import log
from duly.sql.sqlite import DatabaseFile, is_alive
from duly.sql.steps import Steps

# How often a lane looks whether those who hold claims are alive, and so how long the messages
# of a killed worker wait at most. A look costs a read and one system call a worker.
_LOOK_S = 0.1


class _Ahead(log.Ahead):
    """A lane's next claim: see `duly.broker.Ahead`."""

    __slots__ = ("_take",)

    def __init__(
        self,
        make_steps: Callable[[], Steps[log.Claimed]],
        take: Callable[[log.Claimed], Sequence[Delivery]],
    ) -> None:
        super().__init__(make_steps)
        self._take = take

    def deliveries(self) -> Sequence[Delivery]:
        """What was claimed."""
        return () if self.claimed is None else self._take(self.claimed)


class Lane:
    """One lane's `Subscription` of a SQLite broker, which also claims ahead."""

    def __init__(
        self,
        file: DatabaseFile,
        clock: Clock,
        sweeper: Sweeper,
        steps: StepWatch,
        lanes: Sequence[log.Lane],
        topics: Mapping[int, str],
        lease_s: float,
        closed: Callable[[Lane], None],
    ) -> None:
        self._file = file
        self._clock = clock
        self._sweeper = sweeper
        self._steps = steps
        self._lanes = lanes
        self._me = lanes[0].worker
        self._topics = topics
        self._lease_ms = int(lease_s * 1000)
        self._when_closed = closed
        self._turn = 0
        self._has_work = True
        self._was_full = False
        self._looked_s = float("-inf")
        self._looked_at = -1
        self._look_in_s = 0.0
        self._looked_up: tuple[Receipt, Message[Any]] | None = None
        self._closed = False
        self._claiming = threading.Lock()

    def claim(self, limit: int, max_bytes: int, wait_s: float) -> Sequence[Delivery]:
        """Claim messages, waiting for the first; see `Subscription.claim`."""
        until_s = self._clock.monotonic_s() + wait_s
        while not self._closed:
            seen = self._file.changes()
            self._look_after_the_dead(seen)
            due_ms: int | None = None
            if not self._has_work:
                self._has_work, due_ms = self._is_ready()
            if self._has_work:
                deliveries = self._claim_now(limit, max_bytes)
                if deliveries:
                    return deliveries
                continue  # what there was is parked, or another was faster: look again
            left_s = until_s - self._clock.monotonic_s()
            if left_s <= 0:
                break
            self._sweeper.idle()
            self._file.wait(seen, self._pause_s(seen, left_s, due_ms))
        return []

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[Receipt]:
        """Settle durably; returns the refused."""
        settle = self._settle_steps(settlements)
        return self._file.write(settle)

    def _settle_steps(
        self, settlements: Sequence[Settlement]
    ) -> Callable[[], Steps[Sequence[Receipt]]]:
        number = self._lanes[0].subscription_no

        def steps() -> Steps[Sequence[Receipt]]:
            # A retry's time is reckoned from the clock as it is once the file's turn has come:
            # waiting for that may take long, and others may have followed a step meanwhile.
            if any(isinstance(settlement, Retry) for settlement in settlements):
                yield from self._steps.follow()
            now_ms = self._clock.wall_ms()
            return (yield from log.settle(settlements, now_ms, subscription_no=number))

        return steps

    def ahead(self, limit: int, max_bytes: int) -> _Ahead | None:
        """The next claim; None when the last one left nothing, and now and then, so that
        `claim` looks after the dead.
        """
        if not self._was_full or self._is_time_to_look(self._file.changes()):
            return None
        return _Ahead(self._claim_steps(limit, max_bytes), take=self._take)

    def settle_and_claim(
        self, settlements: Sequence[Settlement], ahead: Ahead
    ) -> Sequence[Receipt]:
        """Settle durably, and claim in the same transaction; returns the refused."""
        if not isinstance(ahead, _Ahead):
            raise TypeError(f"{type(ahead).__name__} is no claim of this lane")
        settle = self._settle_steps(settlements)

        def both() -> Steps[Sequence[Receipt]]:
            refused = yield from settle()
            yield from ahead.steps()
            return refused

        with self._claiming:
            if self._closed:
                return self._file.write(settle)
            return self._file.write(both)

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
        with self._claiming:  # a claim that is being made must not outlive its lane
            self._file.write(lambda: log.release_lanes(self._lanes), durable=False)
        self._when_closed(self)

    def _is_ready(self) -> tuple[bool, int | None]:
        def look() -> Steps[tuple[bool, int | None]]:
            if not (yield from self._steps.is_followed()):
                return True, None  # the claim follows the clock, and finds what is due by it
            return (yield from log.is_ready(self._lanes, self._clock.wall_ms()))

        return self._file.read(look)

    def _claim_now(self, limit: int, max_bytes: int) -> Sequence[Delivery]:
        steps = self._claim_steps(limit, max_bytes)
        with self._claiming:
            if self._closed:
                return []
            claimed = self._file.write(steps, durable=False)
        return self._take(claimed)

    def _claim_steps(self, limit: int, max_bytes: int) -> Callable[[], Steps[log.Claimed]]:
        self._turn += 1
        turn = self._turn

        def steps() -> Steps[log.Claimed]:
            # Read when the file's turn has come: what is due, and from when on the lease counts.
            yield from self._steps.follow()
            now_ms, lease_until = self._clock.wall_ms(), self._clock.boot_ms() + self._lease_ms
            return (yield from log.claim(self._lanes, limit, max_bytes, turn, now_ms, lease_until))

        return steps

    def _take(self, claimed: log.Claimed) -> Sequence[Delivery]:
        self._was_full = claimed.full
        self._has_work = bool(claimed.parts) or claimed.again
        deliveries, damaged = deliveries_of(claimed, self._topics, self._look_up, self._look_up_ids)
        if damaged:
            self.settle(damaged)
        if deliveries:
            self._sweeper.claimed(len(deliveries))
        return deliveries

    def _look_up_ids(self, first: int, last: int) -> Sequence[str]:
        return self._file.read(lambda: log.fetch_ids(first, last))

    def _look_up(self, receipt: Receipt) -> Message[Any]:
        """The whole message of a delivery that carries its body; the latest is kept, because
        every line a handler logs asks for it.
        """
        if self._looked_up is None or self._looked_up[0] != receipt:
            _, position = receipt
            rows = self._file.read(lambda: log.fetch(position, position, bodies_only=False))
            if not rows:
                raise LookupError(f"the message at position {position} is not in the log any more")
            self._looked_up = receipt, message_of(self._topics[log.stream_of(position)], rows[0])
        return self._looked_up[1]

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
            self._file.write(
                lambda: log.take_over(self._lanes, dead, boot_id, boot_ms, now_ms), durable=False
            )
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

"""Keeps a worker's claims alive, and looks for handlers that run too long.

Leases are extended only while the handler is within its time: a lease renewed for ever by a
hung handler would hold its messages for ever.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from duly import errors, events
from duly.broker import Receipt
from duly.worker.lane import Lane

log = logging.getLogger("duly.worker")

# An async handler is cancelled at max_run_s; this much later it is taken for hung.
CANCEL_GRACE_S = 5.0
BEAT_S = 0.5
# So many leases are extended at the same time, in one commit where the broker groups them.
_AT_ONCE = 32


class Watched(Protocol):
    """What the keeper needs of a lane."""

    def receipts(self) -> Sequence[Receipt]:
        """What is claimed and not settled."""
        ...

    def oldest_start(self) -> float | None:
        """When the oldest handler now running began."""
        ...


class Keeper:
    """One thread for all lanes of a worker.

    Leases that are due together are extended at the same time, each on a thread: one after the
    other, where every write waits for its turn, the last would come when its lease has ended.
    Not started, but driven by `look`, it does all in turn.

    ``overrun`` is called with a consumer's name when its handler is past its time;
    ``beat`` every half second, as long as this process can run a thread at all.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        overrun: Callable[[str, float], None],
        beat: Callable[[], None] | None,
    ) -> None:
        self._clock = clock
        self._overrun = overrun
        self._beat = beat
        self._lanes: list[tuple[Lane, Watched]] = []
        self._extended: dict[int, float] = {}
        self._reported: set[int] = set()
        self._suspects: dict[int, set[Receipt]] = {}
        self._lost: dict[int, set[Receipt]] = {}
        self._extenders: ThreadPoolExecutor | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="duly-keeper", daemon=True)

    def watch(self, lane: Lane, watched: Watched) -> None:
        """Keep this lane's claims from now on."""
        self._lanes.append((lane, watched))
        self._extended[id(watched)] = self._clock()

    def start(self) -> None:
        """Start the thread."""
        if len(self._lanes) > 1:
            self._extenders = ThreadPoolExecutor(
                min(len(self._lanes), _AT_ONCE), thread_name_prefix="duly-extender"
            )
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._extenders is not None:
            self._extenders.shutdown()

    def _run(self) -> None:
        shortest = min((lane.consumer.options.lease_s for lane, _ in self._lanes), default=30.0)
        while not self._stop.wait(min(BEAT_S, shortest / 6)):
            try:
                self.look()
            except Exception:
                # Without this thread nothing would extend leases or end hung handlers.
                log.exception("looking after the lanes failed; it goes on")
            if self._beat is not None:
                self._beat()

    def look(self) -> None:
        """Extend what is due and report what runs too long; once round all lanes."""
        now = self._clock()
        due: list[tuple[Lane, Watched]] = []
        for lane, watched in self._lanes:
            if self._runs_too_long(lane, watched, now):
                continue
            if now - self._extended[id(watched)] >= lane.consumer.options.lease_s / 3:
                self._extended[id(watched)] = now
                due.append((lane, watched))
        if self._extenders is not None and len(due) > 1:
            for extended in [self._extenders.submit(self._extend, *each) for each in due]:
                extended.result()
            return
        for each in due:
            self._extend(*each)

    def _runs_too_long(self, lane: Lane, watched: Watched, now: float) -> bool:
        options = lane.consumer.options
        limit_s = options.max_run_s + (CANCEL_GRACE_S if lane.consumer.handler.is_async else 0)
        started = watched.oldest_start()
        if started is None or now - started <= limit_s:
            self._reported.discard(id(watched))
            return False
        if id(watched) not in self._reported:
            self._reported.add(id(watched))
            self._overrun(lane.consumer.name, now - started)
        return True

    def _extend(self, lane: Lane, watched: Watched) -> None:
        receipts = watched.receipts()
        if not receipts:
            return
        try:
            lost = lane.subscription.extend(receipts, lane.consumer.options.lease_s)
        except (errors.BrokerError, errors.TransactionError) as error:
            log.warning("leases of %s could not be extended: %s", lane.consumer.name, error)
            return
        # What is being settled in this moment is not held any more, and not lost either: only
        # what is still said to be held at the next look was really lost.
        of, held = id(watched), set(watched.receipts())
        suspects, self._suspects[of] = self._suspects.get(of, set()), set(lost)
        sure = suspects & self._suspects[of] & held
        told, self._lost[of] = self._lost.get(of, set()), sure
        if new := [*(sure - told)]:
            log.warning("consumer %s lost %d leases", lane.consumer.name, len(new))
            lane.caller.lose(sure)
            lane.tell(events.LeaseLost(lane.consumer.name, new))

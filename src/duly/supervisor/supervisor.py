"""The parent of the worker processes: one thread, one selector, and the clock it is given."""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf
from types import FrameType
from typing import Any

from duly.supervisor.child import Child, Report, how_it_ended

log = logging.getLogger("duly.supervisor")

DRAINED = 0
"""Exit status: asked to stop, and every worker finished or gave back its work in time."""
CUT_OFF = 1
"""Exit status: handlers still ran when the time to drain was over; their messages come again."""
REFUSED = 2
"""Exit status: a worker said that it can never start: a wrong option, a refused contract."""

# Service managers, shells and timeout(1) signal a process and then its group: that is one wish.
SAME_SIGNAL_S = 0.3

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long the supervisor waits, in seconds.

    - ``drain_s``: from the first signal until the workers that still run are killed.
    - ``starting_drain_s``: the same for one that is still starting, and has nothing to finish.
    - ``silence_s``: without a heartbeat (one a second), until a worker counts as hung.
    - ``start_s``: for a worker to start, its imports included.
    - ``first_backoff_s``, ``longest_backoff_s``: before a dead worker is started again, doubled
      each time it dies young.
    - ``longest_at_work_s``: the same where it died at work and not at its start. A message that
      kills its process has so many attempts and no more, and meanwhile others wait.
    - ``healthy_s``: having worked for this long, a worker's death is no longer one of a series.
    """

    drain_s: float = 30.0
    starting_drain_s: float = 1.0
    silence_s: float = 10.0
    start_s: float = 120.0
    first_backoff_s: float = 0.1
    longest_backoff_s: float = 30.0
    longest_at_work_s: float = 1.0
    healthy_s: float = 5.0


@dataclass(slots=True)
class _Slot:
    """A place for one worker process."""

    index: int
    start_at: float
    child: Child | None = None
    young_deaths: int = 0


class Supervisor:
    """Runs ``processes`` copies of ``command`` until it is told to stop.

    ``report`` is called with what a worker has done, about once a second each; ``show`` with
    what workers write, if given (otherwise they inherit standard output and error). ``patient``
    keeps the supervisor waiting for `reload` when a worker refuses to start, rather than exit.
    """

    def __init__(
        self,
        command: Sequence[str],
        processes: int,
        patience: Patience | None = None,
        *,
        report: Callable[[Report], None] | None = None,
        show: Callable[[bytes], None] | None = None,
        patient: bool = False,
    ) -> None:
        self._command = list(command)
        self._patience = patience or Patience()
        self._report = report
        self._show = show
        self._patient = patient
        now = time.monotonic()
        self._slots = [_Slot(index, now) for index in range(processes)]
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._signals: list[int] = []
        self._deaf_until = 0.0
        self._draining_since: float | None = None
        self._stopping = False
        self._reload_wanted = False
        self._refusal: str | None = None
        self._status = DRAINED

    @property
    def refusal(self) -> str | None:
        """What the first worker that could not start said."""
        return self._refusal

    def reload(self) -> None:
        """Drain the workers and start new ones. From any thread."""
        self._reload_wanted = True
        self._wake()

    def run(self) -> int:
        """Supervise until a signal stops it; returns the exit status. On the main thread.

        However it ends, no worker process is left.
        """
        with self._handling_signals():
            try:
                self._selector.register(self._wake_read, selectors.EVENT_READ, self._woken)
                return self._supervise()
            finally:
                self._end_all()
                self._selector.close()
                os.close(self._wake_read)

    def _supervise(self) -> int:
        while True:
            self._start_due()
            for key, _ in self._selector.select(self._until_next()):
                key.data()
            if self._obey():
                return self._status
            self._bury_the_dead()
            self._end_the_hung()
            if self._stopping and not self._children():
                return self._status

    # --- signals and wishes

    @contextlib.contextmanager
    def _handling_signals(self) -> Iterator[None]:
        # SIGCHLD too: its handler does nothing, but the byte in the pipe ends the wait.
        before: dict[int, Any] = {
            number: signal.signal(number, self._note) for number in (*STOP_SIGNALS, signal.SIGCHLD)
        }
        wakeup = signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(self._wake_write)

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        now = time.monotonic()
        if number != signal.SIGCHLD and now >= self._deaf_until:
            self._signals.append(number)
            self._deaf_until = now + SAME_SIGNAL_S

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            os.write(self._wake_write, b"\0")

    def _woken(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(self._wake_read, 4096):
                pass

    def _obey(self) -> bool:
        """Do what signals and `reload` ask; True: stop at once."""
        while self._signals:
            number = self._signals.pop(0)
            if self._stopping:
                log.warning("%s again: stopping at once", signal.Signals(number).name)
                self._status = self._status or 128 + number
                return True
            self._stop(f"{signal.Signals(number).name}: draining")
        if self._reload_wanted:
            self._reload_wanted = False
            if not self._stopping:
                log.info("reloading: draining %d workers", len(self._children()))
                self._start_anew()
        return False

    def _stop(self, why: str) -> None:
        self._stopping = True
        log.info(
            "%s %d workers, for at most %g s", why, len(self._children()), self._patience.drain_s
        )
        self._drain()

    def _drain(self) -> None:
        self._draining_since = time.monotonic()
        for child in self._children():
            child.drain()

    def _start_anew(self) -> None:
        self._refusal = None
        for slot in self._slots:
            slot.young_deaths = 0
            slot.start_at = time.monotonic()
        self._drain()

    # --- life and death of workers

    def _children(self) -> Sequence[Child]:
        return [slot.child for slot in self._slots if slot.child is not None]

    def _start_due(self) -> None:
        if self._stopping or (self._draining_since is not None and self._children()):
            return
        self._draining_since = None
        now = time.monotonic()
        for slot in self._slots:
            if slot.child is None and slot.start_at <= now and self._refusal is None:
                self._start(slot, now)

    def _start(self, slot: _Slot, now: float) -> None:
        try:
            child = Child(slot.index, self._command, now, capture=self._show is not None)
        except OSError as error:
            # For now, it may be: no memory, no process left. The others work on meanwhile.
            slot.young_deaths += 1
            wait_s = self._backoff_s(slot.young_deaths)
            slot.start_at = now + wait_s
            log.error(  # noqa: TRY400 - it says enough
                "worker %d cannot be started: %s; again in %.2g s", slot.index + 1, error, wait_s
            )
            return
        slot.child = child
        self._selector.register(child.lifeline, selectors.EVENT_READ, lambda: self._hear(child))
        if child.output is not None:
            self._selector.register(
                child.output, selectors.EVENT_READ, lambda: self._read_output(child)
            )
        log.info("worker %d started (pid %d)", slot.index + 1, child.pid)

    def _hear(self, child: Child) -> None:
        starting = child.ready_at is None
        if not child.hear(time.monotonic()):
            self._selector.unregister(child.lifeline)
        if starting and child.ready_at is not None:
            log.info("worker %d (pid %d) works", child.slot + 1, child.pid)
        self._pass_on(child)

    def _read_output(self, child: Child) -> None:
        if self._show is not None and child.output and not child.read_output(self._show):
            self._selector.unregister(child.output)

    def _bury_the_dead(self) -> None:
        for slot in self._slots:
            if slot.child is not None and (status := slot.child.reap()) is not None:
                child, slot.child = slot.child, None
                self._hear_last_words(child)
                self._decide_after(slot, child, status)

    def _hear_last_words(self, child: Child) -> None:
        registered = self._selector.get_map()
        for source in (child.lifeline, child.output):
            if source is not None and source.fileno() in registered:
                self._selector.unregister(source)
        child.last_words(time.monotonic(), self._show or (lambda _: None))
        self._pass_on(child)
        child.close()

    def _pass_on(self, child: Child) -> None:
        if self._report is not None and child.counts:
            self._report(Report(child.slot, child.pid, child.counts))

    def _decide_after(self, slot: _Slot, child: Child, status: int) -> None:
        now = time.monotonic()
        who = f"worker {slot.index + 1} (pid {child.pid}) {how_it_ended(status)}"
        if self._stopping or self._draining_since is not None:
            log.info("%s", who)
            # One that was still starting had nothing to lose.
            if self._stopping and status != 0 and child.ready_at is not None:
                self._status = self._status or CUT_OFF
            return
        if child.refusal is not None or (status == REFUSED and child.ready_at is None):
            self._refused(child.refusal or f"{who} before it was ready")
            return
        healthy = child.ready_at is not None and now - child.ready_at >= self._patience.healthy_s
        slot.young_deaths = 0 if healthy else slot.young_deaths + 1
        wait_s = self._backoff_s(slot.young_deaths)
        if child.ready_at is not None:
            wait_s = min(wait_s, self._patience.longest_at_work_s)
        slot.start_at = now + wait_s
        log.warning("%s; another starts in %.2g s", who, wait_s)

    def _backoff_s(self, young_deaths: int) -> float:
        # The first death waits shortest; the exponent is capped because 2.0 ** 1100 overflows.
        grown = self._patience.first_backoff_s * 2.0 ** min(max(young_deaths - 1, 0), 64)
        return min(grown, self._patience.longest_backoff_s)

    def _refused(self, text: str) -> None:
        if self._refusal is None:
            self._refusal = text
            if self._patient:
                log.error("%s\nwaiting for a change", text)
            else:
                self._status = REFUSED
                self._stop("a worker cannot start: draining")

    def _end_the_hung(self) -> None:
        now = time.monotonic()
        for child in self._living():
            if now >= self._drained_until(child) and not self._was_just_ready(child, now):
                log.warning("worker %d (pid %d) did not drain: killed", child.slot + 1, child.pid)
                child.kill()
            elif now >= self._silent_until(child) and not self._was_only_unheard(child, now):
                log.error(
                    "worker %d (pid %d) %s for %.0f s: killed",
                    child.slot + 1, child.pid,
                    "starts" if child.ready_at is None else "is silent", now - self._since(child),
                )  # fmt: skip
                child.kill()

    def _living(self) -> Sequence[Child]:
        return [child for child in self._children() if not child.killed]

    def _was_only_unheard(self, child: Child, now: float) -> bool:
        # A supervisor that was itself stopped for a while comes back from a wait that timed
        # out, and finds the heartbeats of that time only when it looks.
        child.hear(now)
        return now < self._silent_until(child)

    def _drained_until(self, child: Child) -> float:
        if self._draining_since is None:
            return inf
        # What it imports may hang for ever. A worker that heard the signal begins no work.
        starting = child.ready_at is None
        patience = self._patience
        return self._draining_since + (
            min(patience.starting_drain_s, patience.drain_s) if starting else patience.drain_s
        )

    def _was_just_ready(self, child: Child, now: float) -> bool:
        if child.ready_at is None:
            child.hear(now)
        return now < self._drained_until(child)

    def _silent_until(self, child: Child) -> float:
        # While it starts it may import for long without running a thread of its own.
        starting = child.ready_at is None
        return self._since(child) + (
            self._patience.start_s if starting else self._patience.silence_s
        )

    def _since(self, child: Child) -> float:
        return child.started_at if child.ready_at is None else child.heard_at

    def _until_next(self) -> float | None:
        """Seconds until something is due by the clock; None: only an event changes anything."""
        due = [self._silent_until(child) for child in self._living()]
        if self._draining_since is not None:
            due += [self._drained_until(child) for child in self._living()]
        elif not self._stopping and self._refusal is None:
            due += [slot.start_at for slot in self._slots if slot.child is None]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _end_all(self) -> None:
        for child in self._children():
            child.kill()
        for slot in self._slots:
            if slot.child is not None:
                slot.child.process.wait()
                slot.child.close()
                slot.child = None

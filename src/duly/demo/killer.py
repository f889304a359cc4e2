"""`Killer`: SIGKILL for worker processes, aimed at those with work in their hands.

A victim is stopped first (SIGSTOP), so that what the database shows of it holds at the moment
of its death. One that turns out to stand elsewhere than aimed at is let go on.

The aim is where a crash costs most: an at-least-once consumer with claims in hand, an
at-most-once one just after it settled them, before its handler has run, and an exactly-once one
by turns inside its transaction and with claims outside of it, where effects that are committed
before their settlement would be caught.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from random import Random

from duly.consumer import Consumer
from duly.demo.book import Book, Kill
from duly.demo.evidence import READINGS
from duly.demo.gauge import Gauge, Holder
from duly.demo.journal import last_lines
from duly.demo.pace import Pace
from duly.guarantees import Guarantee

# Between two kills: a worker takes about so long to start, and a crew of the dead does no work.
GAP_S = 0.25
# So long a victim is looked for that stands where aimed at; as long again, one with claims of
# the consumer aimed at; then one with any.
AIM_S = 0.3
# Nobody had any work for so long: this kill is left out, so that publishing goes on.
GIVE_UP_S = 0.25
# A claim is settled within some milliseconds, or it waits for its turn to write.
SETTLE_S = 0.05
# Between two looks at the database. Claims live for milliseconds.
LOOK_S = 0.001
# A stopped process is at rest within microseconds, unless it waits for the disk.
REST_S = 0.05


class Content(Enum):
    """With what the killer is content, the longer it looks the less."""

    EXACT = auto()
    CLAIM_OF_THE_AIMED = auto()
    ANY_CLAIM = auto()


_CONTENT = tuple(Content)


@dataclass(frozen=True, slots=True)
class Plan:
    """Whom to aim at: ``consumers``, which handle ``messages`` each; ``seed`` rolls the dice."""

    messages: int
    consumers: Sequence[Consumer]
    seed: int


class Killer(threading.Thread):
    """Kills ``pace.kills`` workers in the course of the run, fewer where the work ends early."""

    def __init__(
        self,
        folder: Path,
        book: Book,
        pace: Pace,
        plan: Plan,
        is_published: Callable[[], bool],
    ) -> None:
        super().__init__(name="duly-demo-killer", daemon=True)
        self.kills: list[Kill] = []
        self.error: Exception | None = None
        self._folder = folder
        self._readings = folder / READINGS
        self._book = book
        self._pace = pace
        self._is_published = is_published
        self._messages = plan.messages * len(plan.consumers)
        self._random = Random(plan.seed)
        self._stopping = threading.Event()
        self._guarantees = {each.name: each.guarantee for each in plan.consumers}
        self._aims = dict.fromkeys(self._guarantees, 0)
        self._inside = True
        self._dead: set[str] = set()
        self._started_at = time.monotonic()

    def run(self) -> None:
        """Kill until all are killed or the work is over."""
        try:
            with contextlib.closing(Gauge(self._folder)) as gauge:
                for number in range(self._pace.kills):
                    self._wait_for_turn(gauge, number)
                    if self._is_over(gauge):
                        break
                    with self._pace.turn():
                        if kill := self._next(gauge):
                            self._note(number, kill)
                    self._stopping.wait(GAP_S)
        except Exception as error:  # noqa: BLE001 - raised again by whoever waits for this thread
            self.error = error
        finally:
            self._pace.let_go()

    def stop(self) -> None:
        """Kill nobody any more."""
        self._stopping.set()

    def _wait_for_turn(self, gauge: Gauge, number: int) -> None:
        """Wait until enough was handled, or all that the publisher gives out before this kill."""
        enough = self._pace.share_before(number) * self._messages
        while gauge.settled() < enough and not gauge.is_drained() and not self._stopping.is_set():
            self._stopping.wait(LOOK_S * 5)

    def _next(self, gauge: Gauge) -> Kill | None:
        """Kill one worker; None when none with work was to be found."""
        aim = self._aim()
        started_at = worked_at = time.monotonic()
        while not self._is_over(gauge) and time.monotonic() < worked_at + GIVE_UP_S:
            if not (self._pace.is_dry and gauge.is_drained()):
                worked_at = time.monotonic()
            aimed_for = int((time.monotonic() - started_at) / AIM_S)
            content = _CONTENT[min(aimed_for, len(_CONTENT) - 1)]
            wanted = self._living(gauge, None if content is Content.ANY_CLAIM else aim)
            if wanted and (kill := self._strike(gauge, self._random.choice(wanted), aim, content)):
                return kill
            self._stopping.wait(LOOK_S)
        return None

    def _aim(self) -> str:
        """A consumer that was aimed at least often so far."""
        least = min(self._aims.values())
        aim = self._random.choice([name for name, aims in self._aims.items() if aims == least])
        self._aims[aim] += 1
        self._inside = self._aims[aim] % 2 == 1
        return aim

    def _living(self, gauge: Gauge, consumer: str | None) -> Sequence[Holder]:
        """Who holds work of this consumer, or of any."""
        return [
            holder
            for holder in gauge.holders()
            if holder.worker not in self._dead and (consumer is None or consumer in holder.held)
        ]

    def _strike(self, gauge: Gauge, victim: Holder, aim: str, content: Content) -> Kill | None:
        """Stop the victim, look where it stands, and kill it or let it go on."""
        last: int | None = None
        exact = content is Content.EXACT
        if self._guarantees[aim] is Guarantee.AT_MOST_ONCE and exact:
            last = self._await_settlement(gauge, victim, aim)
            if last is None:
                return None
        if not _send(victim.pid, signal.SIGSTOP):
            return None
        _await_rest(victim.pid)
        held = gauge.held_by(victim.worker)
        writing = gauge.is_writing(victim.pid)
        struck = self._stands(gauge, aim, held, last, writing)
        enough = struck or (not exact and (aim in held or content is Content.ANY_CLAIM))
        if not held or not enough:
            _send(victim.pid, signal.SIGCONT)
            return None
        at_s = time.monotonic() - self._started_at
        _send(victim.pid, signal.SIGKILL)
        return Kill(at_s, victim.worker, aim if struck else None, held, writing)

    def _stands(
        self,
        gauge: Gauge,
        aim: str,
        held: Mapping[str, int],
        last: int | None,
        writing: bool | None,
    ) -> bool:
        """Whether the stopped victim stands where it was aimed at."""
        match self._guarantees[aim]:
            case Guarantee.AT_MOST_ONCE:
                settled = last is not None and aim not in held
                return settled and gauge.id_at(last or 0) not in last_lines(self._readings)
            case Guarantee.AT_LEAST_ONCE:
                return aim in held
            case Guarantee.EXACTLY_ONCE:
                return aim in held and writing is not (not self._inside)

    def _await_settlement(self, gauge: Gauge, victim: Holder, consumer: str) -> int | None:
        """The position of the last message of a claim that was just settled; None: not yet."""
        last = gauge.claimed_until(victim.worker, consumer)
        until = time.monotonic() + SETTLE_S
        while last is not None and time.monotonic() < until:
            if gauge.claimed_until(victim.worker, consumer) != last:
                return last
        return None

    def _note(self, number: int, kill: Kill) -> None:
        self._dead.add(kill.worker)
        self._book.note_kill(number, kill)
        self.kills.append(kill)

    def _is_over(self, gauge: Gauge) -> bool:
        # Published is asked first: what comes after that is in the log already.
        return self._stopping.is_set() or (self._is_published() and gauge.is_drained())


def _send(pid: int, number: signal.Signals) -> bool:
    """Send a signal to a worker; False where there is none of this number any more."""
    try:
        # Each worker leads a process group of its own: what does not is none of ours.
        if os.getpgid(pid) != pid:
            return False
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _await_rest(pid: int) -> None:
    """Wait until a stopped process stands still; without /proc, as long as that may take."""
    stat = Path(f"/proc/{pid}/stat")
    until = time.monotonic() + REST_S
    while time.monotonic() < until:
        with contextlib.suppress(OSError, IndexError):
            # The state follows the command's name, which may hold anything but a last ")".
            if stat.read_text(errors="replace").rpartition(")")[2].split()[0] in "Tt":
                return
        time.sleep(LOOK_S)

"""The simulated world: one thread, one clock, processes that are stepped in a random order.

At each *point* (before and after every call of the seam, between two statements of a handler,
between two steps) a process may die, stand still or be overtaken by others, which then run
nested on the same stack: what has begun ends only after they have paused. That is enough to
bring about every order in which a process is overtaken while it is in the middle of something.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from dataclasses import replace
from random import Random
from typing import Any, NoReturn, Protocol
from zlib import crc32

from duly.broker import Subscription
from duly.testing.faulty import make, possible
from duly.testing.history import Event, Fault
from duly.testing.recording import Recording, message_by_message
from duly.testing.seam import Call, inside
from duly.testing.simulation.kinds import LEASE_S, MAX_RUN_S, Clock, Place
from duly.testing.simulation.plan import Hit, Plan

DEADLY = ("crash", "vanish")
ANYWHERE = ("crash", "vanish", "pause")
TICKS_S = (0.0, 0.0, 0.01, 0.05, 0.2, 1.0)
# How many processes may be in the middle of something while another runs.
DEEPEST = 3


class Crash(BaseException):
    """A process dies here. No except clause of the code under test catches it by accident."""


class Actor(Protocol):
    """What a process does, step by step."""

    def step(self) -> float:
        """Do a little; returns the seconds until there is more to do."""
        ...

    def died(self, kind: str) -> None:
        """The process is gone: what the system frees by itself is freed."""
        ...

    def look(self) -> None:
        """What the process does beside its steps, as long as it is not standing still."""
        ...

    def holds(self) -> bool:
        """Whether it holds claims."""
        ...


class Process:
    """One process of the world: its points, its recorder, and whether it lives."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.number = crc32(name.encode())
        self.alive = True
        self.busy = False
        self.paused = False
        self.ended = False
        # Since when its handler hangs; what it does beside its steps goes on.
        self.hung_since: float | None = None
        self.replaced = False
        self.looking = False
        self.wake = 0.0
        self.points = 0
        self.last = "start"
        self.found_nothing = False
        self.sessions: dict[str, Any] = {}
        self.actor: Actor
        # Its own, as a process's is: the lanes say in a context variable what they run.
        self._context = copy_context()
        self.recording = Recording(world.events.append, world.clock, name, lambda: self.is_gone)
        self.around = inside(self.recording, self._around)
        # A claim is recorded when the broker makes it, whether or not its answer arrives.
        self._claim = inside(self._around, self.recording)

    @property
    def is_gone(self) -> bool:
        """Whether what it still does on its stack has not happened: it died, or hangs."""
        return not self.alive or (self.hung_since is not None and not self.looking)

    def point(self, name: str, more: tuple[str, ...] = ()) -> str | None:
        """Pass a point; returns a fault of ``more`` that hits there. Raises `Crash`."""
        if self.is_gone:
            raise Crash
        return self.world.point(self, name, more)

    def seam(self, call: Call, perform: Callable[[Any], Any]) -> Any:
        """What every call of this process goes through."""
        if call.name == "made ahead":
            return self.recording(call, perform)
        if call.name in ("settle", "settle in transaction"):
            given = call.given
            shown = replace(call, given=message_by_message(given))
            return self.around(shown, lambda _: perform(given))
        return (self._claim if call.name == "claim" else self.around)(call, perform)

    def _around(self, call: Call, perform: Callable[[Any], Any]) -> Any:
        if self.is_gone:
            if call.name == "rollback":
                return None  # the system has done it, or it is not done as long as it hangs
            raise Crash
        world = self.world
        kinds = possible(call, world.place.broker.capabilities) if world.faulty else ()
        self.last, self.found_nothing = call.name, False
        fault = self.point(f"{call.name}: before", tuple(k for k in kinds if k != "pause"))
        answer = make(fault, call, perform, world.order) if fault else perform(call.given)
        self._note(call, answer)
        self.found_nothing = call.name == "claim" and not answer and not call.is_made
        self.point(f"{call.name}{_kind_of(call, answer)}: after")
        return answer

    def _note(self, call: Call, answer: Any) -> None:
        if call.name == "begin":
            self.sessions[call.tx] = answer
        elif call.name in ("commit", "rollback"):
            self.sessions.pop(call.tx, None)

    def die(self, kind: str) -> NoReturn:
        """The process ends here and now."""
        self.alive = False
        for session in self.sessions.values():
            session.rollback()
        self.sessions.clear()
        self.actor.died(kind)
        raise Crash

    def hang(self) -> NoReturn:
        """Nothing of its step ever goes on: unwound here, and its sessions stay open."""
        self.world.record_fault(self, "hang", "handler: in the middle")
        self.hung_since = self.world.clock.now
        raise Crash

    def step(self) -> None:
        """Let it do a little."""
        self.busy = True
        outer, self.world.acting = self.world.acting, self
        try:
            self.wake = self.world.clock.now + self._context.run(self.actor.step)
        except Crash:
            pass  # it died, or it hangs
        finally:
            self.busy = False
            self.world.acting = outer

    def look(self) -> None:
        """Let it do what it does beside its steps. Where it dies of it, a step of it that is
        under way ends at its next point.
        """
        self.looking = True
        outer, self.world.acting = self.world.acting, self
        try:
            self.actor.look()
        except Crash:
            pass
        finally:
            self.looking = False
            self.world.acting = outer


def _kind_of(call: Call, answer: Any) -> str:
    """What makes this call another crash point than its like."""
    if call.name == "claim":
        if not answer:
            return " of nothing"
        return (
            " of a suspect" if answer[0].alone else " of a retry" if answer[0].attempt > 1 else ""
        )
    if call.name in ("settle", "settle in transaction"):
        kinds = {type(each).__name__ for each in call.given}
        for kind in ("Dead", "Retry", "Release"):
            if kind in kinds:
                return f" of {kind}"
    return ""


class World:
    """Everything that a schedule consists of. ``trace`` tells one from another."""

    def __init__(self, place: Place, plan: Plan, seed: int, preempt: float) -> None:
        self.place = place
        self.plan = plan
        self.order = Random(seed)
        self.clock: Clock
        self.preempt = preempt
        self.events: list[Event] = []
        self.processes: list[Process] = []
        self.hits: list[Hit] = []
        self.reached: Counter[str] = Counter()
        self.crashed: Counter[str] = Counter()
        self.points: Counter[str] = Counter()
        self.trace = 0
        self.faulty = True
        # Whose step or look is being made, and whether it can only go on or die.
        self.acting: Process | None = None
        self.only_deaths = False
        # Lanes of processes that fell silent, and when that is noticed by those who look.
        self.silent: list[tuple[float, Subscription]] = []
        self._depth = 0

    # --- points

    def on_loop_is(self, running: bool) -> None:
        """Whether what happens now happens on an event loop: no other can run meanwhile."""
        self.only_deaths = running

    def inside_a_call(self, name: str) -> None:
        """The place says that it is in the middle of a call that some process makes.

        It may die there. It does not stand still: what it was given is recorded once it has it,
        which others would then have before.
        """
        if self.acting is not None:
            outer, self.only_deaths = self.only_deaths, True
            try:
                self.acting.point(name)
            finally:
                self.only_deaths = outer

    def point(self, process: Process, name: str, more: tuple[str, ...]) -> str | None:
        """A process passes a point."""
        process.points += 1
        self.trace = hash((self.trace, process.number, _number_of(name)))
        if self.faulty:
            self.points[process.name] = process.points
            self.reached[name] += 1
            kinds = DEADLY if self.only_deaths else ANYWHERE + more
            kind = self.plan.fault(process.name, process.points, kinds)
            if kind is not None:
                return self._hit(process, name, kind)
        if self.preempt and not self.only_deaths and self.order.random() < self.preempt:
            self._overtake(process, self.order.randint(1, 4))
        return None

    def _hit(self, process: Process, name: str, kind: str) -> str | None:
        self.hits.append(Hit(process.name, process.points, kind))
        self.trace = hash((self.trace, _number_of(kind)))
        self.record_fault(process, kind, name)
        if kind in DEADLY:
            process.die(kind)
        if kind == "pause":
            self._stand_still(process)
            return None
        return kind

    def record_fault(self, process: Process, kind: str, point: str) -> None:
        """A fault hits a process."""
        if kind in DEADLY:
            self.crashed[point] += 1
        self.events.append(Fault(self.clock.now, process.name, kind, point))

    def _stand_still(self, process: Process) -> None:
        """Nothing of the process goes on until its leases are over and others had their turn."""
        process.paused = True
        for _ in range(6):
            self.clock.now += LEASE_S / 4
            self._overtake(process, 3)
        process.paused = False
        if not process.alive:
            raise Crash

    def _overtake(self, process: Process, steps: int) -> None:
        if self._depth >= DEEPEST or self.is_locked():
            return
        self._depth += 1
        before = self.clock.now
        try:
            for _ in range(steps):
                self.tick()
            while self.is_locked():
                self.tick()  # whoever was overtaken would wait for the file, for real
        finally:
            self._depth -= 1
        if not process.paused and self.clock.now - before > LEASE_S / 3:
            # So long that a lease may have ended which nothing could renew: inside a claim.
            self.record_fault(process, "overtaken", "")
        if not process.alive:
            raise Crash

    def is_locked(self) -> bool:
        """Whether a process is inside a transaction that keeps all others out."""
        return self.place.locks and any(process.sessions for process in self.processes)

    # --- time

    def tick(self) -> None:
        """A little time passes and one process takes a step."""
        self.clock.now += self.order.choice(TICKS_S)
        self._end_the_hung()
        if not self.is_locked():
            for process in self.processes:
                if process.alive and not process.paused and not process.ended:
                    process.look()
        now = self.clock.now
        free = [
            p
            for p in self.processes
            if p.alive and p.hung_since is None and not (p.busy or p.paused or p.ended)
        ]
        if self.is_locked():
            free = [process for process in free if process.sessions]  # the others would wait
        ready = [process for process in free if process.wake <= now]
        if not ready and free and self._depth == 0:
            first = min(free, key=lambda process: process.wake)
            self.clock.now = max(now, first.wake)
            ready = [first]
        if ready:
            process = ready[0] if len(ready) == 1 else self.order.choice(ready)
            self.trace = hash((self.trace, process.number))
            process.step()

    def _end_the_hung(self) -> None:
        """A supervisor ends who hangs. Where its claims are what holds its messages nobody does,
        for their leases end as well.
        """
        for process in self.processes:
            since = process.hung_since
            if not process.alive or since is None or self.clock.now - since <= MAX_RUN_S:
                continue
            if process.sessions or not process.actor.holds():
                self.record_fault(process, "crash", "the hung is ended")
                with suppress(Crash):
                    process.die("crash")

    def expire_silent(self) -> None:
        """Processes that have been silent for a lease are taken for dead."""
        if not self.silent:
            return
        late = [lane for until, lane in self.silent if until <= self.clock.now]
        self.silent = [each for each in self.silent if each[0] > self.clock.now]
        for lane in late:
            self.place.bury(lane)


_numbers: dict[str, int] = {}


def _number_of(name: str) -> int:
    # Not hash(): that of a str differs from process to process.
    number = _numbers.get(name)
    if number is None:
        number = _numbers[name] = crc32(name.encode())
    return number

"""The processes of one round: started again when they end, until told otherwise."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from duly.testing.chaos.processes import KILLED, Child, Nursery
from duly.testing.history import Fault, Recorder

# Where a server is down many would start again and again, and keep it from coming up.
PATIENCE_S = 0.5
# A worker that could not drain in time says 1, as duly's own worker process does; one that was
# only being started has no handler of SIGTERM yet.
GOOD_ENDS = (0, 1, KILLED, -signal.SIGTERM)


@dataclass(slots=True)
class Member:
    """One place in the crowd, and who holds it now."""

    role: str
    orders: dict[str, Any]
    starts: int = 0
    who: str = ""
    number: int = 0
    child: Child | None = None
    stopped: bool = False
    seen_ended: bool = True
    done: bool = False
    not_before_s: float = 0.0

    def may_start(self) -> bool:
        """Whether it did not end just now for want of what it needs, as a supervisor waits."""
        return time.monotonic() >= self.not_before_s

    @property
    def is_running(self) -> bool:
        """Whether a process of it is there."""
        return self.child is not None and not self.child.ended.is_set()


@dataclass(slots=True)
class Crowd:
    """Workers and publishers of one round. ``sites``: the URLs of both places, by the number of a
    process.
    """

    nursery: Nursery
    folder: Path
    members: list[Member]
    recorder: Recorder
    sites: Callable[[int], tuple[str, str]]
    counts: Counter[str] = field(default_factory=Counter)
    complaints: list[str] = field(default_factory=list)
    _pause: threading.Event = field(default_factory=threading.Event)

    def tend(self, *, restart: bool = True) -> None:
        """Note who has ended, and start them again."""
        for number, member in enumerate(self.members):
            child = member.child
            if child is not None and child.ended.is_set() and not member.seen_ended:
                self._ended(member, child)
            if restart and not member.is_running and not member.done and member.may_start():
                self.start(member, f"{member.role[0]}{number}")

    def start(self, member: Member, place: str) -> None:
        """Start a process of a member, under a name that no other ever had."""
        member.starts += 1
        number = member.number = sum(each.starts for each in self.members)
        member.who = f"{place}.{member.starts}"
        member.child = self.nursery.start(
            {
                "role": member.role,
                "who": member.who,
                "folder": str(self.folder),
                "sites": self.sites(number),
                "log": str(self.folder / "logs" / f"{member.who}.log"),
                **member.orders,
            }
        )
        member.seen_ended = member.stopped = False

    def _ended(self, member: Member, child: Child) -> None:
        member.seen_ended = True
        if child.status == 1:
            member.not_before_s = time.monotonic() + PATIENCE_S
        if child.status == KILLED:
            # From here on nothing of it can come.
            self.fault("crash", "gone", member.who)
            return
        if child.status not in GOOD_ENDS:
            self.complaints.append(f"{member.who} ended with {child.status}:\n{_last(child)}")
        if child.status == -signal.SIGTERM:
            self.fault("crash", "gone", member.who)
        # A publisher ends by itself when it has done what it was asked to.
        member.done = member.role in ("publisher", "stranger") and child.status == 0

    # --- what befalls them

    def fault(self, kind: str, point: str, who: str = "world") -> None:
        """Record a fault, now."""
        self.recorder.record(Fault(self.recorder.clock(), who, kind, point))

    def any_running(self, random: Random, role: str) -> Member | None:
        """Somebody of a role who runs and is not stopped."""
        return self.anyone(random, lambda member: member.role == role)

    def anyone(self, random: Random, like: Callable[[Member], bool]) -> Member | None:
        """Somebody like this who runs and is not stopped."""
        found = [m for m in self.members if m.is_running and not m.stopped and like(m)]
        return random.choice(found) if found else None

    def pids(self) -> Sequence[int]:
        """Everybody who runs."""
        return [m.child.pid for m in self.members if m.is_running and m.child is not None]

    def kill(self, member: Member) -> None:
        """SIGKILL, whatever it is doing."""
        assert member.child is not None, "it runs"
        self.fault("crash", "killed", member.who)
        member.child.kill()
        self.counts[f"kill {member.role}"] += 1

    def stop(self, member: Member) -> None:
        """SIGSTOP: it stands still, and holds what it holds."""
        assert member.child is not None, "it runs"
        member.stopped = True
        member.child.signal(signal.SIGSTOP)

    def newly_stopped(self) -> Sequence[Member]:
        """Those whom a message has stopped."""
        found = []
        for member in self.members:
            child = member.child
            if child is not None and member.is_running and not member.stopped:
                member.stopped = child.is_stopping()
                found += [member] if member.stopped else []
        return found

    def go_on(self, member: Member) -> None:
        """SIGCONT."""
        if member.child is not None and member.stopped:
            member.stopped = False
            member.child.signal(signal.SIGCONT)

    def drain(self, member: Member) -> None:
        """SIGTERM: it ends what it has begun."""
        assert member.child is not None, "it runs"
        self.fault("drain", "SIGTERM", member.who)
        member.child.signal(signal.SIGTERM)
        self.counts["drain"] += 1

    def end(self, timeout_s: float) -> None:
        """Let everybody go on, and end."""
        for member in self.members:
            self.go_on(member)
            if member.is_running and member.child is not None:
                member.child.signal(signal.SIGTERM)
        until = time.monotonic() + timeout_s
        while self.pids() and time.monotonic() < until:
            for member in self.newly_stopped():
                self.go_on(member)  # by what it had before it, a zombie, when it went on
            self._pause.wait(0.02)
        for member in self.members:
            if member.is_running and member.child is not None:
                self.complaints.append(f"{member.who} does not end:\n{_last(member.child)}")
                member.child.kill()
        self.tend(restart=False)

    def kill_all(self) -> None:
        """Nobody is left after this."""
        for member in self.members:
            if member.is_running and member.child is not None:
                member.child.signal(signal.SIGCONT)
                member.child.kill()


def _last(child: Child) -> str:
    return "".join(child.said().splitlines(keepends=True)[-12:])

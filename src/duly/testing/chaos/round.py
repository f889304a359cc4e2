"""One round: a crowd at work on new files, faults for a while, then rest and the last reading."""

from __future__ import annotations

import heapq
import itertools
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

from duly.testing.chaos import surroundings
from duly.testing.chaos.crowd import Crowd, Member
from duly.testing.chaos.disk import Disk, disk_at
from duly.testing.chaos.processes import Child, Nursery
from duly.testing.chaos.reading import is_drained, prepare
from duly.testing.chaos.recorded import is_busy
from duly.testing.chaos.setup import LASTING, NODE_LOG, ON_A_NODE, SERVER_LOG, STRIKES, Setup
from duly.testing.chaos.site import Database, Site, database_of, site_of
from duly.testing.chaos.workload import (
    ATTEMPTS,
    LEASE_S,
    LONGEST_BACKOFF_S,
    OF_A_LOG,
    SPECS,
)
from duly.testing.history import Heal, Recorder

LET_GO = 0.8
FULL_S = (0.3, 1.0)
HELD_S = (0.3, 1.5)
HOUR_S = 3600
DOWN_S = (0.0, 0.8)
# Within this everything that is left has to be done: leases, retries of what kills its worker,
# and what two cores need for it.
REST_S = 3 * LEASE_S + ATTEMPTS * (LEASE_S + LONGEST_BACKOFF_S) + 90.0
LOOK_S = 0.02
BEGINS_S = 60.0

Act = Callable[[], None]


@dataclass(slots=True)
class Played:
    """What became of a round, before it is judged."""

    folder: Path
    seconds: float
    struck: dict[str, int]
    complaints: list[str]


class Round:
    """A round, played in ``folder``; all that is random in it comes from ``seed``.

    ``setup`` says where messages and effects are, ``name`` names the round's schemas there.
    ``on_disk``: what is synced, or what may be full. ``without`` are strikes to leave out.
    ``before`` is called in every process first, ``package.module:function``.
    """

    def __init__(
        self,
        nursery: Nursery,
        folder: Path,
        seed: int,
        *,
        setup: Setup,
        name: str,
        faults_s: float,
        on_disk: Literal["real", "small", "limited"],
        without: Collection[str] = (),
        before: str | None = None,
    ) -> None:
        self._nursery = nursery
        self._setup = setup
        self._name = name
        self._folder = folder
        self._seed = seed
        self._faults_s = faults_s
        self._on_disk = on_disk
        self._without = without
        self._before = before
        self._random = Random(seed)
        self._later: list[tuple[float, int, Act]] = []
        self._owed: list[str] = []
        self._aiming: list[str] = []
        self._numbers = itertools.count()
        self._disk: Disk | None = None
        self._full = False
        self._clock_s = 0
        self._files = folder / "files"
        self._home: Site
        self._apart: Database
        self._pause = threading.Event()

    def play(self) -> Played:
        """Play it to its end; what is left in the folder is to be judged."""
        began = time.monotonic()
        for name in ("histories", "logs", *(f"read/{spec.name}" for spec in (*SPECS, *OF_A_LOG))):
            (self._folder / name).mkdir(parents=True)
        with ExitStack() as stack:
            if self._on_disk != "real":
                self._files = self._folder / "disk"
                mount = self._on_disk == "small"
                self._disk = stack.enter_context(disk_at(self._files, mount=mount))
            self._files.mkdir(exist_ok=True)
            home, apart = self._setup.sites_at_rest(self._files, self._name)
            self._home, self._apart = site_of(home), database_of(apart)
            self._prepare()
            recorder = stack.enter_context(Recorder(self._folder / "histories", "world"))
            crowd = Crowd(
                self._nursery, self._folder, self._members(), recorder, self._sites_of_process
            )
            self._hear_of_the_server(crowd)
            stack.callback(crowd.kill_all)
            self._strike_for_a_while(crowd)
            self._heal(crowd)
            self._rest(crowd)
            crowd.end(20.0)
            self._read(crowd)
            if self._files.name == "disk":
                # The disk goes, its files stay to be looked at.
                shutil.copytree(self._files, self._folder / "files", ignore=_fillers)
        return Played(self._folder, time.monotonic() - began, dict(crowd.counts), crowd.complaints)

    def _prepare(self) -> None:
        node = self._setup.node
        if node is not None:
            node.sweep()
        prepare(self._home, self._apart, self._folder)
        if node is not None:
            node.settle()

    def drop(self) -> None:
        """Remove what does not go with the folder."""
        self._home.drop()
        self._apart.drop()
        if self._setup.node is not None:
            self._setup.node.drop(self._name)

    def _sites_of_process(self, number: int) -> tuple[str, str]:
        return self._setup.sites(self._files, self._name, number)

    def _hear_of_the_server(self, crowd: Crowd) -> None:
        def tell(kind: str, point: str) -> None:
            crowd.fault(kind, point)
            crowd.counts[kind] += kind in STRIKES

        for each in (self._setup.server, self._setup.node):
            if each is not None:
                each.said()  # what it said before is no matter of this round
                each.tell = tell

    def _members(self) -> list[Member]:
        orders = {"seed": self._seed, "pause_s": 0.03, "before": self._before}
        return [
            *(Member("worker", {**orders, "apart": False}) for _ in range(3)),
            *(Member("worker", {**orders, "apart": True}) for _ in range(2)),
            *(Member("publisher", {**orders, "publisher": number}) for number in range(2)),
        ]

    # --- faults

    def _strike_for_a_while(self, crowd: Crowd) -> None:
        kinds = self._kinds_in_order()
        self._wait_for_work(crowd)
        until = time.monotonic() + self._faults_s
        next_at = time.monotonic() + 0.7
        while time.monotonic() < until:
            crowd.tend()
            self._look_after_the_stopped(crowd)
            self._do_what_is_due()
            self._shoot(crowd)
            if time.monotonic() >= next_at:
                self.strike_in_turn(crowd, kinds)
                next_at = time.monotonic() + self._random.uniform(*self._setup.pace_s)
            self._pause.wait(LOOK_S)

    def _shoot(self, crowd: Crowd) -> None:
        """Strike those who are in the middle of something, where that is waited for."""
        aiming, self._aiming = self._aiming, []
        for kind in aiming:
            # Stopped in a transaction, it would keep others from its rows until it goes on.
            like = self._is_amidst if kind == "kill worker" else self._is_amidst_without_rows
            member = crowd.anyone(self._random, like)
            if member is None:
                self._aiming.append(kind)
            elif kind == "kill worker":
                crowd.kill(member)
            else:
                crowd.stop(member)
                crowd.fault("stop", "SIGSTOP", member.who)
                self._go_on_later(crowd, member)

    def _is_amidst(self, member: Member) -> bool:
        return member.role == "worker" and is_busy(self._folder, member.who)

    def _is_amidst_without_rows(self, member: Member) -> bool:
        return self._is_amidst(member) and not member.orders["apart"]

    def _wait_for_work(self, crowd: Crowd) -> None:
        """Until every publisher has published something, however long that takes here: before that
        there is little to strike.
        """
        numbers = [m.orders["publisher"] for m in crowd.members if m.role == "publisher"]
        begun = [self._folder / f"progress-{number}" for number in numbers]
        until = time.monotonic() + BEGINS_S
        crowd.tend()
        while not all(map(Path.exists, begun)) and time.monotonic() < until:
            crowd.tend()
            self._pause.wait(LOOK_S)

    def strike_in_turn(self, crowd: Crowd, kinds: Iterator[str]) -> None:
        """The next kind, and before it what could not be done when its turn was."""
        owed, self._owed = self._owed, []
        for kind in (*owed, *itertools.islice(kinds, 1)):
            if not self._strike(crowd, kind) and kind not in self._owed:
                self._owed.append(kind)

    def _kinds_in_order(self) -> itertools.chain[str]:
        """Every kind once, in any order, so that each has its turn; then as the odds say."""
        strikes = self._setup.strikes(self._without)
        if self._disk is None:
            strikes.pop("full disk", None)
        kinds, odds = list(strikes), list(strikes.values())
        first = self._random.sample(kinds, len(kinds))
        turns = itertools.count() if kinds else ()
        endless = (self._random.choices(kinds, odds)[0] for _ in turns)
        return itertools.chain(first, endless)

    def _strike(self, crowd: Crowd, kind: str) -> bool:
        """False: not now, but soon."""
        random = self._random
        match kind:
            case "kill worker" | "pause" if self._setup.takes_aim:
                self._aiming.append(kind)
            case "kill worker" | "kill publisher":
                member = crowd.any_running(random, kind.removeprefix("kill "))
                if member is None:
                    return False
                crowd.kill(member)
            case "pause":
                return self._stop_one(crowd)
            case "drain":
                member = crowd.any_running(random, "worker")
                if member is None:
                    return False
                crowd.drain(member)
            case "clock":
                self._clock_s = random.choice((-HOUR_S, 0, HOUR_S))
                surroundings.step(self._folder / "clock", self._clock_s)
                crowd.fault("clock", f"now {self._clock_s:+} s")
                crowd.counts["clock"] += 1
            case "lock":
                self._hold_lock(crowd)
            case "full disk":
                self._fill(crowd)
            case _ if kind in ON_A_NODE:
                return self._strike_node(crowd, kind)
            case _:
                return self._strike_server(crowd, kind)
        return True

    def _strike_node(self, crowd: Crowd, kind: str) -> bool:
        node = self._setup.node
        assert node is not None, "only a run with a node has such strikes"
        done = node.strike(kind, self._random)
        # Whatever goes on for a while is counted here; the rest is told when it hits.
        crowd.counts[kind] += done and kind in LASTING
        return done

    def _strike_server(self, crowd: Crowd, kind: str) -> bool:
        server, random = self._setup.server, self._random
        assert server is not None, "only a run with a server has such strikes"
        match kind:
            case "kill server" | "immediate shutdown":
                done = server.take_down(kind, random.uniform(*DOWN_S))
                crowd.counts[kind] += done
                return done
            case "end session":
                return server.end_a_session(random)
            case "cut before COMMIT" | "cut after COMMIT":
                server.cut("before COMMIT" if "before" in kind else "after COMMIT")
            case _:
                raise ValueError(f"{kind!r} is no strike")
        return True

    def _stop_one(self, crowd: Crowd) -> bool:
        member = crowd.any_running(self._random, "worker")
        if member is None:
            return False
        crowd.stop(member)
        server = self._setup.server
        # In the middle of a transaction it keeps others from what it holds until it goes on. That
        # is to be seen too, but it shows nothing of whoever is overtaken.
        if server and server.is_held_by(member.number) and self._random.random() < LET_GO:
            crowd.go_on(member)
            return False
        crowd.fault("stop", "SIGSTOP", member.who)
        self._go_on_later(crowd, member)
        return True

    def _go_on_later(self, crowd: Crowd, member: Member) -> None:
        crowd.counts["pause"] += 1
        who = member.who

        def go_on() -> None:
            if member.who == who:
                crowd.fault("go on", "SIGCONT", who)
                crowd.go_on(member)

        self._after(self._setup.pause_s, go_on)

    def _look_after_the_stopped(self, crowd: Crowd) -> None:
        for member in crowd.newly_stopped():
            self._go_on_later(crowd, member)

    def _hold_lock(self, crowd: Crowd) -> None:
        hold_s = self._random.uniform(*HELD_S)
        apart = self._random.random() < self._setup.locked_apart
        stranger = Member("stranger", {"hold_s": hold_s, "apart": apart})
        crowd.members.append(stranger)
        crowd.start(stranger, f"s{len(crowd.members)}")
        crowd.counts["lock"] += 1

    def _fill(self, crowd: Crowd) -> None:
        disk = self._disk
        if disk is None or self._full:
            return
        crowd.fault("fill", "the disk is full")
        self._full = True
        victims = crowd.pids()
        disk.fill(victims)
        crowd.counts["full disk"] += 1

        def make_room() -> None:
            self._full = False
            disk.make_room(victims)
            crowd.fault("room", "the disk has room")

        self._after(self._random.uniform(*FULL_S), make_room)

    def _after(self, seconds: float, act: Act) -> None:
        heapq.heappush(self._later, (time.monotonic() + seconds, next(self._numbers), act))

    def _do_what_is_due(self, *, all_of_it: bool = False) -> None:
        while self._later and (all_of_it or self._later[0][0] <= time.monotonic()):
            heapq.heappop(self._later)[2]()

    # --- rest

    def _heal(self, crowd: Crowd) -> None:
        """The faults are over; what was begun is finished, and nothing new begun."""
        self._do_what_is_due(all_of_it=True)
        for each in (self._setup.server, self._setup.node):
            if each is not None:
                each.heal()
        for member in crowd.members:
            crowd.go_on(member)
        # Beyond every time that anything was told to wait for.
        surroundings.step(self._folder / "clock", HOUR_S + 60)
        (self._folder / "stop").touch()
        crowd.recorder.record(Heal(crowd.recorder.clock(), "world"))

    def _rest(self, crowd: Crowd) -> None:
        until = time.monotonic() + REST_S + self._setup.more_rest_s
        look: Future[bool] | None = None
        # On a thread: whoever stands still may hold the file, and has to be let go on.
        with ThreadPoolExecutor(1) as thread:
            while time.monotonic() < until:
                crowd.tend()
                # What stops its worker may be handled only now.
                self._look_after_the_stopped(crowd)
                self._do_what_is_due()
                # Who stands still may have something to give back that nobody sees.
                all_move = not any(member.stopped for member in crowd.members)
                if look is not None and look.done():
                    if look.result() and all_move:
                        return
                    look = None
                published = all(m.done for m in crowd.members if m.role == "publisher")
                if look is None and published and all_move:
                    look = thread.submit(self._is_drained)
                self._pause.wait(0.1)
            # The checker says what is stuck; nobody keeps the file from who looks at it.
            self._do_what_is_due(all_of_it=True)

    def _is_drained(self) -> bool:
        self._count(at_rest=False)
        return is_drained(self._home, self._apart, self._folder)

    def _count(self, *, at_rest: bool) -> None:
        """Let whoever looks know what only the node tells."""
        if self._setup.node is not None:
            self._setup.node.tell_of(self._name, self._folder, at_rest=at_rest)

    def _read(self, crowd: Crowd) -> None:
        self._count(at_rest=True)
        for log, each in ((SERVER_LOG, self._setup.server), (NODE_LOG, self._setup.node)):
            if each is not None:
                (self._folder / log).write_text(each.said())
        reader = Member("reader", {})
        crowd.sites = lambda _: self._setup.sites_at_rest(self._files, self._name)
        crowd.start(reader, "reader")
        child: Child | None = reader.child
        assert child is not None, "it was started"
        if child.wait(60.0) != 0:
            crowd.complaints.append(f"what is there could not be read:\n{child.said()}")


def _fillers(_folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name == "filler"]

"""Processes that work partitions one after the other and die, by chance, with no cluster: what the
group is told is a text, and who takes over reads it.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from duly.brokers.kafka.choice import Choice
from duly.brokers.kafka.ending import Ending, Endings, apply
from duly.brokers.kafka.fetched import unknown
from duly.brokers.kafka.held import Taken
from duly.brokers.kafka.item import Item
from duly.brokers.kafka.notes import as_text, in_text
from duly.brokers.kafka.runs import Claim
from duly.brokers.kafka.share import Order, Share
from duly.guarantees import Dead, Done, Release, Retry, Settlement

ATTEMPTS = 3
A_LOT = 1 << 30
LEASE_S = 30.0
KEY_LANES = 3

_tokens = itertools.count(1)
_generations = itertools.count(1)

Place = tuple[int, int]
"""A partition, and an offset."""


@dataclass
class World:
    """What outlives processes. ``there`` are the offsets of each partition. ``killers`` end their
    process when they are started, ``hangers`` never come back.
    """

    roll: random.Random
    order: Order
    there: Mapping[int, Sequence[int]]
    keys: int = 0
    killers: set[Place] = field(default_factory=set)
    hangers: set[Place] = field(default_factory=set)
    transacted: bool = False
    told: dict[int, tuple[int, str]] = field(default_factory=dict)
    now: float = 1000.0
    started: set[Place] = field(default_factory=set)
    settled: dict[Place, str] = field(default_factory=dict)
    # What may be charged: failures, and deaths with nothing beside it.
    charges: dict[Place, int] = field(default_factory=dict)
    commits: int = 0
    claims: int = 0
    deaths: int = 0
    handled: list[Place] = field(default_factory=list)

    def __post_init__(self) -> None:
        for partition in self.there:
            self.told.setdefault(partition, (0, ""))

    @property
    def is_over(self) -> bool:
        return len(self.settled) == sum(map(len, self.there.values()))

    def item(self, offset: int) -> Item:
        found = Item(unknown("t"), offset, 0, b"x")
        key = f"k{offset % self.keys}" if self.keys else None
        found.message = unknown("t").message(b"x", source="s", key=key)
        return found

    def death(self, life: Life) -> None:
        """The process is gone, with what it held."""
        self.deaths += 1
        held = [(n, o) for n, share in life.shares.items() for o in share.claimed]
        if len(held) == 1:
            self.charges[held[0]] = self.charges.get(held[0], 0) + 1


class Died(Exception):
    """This process is no more."""


@dataclass
class Work:
    """What a lane has claimed, and how far it is with that."""

    items: list[tuple[int, Share, Item, int]]
    next: int = 0
    hangs: bool = False
    first: set[Place] = field(default_factory=set)


class Life:
    """One process with so many lanes, which claim up to ``limit`` at once."""

    def __init__(self, world: World, lanes: int = 1, limit: int = 100) -> None:
        self.world = world
        self.limit = limit
        self.shares: dict[int, Share] = {}
        for partition, (position, text) in world.told.items():
            notes = in_text(text, position)
            name = (f"t{partition}", 0)
            self.shares[partition] = Share(
                name, "log", next(_generations), world.order, position, notes, KEY_LANES
            )
        self._numbers = {id(share): n for n, share in self.shares.items()}
        names = {share.name: share for share in self.shares.values()}
        declared = {share.name[0]: unknown("t") for share in self.shares.values()}
        intake: Any = SimpleNamespace(
            shares=names,
            again="again",
            key_lanes=KEY_LANES,
            lanes={*range(lanes)},
            fetched=SimpleNamespace(declared=declared),
        )
        self.choices = [Choice(intake, declared.keys(), as_runs=False) for _ in range(lanes)]
        self.work: list[Work | None] = [None] * lanes

    # --- what it does

    def fetch(self, partition: int, count: int) -> None:
        share, world = self.shares[partition], self.world
        there = [o for o in world.there[partition] if o >= share.next]
        for offset in there[:count]:
            left_ms = share.left_ms(offset, int(world.now * 1000))
            share.feed(world.item(offset), world.now + left_ms / 1000 if left_ms else None)
        if len(there) <= count:
            share.reached(max(share.next, world.there[partition][-1] + 1))

    def fetch_all(self) -> None:
        for partition, offsets in self.world.there.items():
            self.fetch(partition, len(offsets))

    def claim(self, lane: int) -> Work | None:
        """As a lane does: what is about to start is told before it is."""
        assert self.work[lane] is None
        world = self.world
        taken = Taken(Claim(next(_tokens), lane, world.now + LEASE_S))
        self.choices[lane].take(taken, self.limit, A_LOT, world.now)
        if not taken:
            return None
        world.claims += 1
        for share, offset in taken.ends():
            share.announce(offset)
        for share in {share.generation: share for share in taken.untold()}.values():
            self._commit(share)
        items = [(self._numbers[id(s)], s, item, item.token) for s, item in taken.items]
        self.work[lane] = work = Work(items)
        alone = [s for _, s, item, _ in items if item.suspect and s.suspects.come_alone]
        assert not alone or len(items) == 1, "it comes alone"
        return work

    def start(self, lane: int) -> None:
        """Start the next one of what the lane has. Raises `Died`."""
        work, world = self.work[lane], self.world
        assert work is not None
        number, share, item, token = work.items[work.next]
        work.next += 1
        if item.token != token:
            return  # its lease is over
        place = (number, item.offset)
        self._check(place, share, item)
        if attempt_of(item) > ATTEMPTS:
            return
        if place not in world.started:
            work.first.add(place)
        world.started.add(place)
        world.handled.append(place)
        if place in world.killers:
            raise Died
        work.hangs = place in world.hangers

    def _check(self, place: Place, share: Share, item: Item) -> None:
        world = self.world
        position, text = world.told[place[0]]
        notes = in_text(text, position)
        assert place not in world.settled
        assert notes.extent.covers(item.offset), "who takes over knows that it may have run"
        assert item.repeated or place not in world.started, "it is marked"
        if place not in world.hangers:
            charges = world.charges.get(place, 0)
            assert attempt_of(item) <= 1 + charges, "an innocent one is charged"
        if item.alone:
            held = [o for each in self.shares.values() for o in each.claimed]
            assert held == [item.offset], "it is alone in its process"

    def end(self, lane: int) -> None:
        """Settle what the lane has, by chance otherwise than well."""
        work, world = self.work[lane], self.world
        assert work is not None
        self.work[lane] = None
        ended: list[Ending] = []
        stops: set[int] = set()
        for at, (number, share, item, token) in enumerate(work.items):
            if item.token != token:
                continue
            settlement: Settlement = self._settlement(item, (number, item.offset))
            started = at < work.next
            if not started or (world.order is not Order.NONE and number in stops):
                settlement = Release(0, started)
            if isinstance(settlement, Retry) and not settlement.charged:
                # It could not be read, and did not run.
                world.started -= {(number, item.offset)} & work.first
            if not isinstance(settlement, Done | Dead):
                stops.add(number)
            ended.append(Ending(settlement, share, item, token))
        self._settle(ended)

    def _settlement(self, item: Item, place: Place) -> Settlement:
        if attempt_of(item) > ATTEMPTS:
            return Dead(0, "")
        chance = self.world.roll.random()
        if chance < 0.04 and attempt_of(item) < ATTEMPTS:
            delay_s = self.world.roll.choice([0.0, 0.0, 20.0, 300.0])
            if self.world.order is Order.NONE:
                delay_s = 0.0
            return Retry(0, delay_s, "no")
        if chance < 0.06:
            return Retry(0, 5.0, "not readable yet", charged=False)
        return Done(0)

    def _settle(self, ended: Sequence[Ending]) -> None:
        world = self.world
        for each in ended:
            place = (self._numbers[id(each.share)], each.item.offset)
            if isinstance(each.settlement, Done | Dead):
                world.settled[place] = type(each.settlement).__name__
            elif isinstance(each.settlement, Retry) and each.settlement.charged:
                world.charges[place] = world.charges.get(place, 0) + 1
        shares = {each.share.generation: each.share for each in ended}.values()
        for share in shares:
            mine = [each for each in ended if each.share is share]
            if world.transacted:
                self._settle_in_transaction(share, mine)
            else:
                for each in mine:
                    apply(each.settlement, share, each.item, world.now)
                share.foresee(self.limit)
                self._commit(share)

    def _settle_in_transaction(self, share: Share, ended: Sequence[Ending]) -> None:
        world, wall_ms = self.world, int(self.world.now * 1000)
        endings = Endings(share)
        for each in ended:
            endings.add(each, wall_ms)
        told = share.foretell(endings.known, endings.count, wall_ms, world.now)
        self._tell(share, told.position, as_text(told.notes, told.position))
        for each in ended:
            apply(each.settlement, share, each.item, world.now)
        assert told.position == share.position
        share.announced, share.committed = told.announced, share.version
        share.telling.told(told.announced, told.doubts)

    def _commit(self, share: Share, *, leaving: bool = False) -> None:
        wall_ms = int(self.world.now * 1000)
        notes = share.notes(wall_ms, self.world.now, leaving=leaving)
        self._tell(share, share.position, as_text(notes, share.position))
        share.committed = share.version
        share.telling.told(share.announced, share.telling.sent(share.announced))

    def _tell(self, share: Share, position: int, text: str) -> None:
        self.world.commits += 1
        self.world.told[self._numbers[id(share)]] = (position, text)

    def hand_over(self) -> None:
        """As in a rebalance that has waited for long enough."""
        for share in self.shares.values():
            share.leaving = True
            self._commit(share, leaving=True)

    # --- by chance

    def live(self, steps: int) -> None:
        """So many steps. Raises `Died`."""
        for _ in range(steps):
            if self.world.is_over:
                return
            self._step()

    def _step(self) -> None:
        world = self.world
        roll = world.roll
        world.now += roll.choice([0.0, 0.0, 0.1, 1.0])
        if roll.random() < 0.3:
            self.fetch(roll.choice([*self.shares]), roll.choice([1, 7, 100, 1000]))
        for lane in range(len(self.work)):
            work = self.work[lane]
            if work is None:
                self.claim(lane)
            elif work.hangs:
                world.now += 1.0
                for share in self.shares.values():
                    share.reap(world.now)  # as whoever claims beside it
                if all(item.token != token for _, _, item, token in work.items):
                    self.work[lane] = None  # it is another lane by now
            elif work.next < len(work.items) and roll.random() < 0.9:
                for _ in range(roll.choice([1, len(work.items)])):
                    if work.next < len(work.items) and not work.hangs:
                        self.start(lane)
            else:
                self.end(lane)
            self._extend()

    def _extend(self) -> None:
        """As its keeper does, but not of what hangs."""
        for work in self.work:
            for _, _, item, token in () if work is None or work.hangs else work.items:
                if item.token == token:
                    item.until = self.world.now + LEASE_S


def attempt_of(item: Item) -> int:
    """As a delivery tells it."""
    return item.charged if item.alone else item.charged + 1


def lived_through(world: World, *, lanes: int, limit: int, deaths: float, moves: float) -> int:
    """Let processes follow one another until everything is settled; how many there were."""
    for number in range(2000):
        life = Life(world, lanes, limit)
        try:
            for _ in _rounds(world):
                life.live(world.roll.choice([1, 5, 20]))
                if world.is_over:
                    return number + 1
                if world.roll.random() < deaths:
                    raise Died
                if world.roll.random() < moves:
                    life.hand_over()
                    break
        except Died:
            world.death(life)
    left = {(n, o) for n, offsets in world.there.items() for o in offsets} - world.settled.keys()
    raise AssertionError(f"it never comes to an end: {len(left)} left, {sorted(left)[:5]}")


def _rounds(world: World) -> Iterator[int]:
    yield from range(4000)
    raise AssertionError(f"a process is stuck: {world.told}")

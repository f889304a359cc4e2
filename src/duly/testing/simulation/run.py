"""One schedule, from its first publish until everything has come to rest, and its judgement."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

from duly.broker import SubscribeOptions, Subscription
from duly.guarantees import Done, Guarantee, GuaranteeName
from duly.message import Message, Topic
from duly.testing.checker import Judgement, judge
from duly.testing.history import Commit, Event, Final, Heal, Output, Read, Settle, Waiting, about
from duly.testing.simulation.actors import (
    Item,
    Setting,
    Worker,
    spawn_publisher,
    spawn_relay,
    spawn_worker,
)
from duly.testing.simulation.kinds import (
    ATTEMPTS,
    LEASE_S,
    LONGEST_BACKOFF_S,
    MAX_RUN_S,
    Clock,
    Place,
    place,
    terms_of,
)
from duly.testing.simulation.plan import Hit, Plan
from duly.testing.simulation.scenario import Manner, Scenario
from duly.testing.simulation.world import World

# With faults for so many ticks at most, and then without until all is done, or it is stuck.
TICKS_WITH_FAULTS = 400
# A message that kills its worker needs a lease, or a backoff, for each of its attempts, and others
# may have to wait for it; one whose handler hangs is held for as long as that may run.
REST_S = 3 * LEASE_S + ATTEMPTS * (LONGEST_BACKOFF_S + LEASE_S)
FOR_EVER = 5
MORE_S: Mapping[Manner, float] = {
    "die always": ATTEMPTS * (LONGEST_BACKOFF_S + LEASE_S),
    "hang once": MAX_RUN_S + 2 * LEASE_S,
}
SOURCE = "sim"
_A_LOT = 1 << 30


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a schedule. ``trace`` is equal for equal faults and interleavings;
    ``points`` counts those that each process passed while there were faults.
    """

    scenario: Scenario
    seed: int
    judgement: Judgement
    hits: tuple[Hit, ...]
    trace: int
    reached: Counter[str]
    crashed: Counter[str]
    points: dict[str, int]
    events: list[Event]


@cache
def _topics(guarantee: GuaranteeName, partitions: int) -> tuple[Topic[Any], Topic[Any]]:
    return (
        Topic("t", int, guarantee=guarantee, partitions=partitions),
        Topic("outputs", int, guarantee="at-least-once"),
    )


@contextmanager
def quiet() -> Iterator[None]:
    """What goes wrong on purpose is not worth a log line."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def run(scenario: Scenario, seed: int, plan: Plan) -> Outcome:
    """Run one schedule and judge it."""
    clock = Clock()
    with quiet(), place(scenario, clock) as where:
        world = World(where, plan, seed, scenario.preempt)
        world.clock = clock
        where.at.point = world.inside_a_call
        setting = Setting(
            scenario, world, *_topics(scenario.guarantee, 2 if scenario.ordered else 0)
        )
        where.broker.declare([setting.topic, setting.outputs])
        where.store.declare([setting.topic, setting.outputs])
        observer = where.broker.subscribe(
            [setting.topic, setting.outputs], "observer", SubscribeOptions(Guarantee.AT_LEAST_ONCE)
        )
        _fill(setting, Random(seed))
        try:
            _play(setting)
            _rest(setting)
        finally:
            for worker in setting.workers:
                worker.end()
        world.events.append(Read(clock.now, "observer", _read(where, observer)))
        judgement = judge(world.events, terms_of(scenario, where))
        return Outcome(
            scenario,
            seed,
            judgement,
            tuple(world.hits),
            world.trace,
            world.reached,
            world.crashed,
            dict(world.points),
            world.events,
        )


def _fill(setting: Setting, random: Random) -> None:
    """Decide what is to be published, and by whom and how its messages are handled."""
    scenario, clock = setting.scenario, setting.world.clock
    messages = [_message(setting, number) for number in range(scenario.messages)]
    while messages:
        count = random.randint(1, min(3, len(messages)))
        within = scenario.within and random.random() < 0.6
        setting.to_publish.append(Item(messages[:count], within))
        del messages[:count]
    if scenario.conflicts:
        again = setting.topic.message(999, source=SOURCE, id="m0", time_ms=clock.wall_ms())
        setting.to_publish.append(Item([again]))
    for _ in range(scenario.workers):
        spawn_worker(setting)
    for _ in range(1 if scenario.workers == 1 else 2):
        spawn_publisher(setting)
    if scenario.guarantee == "exactly-once" and setting.place.outbox is not None:
        spawn_relay(setting)


def _message(setting: Setting, number: int) -> Message[Any]:
    scenario, clock = setting.scenario, setting.world.clock
    manner = setting.manners[f"m{number}"] = scenario.manners[number % len(scenario.manners)]
    message = setting.topic.message(
        number,
        source=SOURCE,
        id=f"m{number}",
        key=f"k{number % 2}" if scenario.ordered else None,
        time_ms=clock.wall_ms(),
    )
    if manner != "undecodable":
        return message
    return Message(
        message.topic, message.source, message.id, b"no number", message.time_ms, message.key
    )


def _play(setting: Setting) -> None:
    """Until everything is published and handled, with faults."""
    world = setting.world
    for number in range(TICKS_WITH_FAULTS):
        world.tick()
        _replace_the_dead(setting)
        if number % 8 == 7 and _is_done(setting, but_held=True):
            break
    world.faulty, world.preempt = False, 0.0
    world.events.append(Heal(world.clock.now, "world"))


def _rest(setting: Setting) -> None:
    """Without faults, until everything is handled or the time for that is over."""
    world = setting.world
    more_s = sum(MORE_S.get(manner, 0.0) for manner in setting.manners.values())
    rest_s = REST_S + more_s
    until = world.clock.now + rest_s
    # As long as something ends, nothing is stuck; but who never comes to an end is.
    last = world.clock.now + FOR_EVER * rest_s
    ended = 0
    while world.clock.now < min(until, last):
        for _ in range(8):
            world.tick()
            _replace_the_dead(setting)
        if _is_done(setting):
            return
        if ended != (ended := _count_ended(world.events)):
            until = world.clock.now + rest_s


def _count_ended(events: list[Event]) -> int:
    return sum(isinstance(event, Settle | Commit) and event.phase == "ok" for event in events)


def _replace_the_dead(setting: Setting) -> None:
    world = setting.world
    world.expire_silent()
    if world.is_locked():
        return
    for process in world.processes:
        if process.busy:
            return
    world.processes, gone = (
        [p for p in world.processes if p.alive and not p.ended],
        [p for p in world.processes if not p.alive or p.ended or p.hung_since is not None],
    )
    for process in gone:
        if process.replaced:
            continue
        process.replaced = True  # one that hangs is still there
        if process.name.startswith("w"):
            spawn_worker(setting)
        elif process.name.startswith("r"):
            spawn_relay(setting)
    publishes = any(p.name.startswith("p") for p in world.processes)
    if setting.to_publish and not publishes:
        spawn_publisher(setting)


def _is_done(setting: Setting, *, but_held: bool = False) -> bool:
    if setting.to_publish or any(p.name.startswith("p") for p in setting.world.processes):
        return False
    for process in setting.world.processes:
        if process.sessions:
            return False
        if isinstance(process.actor, Worker) and not (process.is_gone or process.actor.idle()):
            return False
    outbox = setting.place.outbox
    if outbox is not None and outbox.backlog().unsent:
        return False
    held = but_held and setting.scenario.hold and bool(setting.place.dead())
    for state in setting.place.all_states():
        if state.name == "c" and (state.in_flight or (not state.is_drained and not held)):
            return False
    return True


def _read(where: Place, observer: Subscription) -> Final:
    """What the resources say, once nobody works any more."""
    log = []
    while deliveries := observer.claim(1000, _A_LOT, 0.0):
        log += [about(delivery.message) for delivery in deliveries]
        observer.settle([Done(delivery.receipt) for delivery in deliveries])
    outputs = [each for each in log if each.topic == "outputs"]
    return Final(
        log=tuple(log),
        rows=tuple(where.rows()),
        outputs=tuple(Output(each, each.id.removeprefix("out-")) for each in outputs),
        dead=tuple(where.dead()),
        waiting=tuple(
            Waiting(s.name, s.topic, s.backlog, s.in_flight, s.parked) for s in where.all_states()
        ),
        leaks=tuple(where.leaks()),
    )

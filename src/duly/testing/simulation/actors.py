"""Who acts in the simulated world: workers with their lanes, and publishers."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from duly import errors
from duly.broker import Receipt, SubscribeOptions, Subscription
from duly.consumer import Consumer, Handler, Options
from duly.guarantees import Admission, Guarantee, RetryPolicy
from duly.inspection.graves import keeper_of
from duly.message import Message, Topic
from duly.relay import Relay, RelayOptions
from duly.testing.history import about
from duly.testing.seam import WrappedBroker, WrappedOutbox, WrappedParked, WrappedStore
from duly.testing.simulation.handling import AsyncHandlerOf, HandlerOf
from duly.testing.simulation.kinds import (
    ATTEMPTS,
    HORIZON_S,
    LEASE_S,
    LONGEST_BACKOFF_S,
    MAX_RUN_S,
    Place,
)
from duly.testing.simulation.loop import SimulatedLoop
from duly.testing.simulation.scenario import Manner, Scenario
from duly.testing.simulation.world import Process, World
from duly.worker.concurrent import ConcurrentLane
from duly.worker.keeper import Keeper
from duly.worker.lane import Lane
from duly.worker.parking import Parking
from duly.worker.steps import Surroundings

POLICY = RetryPolicy(attempts=ATTEMPTS, first_s=1.0, longest_s=LONGEST_BACKOFF_S)


Driven = Lane | ConcurrentLane


@dataclass(slots=True)
class Setting:
    """What all processes of one world share."""

    scenario: Scenario
    world: World
    topic: Topic[Any]
    outputs: Topic[Any]
    manners: dict[str, Manner] = field(default_factory=dict)
    starts: Counter[str] = field(default_factory=Counter)
    to_publish: deque[Item] = field(default_factory=deque)
    spawned: Counter[str] = field(default_factory=Counter)
    workers: list[Worker] = field(default_factory=list)

    @property
    def place(self) -> Place:
        """Broker and store."""
        return self.world.place

    @property
    def guarantee(self) -> Guarantee:
        """What is promised."""
        return Guarantee(self.scenario.guarantee)


@dataclass(slots=True)
class Item:
    """Messages to publish together; ``within`` a transaction, and how often it was tried."""

    messages: Sequence[Message[Any]]
    within: bool = False
    tries: int = 0


def spawn_worker(setting: Setting) -> Process:
    """Start a worker process."""
    process = _process(setting, "w")
    process.actor = worker = Worker(setting, process)
    setting.workers.append(worker)
    return process


def spawn_publisher(setting: Setting) -> Process:
    """Start a publishing process."""
    process = _process(setting, "p")
    process.actor = Publisher(setting, process)
    return process


def spawn_relay(setting: Setting) -> Process:
    """Start a process that brings the outbox to the broker."""
    process = _process(setting, "r")
    process.actor = RelayActor(setting, process)
    return process


def _process(setting: Setting, letter: str) -> Process:
    setting.spawned[letter] += 1
    process = Process(setting.world, f"{letter}{setting.spawned[letter]}")
    setting.world.processes.append(process)
    return process


# --- workers


class Worker:
    """One process with one lane, what keeps its leases and, for coroutines, its event loop."""

    def __init__(self, setting: Setting, process: Process) -> None:
        self._setting = setting
        self._process = process
        self._hung: tuple[Sequence[Receipt], float | None] = ((), None)
        self._loop: SimulatedLoop | None = None
        if setting.scenario.asynchronous:
            self._loop = SimulatedLoop(self, setting.world.on_loop_is)
        self.lane = self._lane()
        self.driven: Driven = self.lane
        if setting.scenario.concurrency > 1:
            assert self._loop is not None, "only coroutines run side by side"
            self.driven = ConcurrentLane(self.lane, self._loop)
        # Only where handlers run beside the steps is one of them under way between two.
        self._ends = ("stop",) if self.driven is self.lane else ("stop", "time over")
        self._keeper = Keeper(setting.world.clock, lambda _name, _seconds: None, None)
        self._keeper.watch(self.lane, self)

    def _lane(self) -> Lane:
        setting, process = self._setting, self._process
        world, place, scenario = setting.world, setting.place, setting.scenario
        exactly = setting.guarantee is Guarantee.EXACTLY_ONCE
        consumer = consumer_of(setting)
        broker = WrappedBroker(place.broker, process.seam)
        self._subscription = broker.subscribe(
            consumer.topics,
            consumer.name,
            SubscribeOptions(
                setting.guarantee,
                LEASE_S,
                order_by_key=scenario.ordered,
                hold_key_on_dead=scenario.hold,
                bodies_only=scenario.payloads,
                key_lanes=scenario.key_lanes,
            ),
        )
        recording = process.recording
        return Lane(
            consumer,
            self._with_parked(consumer),
            recording.handler(HandlerOf(setting, process, self.hang))
            if self._loop is None
            else recording.async_handler(AsyncHandlerOf(setting, process)),
            Surroundings(
                "sim",
                clock=world.clock,
                roll=world.order.random,
                wait_s=0.0,
                on_loop=None if self._loop is None else self._loop.until,
                one_call_a_step=scenario.preempt > 0,
            ),
            store=WrappedStore(place.store, process.seam, f"{process.name}/tx")
            if exactly
            else None,
            admission=place.admission if exactly else None,
            retries_in_place=place.broker.capabilities.holds_partition(consumer.guarantee),
        )

    def _with_parked(self, consumer: Consumer) -> Subscription:
        """The log's subscription, and what the store has parked, where it does."""
        setting, place = self._setting, self._setting.place
        if place.parked is None or not place.parks(setting.scenario):
            return self._subscription
        parked = WrappedParked(place.parked, self._process.seam)
        return Parking(self._subscription, parked, consumer, keeps=keeper_of(place.broker))

    def step(self) -> float:
        """One step of the lane, or what follows the last."""
        lane, process = self.lane, self._process
        if lane.stopping and self.driven.idle():
            self.driven.close()
            process.ended = True
            return 0.0
        claimed = lane.counts.claimed
        pause_s = self.driven.step()
        if self._loop is not None and self.driven is not lane:
            for _ in range(self._setting.world.order.randint(0, 2)):
                self._loop.turn()
        match process.point(f"between steps, after {process.last}", self._ends):
            case "stop":
                lane.stop()
            case "time over":
                self._end_at_once()
            case _:
                pass
        if process.last == "claim" and lane.counts.claimed == claimed and self.driven.idle():
            return max(pause_s, 0.25, self._setting.place.idle_s)  # nothing to do
        return pause_s

    def _end_at_once(self) -> NoReturn:
        """The time to drain is over: what still runs is cancelled, and the process ends."""
        assert self._loop is not None, "only coroutines can be cancelled"
        self.lane.stop()
        self.lane.caller.abandon()
        self._loop.cancel()
        self._loop.turn()
        self.driven.step()  # its thread goes on until the process is gone
        self._setting.world.record_fault(self._process, "crash", "drain: its time is over")
        self._process.die("crash")

    def idle(self) -> bool:
        """Whether nothing is left to run of what was claimed."""
        waiting = self._process.found_nothing and not self.driven.receipts()
        return waiting or self.driven.idle()

    # --- what its keeper sees

    def look(self) -> None:
        """Renew the leases that are due."""
        self._keeper.look()

    def receipts(self) -> Sequence[Receipt]:
        """What is claimed and not settled; of one that hangs, for ever."""
        return self.driven.receipts() if self._process.hung_since is None else self._hung[0]

    def holds(self) -> bool:
        """Whether it holds claims."""
        return bool(self.receipts())

    def oldest_start(self) -> float | None:
        """When the oldest handler that runs began."""
        return self.driven.oldest_start() if self._process.hung_since is None else self._hung[1]

    def hang(self) -> NoReturn:
        """Its handler never returns. What it holds is kept here, for its step is unwound."""
        self._hung = (self.driven.receipts(), self.driven.oldest_start())
        self._process.hang()

    # --- what its loop sees

    def now(self) -> float:
        """The world's time."""
        return self._setting.world.clock.now

    def sleep(self, seconds: float) -> None:
        """Time passes while the whole loop waits; the leases are kept meanwhile."""
        clock = self._setting.world.clock
        until = clock.now + seconds
        while clock.now < until:
            clock.now += min(until - clock.now, LEASE_S / 4)
            if self._process.alive and not self._setting.world.is_locked():
                self._process.look()

    def died(self, kind: str) -> None:
        """Its sessions are rolled back; only where a death is known at once do claims go."""
        if kind == "crash":
            self._setting.place.bury(self._subscription.inner)
        else:
            self._setting.world.silent.append(
                (self._setting.world.clock.now + LEASE_S, self._subscription.inner)
            )

    def end(self) -> None:
        """The simulation is over: nothing of this process goes on."""
        self._process.alive = False
        self.lane.caller.abandon()
        if self._loop is not None:
            self._loop.end()


def consumer_of(setting: Setting) -> Consumer:
    """The consumer whose lanes are simulated."""
    scenario = setting.scenario
    exactly = setting.guarantee is Guarantee.EXACTLY_ONCE
    return Consumer(
        "c",
        (setting.topic,),
        setting.guarantee,
        Handler(
            function=print,
            is_async=scenario.asynchronous,
            is_batch=scenario.batch_handler,
            wants_message=not scenario.payloads,
            wants_tx=exactly,
            uses={},
        ),
        Options(
            batch=scenario.batch,
            concurrency=scenario.concurrency,
            lease_s=LEASE_S,
            max_run_s=MAX_RUN_S,
            retry=POLICY,
            order_by_key=scenario.ordered,
            hold_key_on_dead=scenario.hold,
            inbox_retention_s=HORIZON_S if scenario.horizon else 7 * 86400.0,
        ),
    )


# --- publishers


class Publisher:
    """Publishes what is to be published; what stays unknown it publishes again."""

    def __init__(self, setting: Setting, process: Process) -> None:
        self._setting = setting
        self._process = process
        self._broker = WrappedBroker(setting.place.broker, process.seam)
        self._store = WrappedStore(setting.place.store, process.seam, f"{process.name}/tx")
        self._at_hand: Item | None = None

    def step(self) -> float:
        """Publish the next item."""
        process, waiting = self._process, self._setting.to_publish
        process.point("publisher: before")
        if not waiting:
            process.ended = True
            return 0.0
        item = self._at_hand = waiting.popleft()
        unknown = self._within(item) if item.within else self._plainly(item)
        self._at_hand = None
        self._again(item, unknown)
        process.point("publisher: done")
        return 0.1

    def look(self) -> None:
        """It does nothing besides."""

    def holds(self) -> bool:
        """It claims nothing."""
        return False

    def died(self, kind: str) -> None:
        """Another process takes over what it had not finished."""
        del kind  # to a publisher both are the same
        if self._at_hand is not None:
            self._again(self._at_hand, self._at_hand.messages)

    def _plainly(self, item: Item) -> Sequence[Message[Any]]:
        outcomes = self._broker.publish(item.messages)
        return [
            message
            for message, outcome in zip(item.messages, outcomes, strict=True)
            if isinstance(outcome, errors.PublishError)
            and not isinstance(outcome, errors.IdentityConflict)
        ]

    def _within(self, item: Item) -> Sequence[Message[Any]]:
        try:
            session = self._store.begin(None)
        except errors.BrokerError:
            return item.messages
        try:
            self._process.point("publisher: transaction begun")
            self._setting.place.insert(
                session.connection,
                "business",
                f"{self._process.name}-{item.messages[0].id}-{item.tries}",
                about(item.messages[0]),
            )
            self._process.point("publisher: business row written")
            session.publish(item.messages)
            session.commit()
        except (errors.BrokerError, errors.TransactionError):
            session.rollback()
            return item.messages
        return ()

    def _again(self, item: Item, unknown: Sequence[Message[Any]]) -> None:
        if not unknown or item.tries >= 3 or not may_repeat(self._setting):
            return
        self._setting.to_publish.append(Item(list(unknown), item.within, item.tries + 1))


def may_repeat(setting: Setting) -> bool:
    """Whether a publish of unknown outcome is tried again: not where that is fire and forget,
    nor where nothing would drop the repeat and exactly-once was promised (by cursor alone, or
    by an inbox that forgets in time).
    """
    if setting.guarantee is Guarantee.AT_LEAST_ONCE:
        return True
    exactly = setting.guarantee is Guarantee.EXACTLY_ONCE
    by_cursor = setting.place.admission is Admission.BY_CURSOR
    return exactly and not by_cursor and not setting.scenario.horizon


# --- relays


class RelayActor:
    """A relay process, where the store has an outbox."""

    def __init__(self, setting: Setting, process: Process) -> None:
        place, world = setting.place, setting.world
        assert place.outbox is not None, "a relay has an outbox to bring to the broker"
        self._setting = setting
        self._process = process
        self._relay = Relay(
            WrappedOutbox(place.outbox, process.seam),
            WrappedBroker(place.broker, process.seam),
            RelayOptions(batch=3, lease_s=LEASE_S, longest_s=LONGEST_BACKOFF_S),
            clock=world.clock,
            roll=world.order.random,
            wait_s=0.0,
            outbox_name=place.store.capabilities.database,
        )

    def step(self) -> float:
        """Publish one batch."""
        pause_s = self._relay.step()
        last = self._process.last
        self._process.point(f"between steps, after {last}")
        return max(pause_s, 0.1, self._setting.place.idle_s if last == "unsent" else 0.0)

    def look(self) -> None:
        """It does nothing besides."""

    def holds(self) -> bool:
        """It claims nothing."""
        return False

    def died(self, kind: str) -> None:
        """Another takes over when its hold on the outbox ends."""

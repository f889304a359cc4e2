"""Who acts in the simulated world: workers with their lanes, and publishers."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from duly import errors
from duly.broker import SubscribeOptions
from duly.consumer import Consumer, Handler, Options
from duly.guarantees import Guarantee, RetryPolicy
from duly.message import Message, Topic
from duly.relay import Relay, RelayOptions
from duly.store import Transaction
from duly.testing.history import about
from duly.testing.seam import WrappedBroker, WrappedOutbox, WrappedStore
from duly.testing.simulation.kinds import (
    ATTEMPTS,
    HORIZON_S,
    LEASE_S,
    LONGEST_BACKOFF_S,
    TABLES,
    Place,
)
from duly.testing.simulation.scenario import Manner, Scenario
from duly.testing.simulation.world import Process, World
from duly.worker.keeper import Keeper
from duly.worker.lane import Lane
from duly.worker.steps import Surroundings

POLICY = RetryPolicy(attempts=ATTEMPTS, first_s=1.0, longest_s=LONGEST_BACKOFF_S)
MAX_RUN_S = 1000.0


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
    process.actor = Worker(setting, process)
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
    """One process with one lane and what keeps its leases."""

    def __init__(self, setting: Setting, process: Process) -> None:
        world, place, scenario = setting.world, setting.place, setting.scenario
        self._setting = setting
        self._process = process
        exactly = setting.guarantee is Guarantee.EXACTLY_ONCE
        broker = WrappedBroker(place.broker, process.seam)
        store = WrappedStore(place.store, process.seam, f"{process.name}/tx")
        consumer = consumer_of(setting)
        self._subscription = broker.subscribe(
            consumer.topics,
            consumer.name,
            SubscribeOptions(
                setting.guarantee,
                LEASE_S,
                order_by_key=scenario.ordered,
                hold_key_on_dead=scenario.hold,
            ),
        )
        self.lane = Lane(
            consumer,
            self._subscription,
            process.recording.handler(HandlerOf(setting, process)),
            Surroundings(
                "sim",
                clock=world.clock,
                roll=world.order.random,
                wait_s=0.0,
                one_call_a_step=scenario.preempt > 0,
            ),
            store=store if exactly else None,
            admission=place.admission if exactly else None,
            retries_in_place=place.broker.capabilities.retries_in_place,
        )
        self._keeper = Keeper(world.clock, lambda _name, _seconds: None, None)
        self._keeper.watch(self.lane, self.lane)

    def step(self) -> float:
        """One step of the lane, or what follows the last."""
        lane, process = self.lane, self._process
        if lane.stopping and lane.idle():
            lane.close()
            process.ended = True
            return 0.0
        claimed = lane.counts.claimed
        pause_s = lane.step()
        if process.point(f"between steps, after {process.last}", ("stop",)) == "stop":
            lane.stop()
        if process.last == "claim" and lane.counts.claimed == claimed and not lane.pending:
            return max(pause_s, 0.25)  # nothing to do
        return pause_s

    def idle(self) -> bool:
        """Whether nothing is left to run of what was claimed."""
        waiting = self._process.last == "claim" and not self.lane.receipts()
        return waiting or self.lane.idle()

    def look(self) -> None:
        """Renew the leases that are due."""
        self._keeper.look()

    def died(self, kind: str) -> None:
        """Its sessions are rolled back; only where a death is known at once do claims go."""
        if kind == "crash":
            self._setting.place.bury(self._subscription.inner)
        else:
            self._setting.world.silent.append(
                (self._setting.world.clock.now + LEASE_S, self._subscription.inner)
            )


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
            is_async=False,
            is_batch=scenario.batch_handler,
            wants_message=True,
            wants_tx=exactly,
            uses={},
        ),
        Options(
            batch=scenario.batch,
            lease_s=LEASE_S,
            max_run_s=MAX_RUN_S,
            retry=POLICY,
            order_by_key=scenario.ordered,
            hold_key_on_dead=scenario.hold,
            inbox_retention_s=HORIZON_S if scenario.horizon else 7 * 86400.0,
        ),
    )


class HandlerOf:
    """The handler of one process: two rows and an output for each message, manners besides."""

    def __init__(self, setting: Setting, process: Process) -> None:
        self._setting = setting
        self._process = process

    def __call__(self, given: Any, tx: Transaction[Any] | None = None) -> None:
        messages: Sequence[Message[Any]] = given if isinstance(given, list) else [given]
        runs = list(self._process.recording.runs)
        for message, run in zip(messages, runs, strict=True):
            self._process.point("handler: before")
            if tx is not None:
                self._write(message, run, tx)
            self._behave(message)
            self._process.point("handler: after")

    def _write(self, message: Message[Any], run: str, tx: Transaction[Any]) -> None:
        setting, written = self._setting, about(message)
        setting.place.insert(tx.connection, TABLES[0], run, written)
        self._process.point("handler: one row written")
        setting.place.insert(tx.connection, TABLES[1], run, written)
        self._process.point("handler: both rows written")
        tx.publish(setting.outputs, message.payload, id=f"out-{run}")

    def _behave(self, message: Message[Any]) -> None:
        setting, world = self._setting, self._setting.world
        setting.starts[message.id] += 1
        first = setting.starts[message.id] == 1
        match setting.manners[message.id]:
            case "fail once" if first:
                raise ValueError("it fails the first time")
            case "fail always":
                raise ValueError("it always fails")
            case "retry" if first:
                raise errors.Retry("later", in_s=0.5)
            case "reject":
                raise errors.Reject("never")
            case "cancel once" if first:
                world.record_fault(self._process, "cancel", "handler")
                raise asyncio.CancelledError
            case "die once" if first:
                self._die()
            case "die always":
                self._die()
            case "slow":
                world.clock.now += LEASE_S / 8
            case _:
                pass

    def _die(self) -> None:
        self._setting.world.record_fault(self._process, "crash", "handler: in the middle")
        self._process.die("crash")


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
    return exactly and setting.scenario.kind != "log" and not setting.scenario.horizon


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
        )

    def step(self) -> float:
        """Publish one batch."""
        pause_s = self._relay.step()
        self._process.point(f"between steps, after {self._process.last}")
        return max(pause_s, 0.1)

    def look(self) -> None:
        """It does nothing besides."""

    def died(self, kind: str) -> None:
        """Another takes over when its hold on the outbox ends."""
        del kind
        place = self._setting.place
        if place.locks and place.outbox is not None:
            # That hold is by the machine's clock, which does not pass here.
            place.outbox.let_go(self._relay.name)

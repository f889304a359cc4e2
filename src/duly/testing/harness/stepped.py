"""A worker whose lanes are stepped by hand: real lanes, real admission, no threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any, Protocol

from duly.app import App
from duly.broker import Broker
from duly.contract import contract_on
from duly.events import Watcher
from duly.relay import Relay
from duly.store import Store, outbox_of
from duly.testing.harness.clock import Clock
from duly.worker import Worker
from duly.worker.concurrent import ConcurrentLane
from duly.worker.keeper import Keeper
from duly.worker.lane import Lane
from duly.worker.parking import Parking
from duly.worker.permits import Permits
from duly.worker.steps import Counts

Driven = Lane | ConcurrentLane


class Loop(Protocol):
    """The event loop on which ``async def`` handlers run."""

    loop: asyncio.AbstractEventLoop

    def run(self, call: Any) -> Any:
        """Await on the loop and return the result, from another thread."""
        ...

    def stop(self) -> None:
        """End it, if it is the worker's own."""
        ...


class TestsLoop:
    """The loop of an ``async def`` test: handlers share it with the test and its fixtures."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop

    def run(self, call: Any) -> Any:
        """Await on the test's loop, from the thread that drives the lanes."""

        async def awaited() -> Any:
            return await call

        return asyncio.run_coroutine_threadsafe(awaited(), self.loop).result()

    def stop(self) -> None:
        """It is the test's, and goes on."""


class SteppedWorker(Worker):
    """The lanes, dependencies, lifespan and relay of a worker, for somebody else to drive.

    ``crews`` is how many times every lane is there: as many processes that compete, of which one
    may die and be replaced. ``watch`` is shown what the app's own watchers are shown. Where the
    clock stands still no lease can run out while a handler runs; else they are kept as in every
    worker.
    """

    def __init__(
        self,
        app: App,
        clock: Clock,
        *,
        consumers: Sequence[str] | None,
        loop: Loop | None,
        crews: int,
        seed: int,
        watch: Watcher,
    ) -> None:
        super().__init__(app, consumers=consumers)
        self.relay: Relay | None = None
        self._clock = clock
        self._given_loop = loop
        self._roll = Random(seed).random
        self._watch = watch
        self._crews: list[list[Driven]] = [[] for _ in range(crews)]
        self._of_the_dead: dict[str, Counts] = {}

    @property
    def lanes(self) -> Sequence[Driven]:
        """What is to be stepped."""
        return tuple(self._lanes)

    def start(self) -> None:
        """Check the contract, enter the lifespan and make the lanes."""
        broker, store = self.app.backends()
        self.contract = contract_on(
            broker, store, self.app.topics, self.consumers, self._run, self.app.schedules
        )
        self._enter_lifespan()
        outbox = None if store is None else outbox_of(store)
        if outbox is not None and store is not None:
            apart = store.capabilities.database != broker.capabilities.database
            self.relay = self._relay(store, outbox, broker) if apart else None
        if not self._clock.stands_still:
            self._keeper = Keeper(self._clock, self._overrun, None)
            self._keeper.start()
        for crew in self._crews:
            self._make_lanes(crew)

    def replace_the_dead(self, driven: Driven, broker: Broker) -> None:
        """The process with this lane died: another one takes its place. What it held is suspect,
        at once where the broker notices deaths, or else when its leases have run out.
        """
        crash: Callable[[Any], None] | None = getattr(broker, "crash", None)
        crew = next(each for each in self._crews if driven in each)
        for dead in crew:
            if isinstance(dead, ConcurrentLane):
                dead._loop.call_soon_threadsafe(dead._cancel)
            lane = lane_of(dead)
            if crash is not None:
                subscription: Any = lane.subscription
                if isinstance(subscription, Parking):
                    subscription = subscription.inner
                crash(subscription.inner)
            _add(self._of_the_dead.setdefault(lane.consumer.name, Counts()), lane.counts)
            self._lanes.remove(dead)
        self._make_lanes(crew)

    def counts(self) -> Mapping[str, Counts]:
        """What each consumer has done, also on lanes that died."""
        sums = {consumer.name: Counts() for consumer in self.consumers}
        for counted in (self._of_the_dead, super().counts()):
            for name, counts in counted.items():
                _add(sums[name], counts)
        return sums

    def end(self) -> None:
        """Give back what is claimed, tear down what handlers used, leave the lifespan."""
        for driven in self._lanes:
            lane_of(driven).stop()
        try:
            for driven in self._lanes:
                driven.close()
            if self.relay is not None:
                self.relay.close()
        finally:
            self._lanes.clear()
            if self._keeper is not None:
                self._keeper.stop()
            self._leave()

    def _leave(self) -> None:
        try:
            self._resolver_close()
        finally:
            try:
                self._exits.close()
            finally:
                if self._loop is not None:
                    self._loop.stop()

    def _make_lanes(self, crew: list[Driven]) -> None:
        broker, store = self.app.backends()
        crew.clear()
        for consumer in self.consumers:
            for driven in self._lanes_of(consumer, broker, store):
                self._surround(lane_of(driven))
                crew.append(driven)
                self._lanes.append(driven)
                if self._keeper is not None:
                    self._keeper.watch(lane_of(driven), driven)

    def _surround(self, lane: Lane) -> None:
        around = lane.around
        around.clock, around.roll, around.wait_s = self._clock, self._roll, 0.0
        around.watchers = [*self.app.watchers, self._watch]
        rate = lane.consumer.options.rate_per_s
        if rate and around.permits is not None and around.permits._clock is not self._clock:
            around.permits = Permits(rate, self._clock)

    def _relay(self, store: Store, outbox: Any, broker: Broker) -> Relay:
        return Relay(
            outbox,
            broker,
            clock=self._clock,
            roll=self._roll,
            watchers=[*self.app.watchers, self._watch],
            wait_s=0.0,
            outbox_name=store.capabilities.database,
        )

    def _own_loop(self) -> Any:
        if self._given_loop is None:
            return super()._own_loop()
        self._loop = self._given_loop  # type: ignore[assignment]
        return self._given_loop


def _add(total: Counts, more: Counts) -> None:
    for name in Counts.__slots__:
        setattr(total, name, getattr(total, name) + getattr(more, name))


def lane_of(driven: Driven) -> Lane:
    """The lane itself, of one that has many handlers in flight too."""
    return driven if isinstance(driven, Lane) else driven.lane

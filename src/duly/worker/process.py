"""A worker: the lanes of an app's consumers in this process, and the threads that drive them."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Self

from duly.app import App, declare_at
from duly.broker import Broker, SubscribeOptions, Subscription
from duly.consumer import Consumer
from duly.contract import Contract, Run, contract_on
from duly.dependencies import Resolver
from duly.errors import ConfigurationError
from duly.guarantees import Admission, Guarantee
from duly.inspection.graves import keeper_of
from duly.relay import Relay
from duly.schedules import Scheduler, ticking
from duly.store import Store, outbox_of, parked_of
from duly.worker.concurrent import ConcurrentLane
from duly.worker.keeper import Keeper
from duly.worker.lane import FIRST_PAUSE_S, LONGEST_PAUSE_S, Lane
from duly.worker.loop import LoopThread
from duly.worker.parking import Parking
from duly.worker.permits import Permits
from duly.worker.steps import Counts, Surroundings

log = logging.getLogger("duly.worker")

Driven = Lane | ConcurrentLane

# How long the loop of a worker that ends may be busy before it counts as blocked.
_ANSWER_S = 1.0
# The longest pause of a lane that drains: what it cannot settle now it perhaps can before the end.
_DRAIN_PAUSE_S = 0.25


class Worker:
    """Works an app's consumers (or those named) in this process.

    ``supervised`` says that somebody restarts this process when it dies: then a ``def``
    handler past its ``max_run_s`` ends the process, which is the only way to end it. ``beat``
    is called about twice a second from the keeper's thread.

    ``prepare`` raises `ConfigurationError` (`ContractRefused`); nothing is claimed before
    ``start``, which prepares what is not prepared yet.
    """

    def __init__(
        self,
        app: App,
        *,
        consumers: Sequence[str] | None = None,
        supervised: bool = False,
        processes: int = 1,
        beat: Callable[[], None] | None = None,
    ) -> None:
        self.app = app
        self.consumers = chosen(app, consumers)
        self.contract: Contract | None = None
        self._run = Run(supervised=supervised, processes=processes)
        self._beat = beat
        self._lanes: list[Driven] = []
        self._threads: list[threading.Thread] = []
        self._stopping = threading.Event()
        self._broken: BaseException | None = None
        self._ended = threading.Event()
        self._loop: LoopThread | None = None
        self._keeper: Keeper | None = None
        self._resolver = Resolver(app.overrides)
        self._exits = contextlib.ExitStack()

    # --- for the process that runs it

    def prepare(self) -> None:
        """Check the contract and open everything; no handler runs before `start`."""
        broker, store = self.app.backends()
        self.contract = contract_on(
            broker, store, self.app.topics, self.consumers, self._run, self.app.schedules
        )
        if self.app.schedules:
            ticking(broker, self.app.schedules)
        self._enter_lifespan()
        self._keeper = Keeper(time.monotonic, self._overrun, self._beat)
        for consumer in self.consumers:
            for driven in self._lanes_of(consumer, broker, store):
                self._lanes.append(driven)
                self._keeper.watch(_lane(driven), driven)

    def start(self) -> None:
        """Start working."""
        if self._keeper is None:
            self.prepare()
        assert self._keeper is not None, "prepared"
        self._keeper.start()
        self._start_relay(*self.app.backends())
        self._start_schedules()
        for driven in self._lanes:
            thread = threading.Thread(
                target=self._drive, args=(driven,), name=f"duly-{_lane(driven).consumer.name}"
            )
            thread.daemon = True  # a hung handler must not keep a process that was told to end
            self._threads.append(thread)
            thread.start()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until a lane ended the worker; True then. `drain` raises what it ended with."""
        return self._ended.wait(timeout_s)

    def drain(self, timeout_s: float = 30.0) -> bool:
        """Start no further handler, let the running ones end, give back what never started.

        True when everything ended within ``timeout_s`` seconds; what did not is unsettled and
        comes again. Raises what broke a lane, if something did.
        """
        until = time.monotonic() + timeout_s
        self._stopping.set()
        for driven in self._lanes:
            _lane(driven).stop()
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        clean = not any(thread.is_alive() for thread in self._threads)
        if self._keeper is not None:
            self._keeper.stop()
        self._tear_down(until)
        if self._broken is not None:
            raise self._broken
        return clean

    def _tear_down(self, until: float) -> None:
        loop = self._loop
        blocked = loop is not None and not loop.answers(max(_ANSWER_S, until - time.monotonic()))
        if blocked:
            log.error(
                "an async handler blocks its event loop; what dependencies and the lifespan of "
                "app %r opened is left to the end of the process", self.app.name,
            )  # fmt: skip
        else:
            self._resolver_close()
            self._exits.close()
        if loop is not None:
            for driven in self._lanes:
                _lane(driven).caller.abandon()
            if blocked:
                loop.stop(0.0)
            else:
                loop.stop()

    def counts(self) -> Mapping[str, Counts]:
        """What each consumer's lanes have done since the start, summed."""
        sums: dict[str, Counts] = {}
        for driven in self._lanes:
            lane = _lane(driven)
            total = sums.setdefault(lane.consumer.name, Counts())
            for name in Counts.__slots__:
                setattr(total, name, getattr(total, name) + getattr(lane.counts, name))
        return sums

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self.drain()

    # --- building lanes

    def _lanes_of(
        self, consumer: Consumer, broker: Broker, store: Store | None
    ) -> Sequence[Driven]:
        assert self.contract is not None
        options = consumer.options
        permits = Permits(options.rate_per_s, time.monotonic) if options.rate_per_s else None
        is_async = consumer.handler.is_async
        around = Surroundings(
            source=self.app.name,
            watchers=self.app.watchers,
            permits=permits,
            on_loop=self._own_loop().run if is_async else None,
            declare=declare_at(broker, store),
            stamps=self.app.stamps,
        )
        exactly = consumer.guarantee is Guarantee.EXACTLY_ONCE
        call = self._resolver.bind(consumer.handler)
        for wrap in self.app.wrappers:
            call = wrap(consumer, call)
        admission = self.contract.admission(consumer.name) if exactly else None
        wanted = subscribe_options(consumer, admission, wrapped=bool(self.app.wrappers))
        holds = broker.capabilities.holds_partition(consumer.guarantee)
        lanes: list[Driven] = []
        for _ in range(options.lanes):
            subscription = broker.subscribe(consumer.topics, consumer.name, wanted)
            lane = Lane(
                consumer,
                _with_parked(subscription, consumer, broker, store, admission),
                call,
                around,
                store=store if exactly else None,
                admission=admission,
                retries_in_place=holds,
            )
            concurrent = is_async and options.concurrency > 1
            lanes.append(ConcurrentLane(lane, self._own_loop().loop) if concurrent else lane)
        return lanes

    def _start_relay(self, broker: Broker, store: Store | None) -> None:
        """Where effects live beside the broker, somebody has to bring it what they publish."""
        outbox = None if store is None else outbox_of(store)
        if store is None or outbox is None:
            return
        if store.capabilities.database != broker.capabilities.database:
            name = store.capabilities.database
            relay = Relay(outbox, broker, watchers=self.app.watchers, outbox_name=name)
            thread = threading.Thread(
                target=relay.run, args=(self._stopping,), name="duly-relay", daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def _start_schedules(self) -> None:
        """Every worker does: a tick belongs to whoever comes first."""
        schedules = self.app.schedules
        if not schedules:
            return
        broker, _ = self.app.backends()
        scheduler = Scheduler(schedules, ticking(broker, schedules), self.app.name)
        thread = threading.Thread(
            target=scheduler.run, args=(self._stopping,), name="duly-schedules", daemon=True
        )
        self._threads.append(thread)
        thread.start()

    def _own_loop(self) -> LoopThread:
        if self._loop is None:
            self._loop = LoopThread()
        return self._loop

    def _enter_lifespan(self) -> None:
        if self.app.lifespan is None:
            return
        around = self.app.lifespan(self.app)
        if isinstance(around, contextlib.AbstractAsyncContextManager):
            loop = self._own_loop()
            loop.run(around.__aenter__())
            self._exits.callback(lambda: loop.run(around.__aexit__(None, None, None)))
        else:
            self._exits.enter_context(around)

    def _resolver_close(self) -> None:
        if self._loop is not None:
            self._loop.run(self._resolver.aclose())
        self._resolver.close()

    # --- threads

    def _drive(self, driven: Driven) -> None:
        lane = _lane(driven)
        try:
            self._make_dependencies(lane)
            while not (lane.stopping and driven.idle()):
                pause_s = lane.step(through=True) if driven is lane else driven.step()
                if pause_s and self._stopping.wait(pause_s) and lane.stopping:
                    time.sleep(min(pause_s, _DRAIN_PAUSE_S))
            driven.close()
        except BaseException as error:  # noqa: BLE001 - kept, and raised by drain
            # Not a handler's failure. The claims stay as they are: whether this death is
            # charged to a message is for the next claimer to find out.
            log.critical("a lane of %s ended: %r", lane.consumer.name, error)
            self._broken = error
            self._ended.set()

    def _make_dependencies(self, lane: Lane) -> None:
        """Before the first claim: what cannot be made just now is no message's failure."""
        handler = lane.consumer.handler
        if not self._resolver.uses_worker_values(handler):
            return
        pause_s = FIRST_PAUSE_S
        while not lane.stopping:
            try:
                if handler.is_async:
                    self._own_loop().run(self._resolver.amake(handler))
                else:
                    self._resolver.make(handler)
                return
            except Exception:
                log.exception(
                    "consumer %s claims nothing: what it uses cannot be made; again in %.1f s",
                    lane.consumer.name, pause_s,
                )  # fmt: skip
            self._stopping.wait(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _overrun(self, consumer: str, seconds: float) -> None:
        if self._run.supervised:
            log.critical(
                "consumer %s: a handler has run for %.0f s, over its max_run_s; this process "
                "ends and its supervisor starts another",
                consumer, seconds,
            )  # fmt: skip
            os.kill(os.getpid(), signal.SIGKILL)
        log.error(
            "consumer %s: a handler has run for %.0f s, over its max_run_s. Its lease is not "
            "extended any more. Nobody supervises this process: use `duly run`, which ends it",
            consumer, seconds,
        )  # fmt: skip


def _lane(driven: Driven) -> Lane:
    return driven if isinstance(driven, Lane) else driven.lane


def _with_parked(
    subscription: Subscription,
    consumer: Consumer,
    broker: Broker,
    store: Store | None,
    admission: Admission | None,
) -> Subscription:
    """One lane's view of a consumer's messages, and of those that its store has parked."""
    parked = parked_of(store) if admission is Admission.BY_CURSOR else None
    if parked is None:
        return subscription
    return Parking(subscription, parked, consumer, keeps=keeper_of(broker))


def chosen(app: App, names: Sequence[str] | None) -> Sequence[Consumer]:
    """The app's consumers of these names, or all. Raises `ConfigurationError`."""
    there = {consumer.name: consumer for consumer in app.consumers}
    if not there and not app.schedules:
        raise ConfigurationError(
            f"app {app.name!r} has no consumers and no schedules; nothing to work"
        )
    if names is None:
        return list(there.values())
    if missing := [name for name in names if name not in there]:
        raise ConfigurationError(
            f"app {app.name!r} has no consumer {missing[0]!r}; there are {', '.join(there)}"
        )
    return [there[name] for name in names]


def subscribe_options(
    consumer: Consumer, admission: Admission | None = None, *, wrapped: bool = False
) -> SubscribeOptions:
    """What a consumer's lanes ask of their subscription. Who wraps a handler may look at more of
    a message than the handler does.
    """
    options = consumer.options
    needs_more = (
        consumer.handler.wants_message
        or wrapped
        or options.order_by_key
        or len(consumer.topics) > 1
        or any(topic.versions is not None for topic in consumer.topics)
    )
    return SubscribeOptions(
        guarantee=consumer.guarantee,
        lease_s=options.lease_s,
        order_by_key=options.order_by_key,
        hold_key_on_dead=options.hold_key_on_dead,
        start=options.start,
        bodies_only=not needs_more,
        # Each of many in flight is a delivery of its own, which knows its id.
        identities=admission is Admission.BY_INBOX or options.concurrency > 1,
        key_lanes=options.key_lanes,
        remembered=admission in (Admission.BY_INBOX, Admission.BY_CURSOR),
    )

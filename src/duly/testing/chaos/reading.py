"""What the resources say, before anything has happened and when everything has come to rest."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from duly.broker import Broker, Prepares, SubscribeOptions
from duly.errors import BrokerError
from duly.guarantees import Done, Guarantee
from duly.inspection import DeadLetter, Selection
from duly.inspection.graves import Buries, graveyard_of
from duly.message import Topic
from duly.store import Backlog, Store, outbox_of
from duly.testing.chaos.fitting import workload_on
from duly.testing.chaos.site import Database, Site, looked_into, open_broker, open_store
from duly.testing.chaos.workload import Spec, Workload
from duly.testing.history import About, Dead, Final, Output, Read, Recorder, Row, Waiting, about

OBSERVER = "observer"
_A_LOT, _ALL = 1 << 30, 100_000


def prepare(home: Site, apart: Database, folder: Path) -> Workload:
    """Make files, tables and topics, and the subscription that will read the whole log; others
    too, where a subscription that is made later would miss something. Returns what is to be done.
    """
    with closing(open_broker(home)) as broker:
        there = [site for site in (home, apart) if isinstance(site, Database)]
        stores = [open_store(site, broker) for site in there]
        workload = workload_on(broker, stores[0], stores[-1])
        for store in stores:
            store.close()
        workload.keep_in(folder)
        _observe(broker, workload).close()
        _prepare(broker, workload)
    for spec in workload.specs:
        if spec.exactly:
            _effects(spec, home, apart).create(spec.tables)
    return workload


def _prepare(broker: Broker, workload: Workload) -> None:
    if isinstance(broker, Prepares):
        for spec in workload.specs:
            options = SubscribeOptions(Guarantee(spec.guarantee), order_by_key=spec.ordered)
            broker.prepare([spec.topic], spec.name, options)


def _effects(spec: Spec, home: Site, apart: Database) -> Database:
    """Where those of a consumer are."""
    if spec.apart:
        return apart
    assert isinstance(home, Database), "beside the messages there can be effects"
    return home


def _observe(broker: Broker, workload: Workload) -> Any:
    topics: Sequence[Topic[Any]] = [*workload.topics.values(), *workload.outputs]
    broker.declare(topics)
    return broker.subscribe(topics, OBSERVER, SubscribeOptions(Guarantee.AT_LEAST_ONCE))


def is_drained(home: Site, apart: Database, folder: Path) -> bool:
    """Whether every consumer is done and every output on its way has arrived."""
    try:
        return _is_drained(home, apart, folder)
    except BrokerError:
        return False  # somebody keeps it from everybody


def _is_drained(home: Site, apart: Database, folder: Path) -> bool:
    with closing(open_broker(home)) as broker:
        found = looked_into(home, broker, folder).subscriptions()
        states = [state for state in found if state.name != OBSERVER]
        names = {state.name for state in states}
        wanted = {spec.name for spec in Workload.kept_in(folder).specs}
        if names < wanted or not all(state.is_drained for state in states):
            return False
        with closing(open_store(apart, broker)) as store:
            return not _backlog(store).unsent


def _backlog(store: Store) -> Backlog:
    outbox = outbox_of(store)
    assert outbox is not None, "a store that is apart from its broker has one"
    return outbox.backlog()


def read(folder: Path, home: Site, apart: Database) -> int:
    """Read everything, and write it into the histories: one file for each consumer."""
    workload = Workload.kept_in(folder)
    with closing(open_broker(home)) as broker:
        log = _log_of(broker, workload)
        found = looked_into(home, broker, folder).subscriptions()
        states = [state for state in found if state.name != OBSERVER]
        with closing(open_store(apart, broker)) as store:
            dead = _dead(broker, store, workload)
            left = _backlog(store)
    leaks = [*home.leaks(), *apart.leaks()]
    leaks += [f"{s.backlog} wait in {s.topic}" for s in states if not (s.name or s.is_drained)]
    if left != Backlog(0, 0, None):
        leaks.append(f"the outbox still holds {left}")
    for spec in workload.specs:
        final = Final(
            log=tuple(m for m in log if m.topic in (spec.topic.name, spec.outputs.name)),
            rows=tuple(_rows(spec, home, apart)),
            outputs=tuple(
                Output(each, each.id.removeprefix("out-"))
                for each in log
                if spec.exactly and each.topic == spec.outputs.name
            ),
            dead=tuple(
                Dead(letter.subscription, about(letter.message), letter.attempts, letter.error)
                for letter in dead
            ),
            waiting=tuple(
                Waiting(s.name, s.topic, s.backlog, s.in_flight, s.parked) for s in states
            ),
            leaks=tuple(leaks),
        )
        with Recorder(folder / "read" / spec.name, "read") as recorder:
            recorder.record(Read(recorder.clock(), "reader", final))
    return 0


def _dead(broker: Any, store: Store, workload: Workload) -> Sequence[DeadLetter]:
    """What was given up on, wherever it is kept."""
    _prepare(broker, workload)
    if not isinstance(broker, Buries):
        letters: Sequence[DeadLetter] = broker.dead_letters(limit=_ALL)
        return letters
    broker.carry()  # what the server itself gave up on
    graveyard = graveyard_of(store)
    assert graveyard is not None, "each of these has one"
    return [*broker.graveyard.select(Selection(), _ALL), *graveyard.select(Selection(), _ALL)]


def _log_of(broker: Broker, workload: Workload) -> Sequence[About]:
    observer = _observe(broker, workload)
    log: list[About] = []
    while deliveries := observer.claim(1000, _A_LOT, 0.0):
        log += [about(delivery.message) for delivery in deliveries]
        observer.settle([Done(delivery.receipt) for delivery in deliveries])
    return log


def _rows(spec: Spec, home: Site, apart: Database) -> Sequence[Row]:
    if not spec.exactly:
        return ()
    site = _effects(spec, home, apart)
    return [
        Row(table, About(*row[:5]), row[5]) for table in spec.tables for row in site.rows(table)
    ]

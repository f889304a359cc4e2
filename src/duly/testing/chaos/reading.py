"""What the resources say, before anything has happened and when everything has come to rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec

from duly.broker import Broker, Prepares, SubscribeOptions
from duly.errors import BrokerError
from duly.guarantees import Done, Guarantee
from duly.inspection import DeadLetter, Selection, SubscriptionState
from duly.inspection.graves import Buries, graveyard_of
from duly.message import Message, Topic
from duly.store import Backlog, Store, outbox_of, parked_of, with_parked
from duly.testing.chaos.fitting import workload_on
from duly.testing.chaos.site import (
    Database,
    PublishesAlone,
    Site,
    looked_into,
    open_broker,
    open_store,
)
from duly.testing.chaos.workload import OUTPUT, Spec, Workload
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
        workload = workload_on(broker, stores[0], stores[-1], lambda: _alone(home, broker))
        for store in stores:
            store.close()
        workload.keep_in(folder)
        _observe(broker, workload).close()
        _prepare(broker, workload)
    for spec in workload.specs:
        if spec.exactly and not spec.copies:
            _effects(spec, home, apart).create(spec.tables)
    return workload


def _alone(home: Site, broker: Broker) -> Store | None:
    return home.store_without_rows(broker) if isinstance(home, PublishesAlone) else None


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
        with closing(open_store(apart, broker)) as store:
            states = _without_observer(found, store)
            names = {state.name for state in states}
            wanted = {spec.name for spec in Workload.kept_in(folder).specs}
            if names < wanted or not all(state.is_drained for state in states):
                return False
            return not _backlog(store).unsent


def _without_observer(
    states: Sequence[SubscriptionState], store: Store
) -> Sequence[SubscriptionState]:
    """Those of consumers, with what waits for them in the store."""
    parked = parked_of(store)
    waiting = () if parked is None else parked.waiting()
    return [each for each in with_parked(states, waiting) if each.name != OBSERVER]


def _backlog(store: Store) -> Backlog:
    outbox = outbox_of(store)
    assert outbox is not None, "a store that is apart from its broker has one"
    return outbox.backlog()


def read(folder: Path, home: Site, apart: Database) -> int:
    """Read everything, and write it into the histories: one file for each consumer."""
    workload = Workload.kept_in(folder)
    with closing(open_broker(home)) as broker:
        log, copied = _log_of(broker, workload)
        one_order = broker.capabilities.is_log or broker.capabilities.database is not None
        found = looked_into(home, broker, folder).subscriptions()
        with closing(open_store(apart, broker)) as store:
            states = _without_observer(found, store)
            dead = _dead(broker, store, workload)
            left = _backlog(store)
    leaks = [*home.leaks(), *apart.leaks()]
    leaks += [f"{s.backlog} wait in {s.topic}" for s in states if not (s.name or s.is_drained)]
    if left != Backlog(0, 0, None):
        leaks.append(f"the outbox still holds {left}")
    for spec in workload.specs:
        final = Final(
            log=tuple(m for m in log if m.topic in (spec.topic.name, spec.outputs.name)),
            rows=tuple(copied[spec.name] if spec.copies else _rows(spec, home, apart)),
            outputs=tuple(
                Output(each, each.id.removeprefix(OUTPUT))
                for each in log
                if spec.exactly and each.topic == spec.outputs.name and each.id.startswith(OUTPUT)
            ),
            dead=tuple(
                Dead(letter.subscription, about(letter.message), letter.attempts, letter.error)
                for letter in dead
            ),
            waiting=tuple(
                Waiting(s.name, s.topic, s.backlog, s.in_flight, s.parked) for s in states
            ),
            leaks=tuple(leaks),
            one_order=one_order,
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


def _log_of(
    broker: Broker, workload: Workload
) -> tuple[Sequence[About], Mapping[str, Sequence[Row]]]:
    """Every message; and what consumers that copy have published, as rows."""
    observer = _observe(broker, workload)
    log: list[About] = []
    copying = {spec.outputs.name: spec for spec in workload.specs if spec.copies}
    copied: dict[str, list[Row]] = {spec.name: [] for spec in copying.values()}
    while deliveries := observer.claim(1000, _A_LOT, 0.0):
        for delivery in deliveries:
            log.append(about(delivery.message))
            spec = copying.get(delivery.message.topic)
            if spec is not None:
                copied[spec.name].append(_as_row(spec, delivery.message))
        observer.settle([Done(delivery.receipt) for delivery in deliveries])
    return log, copied


def _as_row(spec: Spec, output: Message[Any]) -> Row:
    for kind, table in zip(spec.kinds_of_output, spec.tables, strict=True):
        if output.id.startswith(kind):
            of = msgspec.json.decode(output.body, type=About)
            return Row(table, of, output.id.removeprefix(kind))
    raise AssertionError(f"nobody publishes {output.id!r}")


def _rows(spec: Spec, home: Site, apart: Database) -> Sequence[Row]:
    if not spec.exactly:
        return ()
    site = _effects(spec, home, apart)
    return [
        Row(table, About(*row[:5]), row[5]) for table in spec.tables for row in site.rows(table)
    ]

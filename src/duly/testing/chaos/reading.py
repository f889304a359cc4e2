"""What the resources say, before anything has happened and when everything has come to rest."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from duly.broker import Broker, SubscribeOptions
from duly.errors import BrokerError
from duly.guarantees import Done, Guarantee
from duly.message import Topic
from duly.store import Backlog, Store, outbox_of
from duly.testing.chaos.site import Site, open_broker, open_store
from duly.testing.chaos.workload import SPECS, Spec, inputs, lines, views
from duly.testing.history import About, Dead, Final, Output, Read, Recorder, Row, Waiting, about

OBSERVER = "observer"
_OUTPUTS = [spec.outputs for spec in SPECS if spec.exactly]
TOPICS: Sequence[Topic[Any]] = (inputs, lines, views, *_OUTPUTS)
_A_LOT = 1 << 30


def prepare(home: Site, apart: Site) -> None:
    """Make files, tables and topics, and the subscription that will read the whole log."""
    with closing(open_broker(home)) as broker:
        _observe(broker).close()
        for site in (home, apart):
            open_store(site, broker).close()
    for spec in SPECS:
        (apart if spec.apart else home).create(spec.tables)


def _observe(broker: Broker) -> Any:
    broker.declare(TOPICS)
    return broker.subscribe(TOPICS, OBSERVER, SubscribeOptions(Guarantee.AT_LEAST_ONCE))


def is_drained(home: Site, apart: Site) -> bool:
    """Whether every consumer is done and every output on its way has arrived."""
    try:
        return _is_drained(home, apart)
    except BrokerError:
        return False  # somebody keeps it from everybody


def _is_drained(home: Site, apart: Site) -> bool:
    with closing(_inspected(home)) as broker:
        states = [state for state in broker.subscriptions() if state.name != OBSERVER]
        names = {state.name for state in states}
        if names < {spec.name for spec in SPECS} or not all(state.is_drained for state in states):
            return False
        with closing(open_store(apart, broker)) as store:
            return not _backlog(store).unsent


def _inspected(home: Site) -> Any:
    """A broker that can be looked into."""
    return open_broker(home)


def _backlog(store: Store) -> Backlog:
    outbox = outbox_of(store)
    assert outbox is not None, "a store that is apart from its broker has one"
    return outbox.backlog()


def read(folder: Path, home: Site, apart: Site) -> int:
    """Read everything, and write it into the histories: one file for each consumer."""
    with closing(_inspected(home)) as broker:
        log = _log_of(broker)
        dead = broker.dead_letters(limit=100_000)
        states = [state for state in broker.subscriptions() if state.name != OBSERVER]
        with closing(open_store(apart, broker)) as store:
            left = _backlog(store)
    leaks = [*home.leaks(), *apart.leaks()]
    if left != Backlog(0, 0, None):
        leaks.append(f"the outbox still holds {left}")
    for spec in SPECS:
        final = Final(
            log=tuple(m for m in log if m.topic in (spec.topic.name, spec.outputs.name)),
            rows=tuple(_rows(spec, apart if spec.apart else home)),
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


def _log_of(broker: Broker) -> Sequence[About]:
    observer = _observe(broker)
    log = []
    while deliveries := observer.claim(1000, _A_LOT, 0.0):
        log += [about(delivery.message) for delivery in deliveries]
        observer.settle([Done(delivery.receipt) for delivery in deliveries])
    return log


def _rows(spec: Spec, site: Site) -> Sequence[Row]:
    return [
        Row(table, About(*row[:5]), row[5]) for table in spec.tables for row in site.rows(table)
    ]

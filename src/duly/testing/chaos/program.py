"""The processes of a chaos run: workers, publishers, a stranger who locks the file, the reader.

Each is started by a zygote with its orders, and records what it does.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import duly
from duly.broker import RepeatDropped
from duly.brokers.sqlite import SQLiteBroker
from duly.errors import DulyError
from duly.message import Message, Topic
from duly.store import Transaction
from duly.stores.sqlite import SQLiteStore
from duly.testing.chaos import surroundings, workload
from duly.testing.chaos.reading import read
from duly.testing.chaos.recorded import Recorded, Run
from duly.testing.chaos.workload import (
    KILLED_BY_MESSAGES,
    LEASE_S,
    POLICY,
    SPECS,
    STOPPED_BY_MESSAGES,
    Item,
    Spec,
    Step,
)
from duly.testing.harness.seams import SeenBroker, SeenStore
from duly.testing.history import Commit, Fault, Publish, about
from duly.worker import Worker

SOURCE = "chaos"
PATIENCE_S = 0.05
# Repeated after a publisher's death: what was in doubt, and some that was not.
STEPS_BACK = 3


class Place:
    """The files of a run, and this process's orders."""

    def __init__(self, orders: dict[str, Any]) -> None:
        self.orders = orders
        self.folder = Path(orders["folder"])
        self.files = Path(orders["files"])
        self.told_to_end = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: self.told_to_end.set())
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        surroundings.go_by(self.folder / "clock")

    def recorded(self) -> Recorded:
        """What this process records with."""
        return Recorded(self.folder / "histories", self.orders["who"])

    def store(self, apart: bool) -> Path:
        """Where effects live."""
        return self.files / ("apart.db" if apart else "chaos.db")

    @contextmanager
    def app(self, recorded: Recorded, apart: bool = False) -> Iterator[duly.App]:
        """The app, on a broker and a store that are recorded."""
        with (
            closing(SQLiteBroker(self.store(False))) as broker,
            closing(
                SQLiteStore(self.store(apart), broker_database=broker.capabilities.database)
            ) as store,
        ):
            name = f"{recorded.who}/tx"
            app = duly.App(SOURCE, SeenBroker(broker, recorded), SeenStore(store, recorded, name))
            with closing(app):
                yield app


# --- workers


def work(place: Place) -> int:
    """Work until told to end, then drain."""
    apart, recorded = bool(place.orders["apart"]), place.recorded()
    with place.app(recorded, apart) as app:
        for spec in SPECS:
            if spec.apart == apart:
                consume(app, spec, recorded)
        worker = Worker(app)
        worker.start()
        while not place.told_to_end.wait(0.02):
            if worker.wait(0):
                break
        return 0 if worker.drain(10.0) else 1


def consume(app: duly.App, spec: Spec, recorded: Recorded) -> None:
    """Declare a consumer with the handler that goes with it."""
    options: dict[str, Any] = {"batch": spec.batch, "lease_s": LEASE_S, "retry": POLICY}
    if spec.ordered:
        options["order_by_key"] = True
    if spec.concurrency > 1:
        options["concurrency"] = spec.concurrency
    declare: Any = app.batch_consumer if spec.batch_handler else app.consumer
    handler = _handler(spec, recorded)
    declare(spec.topic, name=spec.name, guarantee=spec.guarantee, **options)(handler)


def _handler(spec: Spec, recorded: Recorded) -> Callable[..., Any]:
    def effects(item: Item, tx: Transaction[sqlite3.Connection]) -> None:
        with recorded.run(tx) as [run]:
            _write(spec, run, tx)
            _behave(spec, recorded, run, item)
            _write_more(spec, run, tx, item)

    async def async_effects(item: Item, tx: Transaction[sqlite3.Connection]) -> None:
        with recorded.run(tx) as [run]:
            _write(spec, run, tx)
            await asyncio.sleep(0)
            _behave(spec, recorded, run, item)
            _write_more(spec, run, tx, item)

    def batch_effects(items: list[Item], tx: Transaction[sqlite3.Connection]) -> None:
        with recorded.run(tx) as runs:
            for run, item in zip(runs, items, strict=True):
                _write(spec, run, tx)
                _behave(spec, recorded, run, item)
                _write_more(spec, run, tx, item)

    def plain(item: Item) -> None:
        with recorded.run() as [run]:
            _behave(spec, recorded, run, item)

    async def async_plain(item: Item) -> None:
        with recorded.run() as [run]:
            await asyncio.sleep(0.002)
            _behave(spec, recorded, run, item)

    if spec.batch_handler:
        return batch_effects
    if spec.exactly:
        return async_effects if spec.concurrency else effects
    return async_plain if spec.concurrency else plain


def _write(spec: Spec, run: Run, tx: Transaction[sqlite3.Connection]) -> None:
    m = run.about
    row = (m.topic, m.source, m.id, m.key, m.content, run.name)
    tx.connection.execute(f"insert into {spec.tables[0]} values (?, ?, ?, ?, ?, ?)", row)  # noqa: S608 - a table of this package's


def _write_more(spec: Spec, run: Run, tx: Transaction[sqlite3.Connection], item: Item) -> None:
    m = run.about
    row = (m.topic, m.source, m.id, m.key, m.content, run.name)
    tx.publish(spec.outputs, item.n, id=f"out-{run.name}")
    tx.connection.execute(f"insert into {spec.tables[1]} values (?, ?, ?, ?, ?, ?)", row)  # noqa: S608 - likewise


def _behave(spec: Spec, recorded: Recorded, run: Run, item: Item) -> None:
    match item.manner:
        case "fail once" if run.attempt == 1:
            raise ValueError("it fails the first time")
        case "fail always":
            raise ValueError("it always fails")
        case "retry" if run.attempt == 1:
            raise duly.Retry("later", in_s=0.1)
        case "reject":
            raise duly.Reject("never")
        case "slow" if item.n % 4 == 0 or spec.guarantee != "exactly-once":
            time.sleep(0.02)
        case "kill" if spec.name in KILLED_BY_MESSAGES:
            recorded.put(Fault, "crash", "killed by a message")
            os.kill(os.getpid(), signal.SIGKILL)
        case "stall" if spec.name in STOPPED_BY_MESSAGES and not run.delivery.repeated:
            recorded.put(Fault, "stop", "stopped by a message")
            os.kill(os.getpid(), signal.SIGSTOP)
        case _:
            pass


# --- publishers


def publish(place: Place) -> int:
    """Publish step after step until the file ``stop`` is there; each again until it succeeds."""
    orders, recorded = place.orders, place.recorded()
    progress = place.folder / f"progress-{orders['publisher']}"
    done = int(progress.read_text()) if progress.exists() else 0
    with place.app(recorded) as app:
        app.declare(workload.inputs, workload.lines, workload.views)
        app.backends()
        plan = workload.steps(orders["seed"], orders["publisher"])
        for number, step in enumerate(plan):
            if number < done - STEPS_BACK:
                continue
            if (place.folder / "stop").exists() and number >= done:
                break
            _until_it_succeeds(place, app, recorded, step)
            if number >= done:
                _note(progress, number + 1)
            place.told_to_end.wait(orders["pause_s"])
    return 0


def _note(progress: Path, done: int) -> None:
    # Another file in its place: half a number would be another number.
    new = progress.with_suffix(".new")
    new.write_text(str(done))
    new.replace(progress)


def _until_it_succeeds(place: Place, app: duly.App, recorded: Recorded, step: Step) -> None:
    while not place.told_to_end.is_set():
        try:
            _publish(place, app, recorded, step)
        except (DulyError, sqlite3.Error) as error:
            # Failed or unknown: either way it is published again under the same identity.
            os.write(2, f"{step.way} {step.items[0].n}: {error!r}\n".encode())
            place.told_to_end.wait(PATIENCE_S)
        else:
            return


def _publish(place: Place, app: duly.App, recorded: Recorded, step: Step) -> None:
    topic, items = step.topic, step.items
    damaged = [item for item in items if item.manner == "damaged"]
    if damaged and step.way != "view":
        _store(app, [_damaged(_message(place, topic, item)) for item in damaged])
        items = tuple(item for item in items if item.manner != "damaged")
    ids = [_id(place, topic, item) for item in items]
    match step.way:
        case "one" | "view" | "late":
            for item, id in zip(items, ids, strict=True):
                app.publish(topic, item, id=id, delay_s=0.3 if step.way == "late" else None)
        case "many":
            app.publish_many(topic, items, ids=ids)
        case "gathered":
            asyncio.run(_gather(app, step, items, ids))
        case "transaction":
            with app.transaction() as tx:
                for item, id in zip(items, ids, strict=True):
                    tx.publish(topic, item, id=id)
        case "within":
            _within(place, app, recorded, topic, items)


def _id(place: Place, topic: Any, item: Item) -> str:
    return f"{topic.name}-{place.orders['publisher']}-{item.n}"


def _message(place: Place, topic: Any, item: Item) -> Message[Item]:
    made: Message[Item] = topic.message(item, source=SOURCE, id=_id(place, topic, item))
    return made


def _damaged(m: Message[Item]) -> Message[Any]:
    return Message(m.topic, m.source, m.id, b"no item", m.time_ms, m.key)


def _store(app: duly.App, messages: Sequence[Message[Any]]) -> None:
    for outcome in app.backends()[0].publish(messages):
        if isinstance(outcome, Exception):
            raise outcome


async def _gather(app: duly.App, step: Step, items: Sequence[Item], ids: Sequence[str]) -> None:
    calls = [app.apublish(step.topic, i, id=id) for i, id in zip(items, ids, strict=True)]
    for outcome in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome


def _within(
    place: Place, app: duly.App, recorded: Recorded, topic: Topic[Item], items: Sequence[Item]
) -> None:
    """In a transaction of the publisher's own, on its own connection."""
    messages = [_message(place, topic, item) for item in items]
    tx = f"{recorded.who}/within-{time.monotonic_ns()}"
    _, store = app.backends()
    assert store is not None, "a SQLite file is a store"
    ended = False
    with closing(sqlite3.connect(place.store(False), timeout=2.0, isolation_level=None)) as own:
        own.execute("pragma synchronous = full")
        own.execute("pragma wal_autocheckpoint = 0")
        own.execute("begin immediate")
        try:
            for message in messages:
                recorded.put(Publish, "invoke", about(message), tx)
            outcomes = store.publish_within(own, messages, (topic,))
            for message, outcome in zip(messages, outcomes, strict=True):
                if isinstance(outcome, Exception):
                    raise outcome
                if isinstance(outcome, RepeatDropped):
                    recorded.put(Publish, "ok", about(message), tx, repeat=True)
            recorded.put(Commit, "invoke", tx)
            ended = True
            own.execute("commit")
            recorded.put(Commit, "ok", tx)
        finally:
            if own.in_transaction:
                own.execute("rollback")
                recorded.put(Commit, "fail", tx)
            elif not ended:
                recorded.put(Commit, "fail", tx)


# --- others


def lock(place: Place) -> int:
    """A stranger: another program that writes to the file and takes its time."""
    recorded = place.recorded()
    path = place.store(bool(place.orders["apart"]))
    with closing(sqlite3.connect(path, timeout=5.0, isolation_level=None)) as own:
        own.execute("pragma wal_autocheckpoint = 0")
        own.execute("begin immediate")
        recorded.put(Fault, "lock", "held by a stranger")
        place.told_to_end.wait(place.orders["hold_s"])
        own.execute("rollback")
    return 0


ROLES: dict[str, Callable[[Place], int]] = {
    "worker": work,
    "publisher": publish,
    "stranger": lock,
    "reader": lambda place: read(place.folder, place.store(False), place.store(True)),
}


def run(orders: dict[str, Any]) -> int:
    """Be the process that the orders ask for; returns its exit status."""
    if before := orders.get("before"):
        module, _, function = before.partition(":")
        getattr(importlib.import_module(module), function)()
    return ROLES[orders["role"]](Place(orders))

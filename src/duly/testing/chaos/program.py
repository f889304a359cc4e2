"""The processes of a chaos run: workers, publishers, a stranger who holds a lock, the reader.

Each is started by a zygote with its orders, and records what it does.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from random import Random
from typing import Any

import duly
from duly.broker import RepeatDropped
from duly.errors import DulyError
from duly.message import Message, Topic
from duly.store import Transaction
from duly.testing.chaos import surroundings
from duly.testing.chaos.processes import Told
from duly.testing.chaos.reading import read
from duly.testing.chaos.recorded import Recorded, Run
from duly.testing.chaos.site import (
    Database,
    PublishesAlone,
    bury_in,
    database_of,
    open_broker,
    open_store,
    site_of,
)
from duly.testing.chaos.workload import (
    KILLED_BY_MESSAGES,
    OUTPUT,
    STOPPED_BY_MESSAGES,
    Item,
    Spec,
    Step,
    Workload,
)
from duly.testing.harness.seams import SeenBroker, SeenStore
from duly.testing.history import Commit, Fault, Publish, about
from duly.worker import Worker

SOURCE = "chaos"
PATIENCE_S = 0.05
SLOW_S = 0.05
# Repeated after a publisher's death: what was in doubt, and some that was not.
STEPS_BACK = 3


class Place:
    """The places of a run, and this process's orders: messages at ``home``, effects there or
    ``apart``.
    """

    def __init__(self, orders: dict[str, Any]) -> None:
        self.orders = orders
        self.folder = Path(orders["folder"])
        home, apart = orders["sites"]
        self.home, self.apart = site_of(home), database_of(apart)
        self.workload = Workload.kept_in(self.folder)
        self.told_to_end = Told()
        signal.signal(signal.SIGTERM, lambda *_: self.told_to_end.set())
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if orders["role"] == "worker" or not self.home.tells_time:
            surroundings.go_by(self.folder / "clock")

    def recorded(self) -> Recorded:
        """What this process records with."""
        return Recorded(self.folder / "histories", self.orders["who"])

    def effects(self, apart: bool) -> Database:
        """Where effects live."""
        if apart:
            return self.apart
        assert isinstance(self.home, Database), "beside the messages there can be effects"
        return self.home

    @contextmanager
    def app(self, recorded: Recorded, apart: bool = False) -> Iterator[duly.App]:
        """The app, on a broker and a store that are recorded; without one where the broker is no
        database and has no transactions, and it needs none apart.
        """
        with ExitStack() as open_:
            broker = open_.enter_context(closing(open_broker(self.home)))
            store = None
            if apart or isinstance(self.home, Database):
                inner = open_.enter_context(closing(open_store(self.effects(apart), broker)))
                bury_in(inner, broker)
                store = SeenStore(inner, recorded, f"{recorded.who}/tx")
            elif isinstance(self.home, PublishesAlone):
                alone = self.home.store_without_rows(broker)
                store = SeenStore(alone, recorded, f"{recorded.who}/tx")
            app = duly.App(SOURCE, SeenBroker(broker, recorded), store)
            yield open_.enter_context(closing(app))


# --- workers


def work(place: Place) -> int:
    """Work until told to end, then drain."""
    apart, recorded = bool(place.orders["apart"]), place.recorded()
    with place.app(recorded, apart) as app:
        for spec in place.workload.specs:
            if spec.apart == apart:
                consume(app, spec, recorded, place)
        worker = Worker(app)
        worker.start()
        while not place.told_to_end.wait(0.02):
            if worker.wait(0):
                break
        return 0 if worker.drain(10.0) else 1


def consume(app: duly.App, spec: Spec, recorded: Recorded, place: Place) -> None:
    """Declare a consumer with the handler that goes with it."""
    declare: Any = app.batch_consumer if spec.batch_handler else app.consumer
    if spec.copies:
        handler: Callable[..., Any] = _copying(spec, recorded)
    elif spec.exactly:
        handler = _handler(spec, recorded, place.effects(spec.apart))
    else:
        handler = _plain(spec, recorded)
    declare(spec.topic, name=spec.name, guarantee=spec.guarantee, **spec.options())(handler)


def _plain(spec: Spec, recorded: Recorded) -> Callable[..., Any]:
    def plain(item: Item) -> None:
        with recorded.run() as [run]:
            _behave(spec, recorded, run, item)

    async def async_plain(item: Item) -> None:
        with recorded.run() as [run]:
            await asyncio.sleep(0.002)
            _behave(spec, recorded, run, item)

    return async_plain if spec.concurrency else plain


def _handler(spec: Spec, recorded: Recorded, site: Database) -> Callable[..., Any]:
    first, *others = spec.tables

    def effects(item: Item, tx: Transaction[Any]) -> None:
        with recorded.run(tx) as [run]:
            one(run, item, tx)

    def one(run: Run, item: Item, tx: Transaction[Any]) -> None:
        site.insert(tx.connection, first, _row(run))
        _behave(spec, recorded, run, item)
        tx.publish(spec.outputs, item.n, id=f"{OUTPUT}{run.name}")
        for table in others:
            site.insert(tx.connection, table, _row(run))

    async def async_effects(item: Item, tx: Transaction[Any]) -> None:
        with recorded.run(tx) as [run]:
            await site.ainsert(tx.connection, first, _row(run))
            await asyncio.sleep(0)
            _behave(spec, recorded, run, item)
            tx.publish(spec.outputs, item.n, id=f"{OUTPUT}{run.name}")
            for table in others:
                await site.ainsert(tx.connection, table, _row(run))

    def batch_effects(items: list[Item], tx: Transaction[Any]) -> None:
        with recorded.run(tx) as runs:
            for run, item in zip(runs, items, strict=True):
                one(run, item, tx)

    if spec.batch_handler:
        return batch_effects
    return async_effects if spec.concurrency else effects


def _copying(spec: Spec, recorded: Recorded) -> Callable[..., Any]:
    one, two = spec.kinds_of_output

    def copied(item: Item, tx: Transaction[None]) -> None:
        with recorded.run(tx) as [run]:
            tx.publish(spec.outputs, run.about, id=f"{one}{run.name}", key=run.about.key)
            _behave(spec, recorded, run, item)
            tx.publish(spec.outputs, run.about, id=f"{two}{run.name}", key=f"{two}{run.about.key}")

    return copied


def _row(run: Run) -> tuple[Any, ...]:
    m = run.about
    return m.topic, m.source, m.id, m.key, m.content, run.name


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
            time.sleep(SLOW_S)
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
    with place.app(recorded, place.workload.published_apart) as app:
        app.declare(*place.workload.topics.values())
        app.backends()
        plan = place.workload.steps(orders["seed"], orders["publisher"])
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
    expected: tuple[type[Exception], ...] = (DulyError, *_own(place).errors)
    while not place.told_to_end.is_set():
        try:
            _publish(place, app, recorded, step)
        except expected as error:
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


def _own(place: Place) -> Database:
    """Where a publisher has transactions."""
    return place.effects(place.workload.published_apart)


def _within(
    place: Place, app: duly.App, recorded: Recorded, topic: Topic[Item], items: Sequence[Item]
) -> None:
    """In a transaction of the publisher's own, on its own connection."""
    messages = [_message(place, topic, item) for item in items]
    tx = f"{recorded.who}/within-{time.monotonic_ns()}"
    _, store = app.backends()
    assert store is not None, "each of these is a store"
    with _own(place).own() as own:
        try:
            for message in messages:
                recorded.put(Publish, "invoke", about(message), tx)
            outcomes = store.publish_within(own.connection, messages, (topic,))
            for message, outcome in zip(messages, outcomes, strict=True):
                if isinstance(outcome, Exception):
                    raise outcome
                if isinstance(outcome, RepeatDropped):
                    recorded.put(Publish, "ok", about(message), tx, repeat=True)
            recorded.put(Commit, "invoke", tx)
            own.commit()
            recorded.put(Commit, "ok", tx)
        except BaseException:
            if own.undo():
                recorded.put(Commit, "fail", tx)
            raise


# --- others


def lock(place: Place) -> int:
    """A stranger: another program that writes there and takes its time."""
    recorded = place.recorded()
    site = place.effects(bool(place.orders["apart"]))
    with site.locked(Random(place.orders["hold_s"])):
        recorded.put(Fault, "lock", "held by a stranger")
        place.told_to_end.wait(place.orders["hold_s"])
    return 0


ROLES: dict[str, Callable[[Place], int]] = {
    "worker": work,
    "publisher": publish,
    "stranger": lock,
    "reader": lambda place: read(place.folder, place.home, place.apart),
}


def run(orders: dict[str, Any]) -> int:
    """Be the process that the orders ask for; returns its exit status."""
    if before := orders.get("before"):
        module, _, function = before.partition(":")
        getattr(importlib.import_module(module), function)()
    return ROLES[orders["role"]](Place(orders))

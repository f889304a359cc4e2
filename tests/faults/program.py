"""The application under test and the processes that run it.

    python -m tests.faults.program '{"role": "worker", "folder": ..., "log": ...}'

Its effects are two tables and one output a message, none of them unique, so that a repeat or a
half shows. What leaves the database is noted in the journal by one write to an appended file.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import signal
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duly
from duly import Message, RetryPolicy, Topic, Transaction
from duly.brokers.sqlite import SQLiteBroker
from duly.stores.sqlite import SQLiteStore
from duly.testing.chaos.processes import Told
from duly.worker import Worker
from tests.faults import misbehaviour, planted, surroundings
from tests.faults.points import Points, around_broker, around_store
from tests.waiting import eventually

POISON, UNREADABLE = 2, 4
"""The message that always fails, and the one whose body is no number."""

EFFECTS = """
create table if not exists effects (n integer not null, half text not null);
create table if not exists ledger (n integer not null);
"""

DAY_S = 86400.0


def inputs(guarantee: Any, *, partitions: int = 0) -> Topic[int]:
    """The topic that is worked; kept whole, so that tests can compare."""
    topic: Topic[int] = Topic(
        "inputs",
        int,
        guarantee=guarantee,
        partitions=partitions,
        key=(lambda n: f"k{n % 2}") if partitions else None,
        retention_s=DAY_S,
    )
    return topic


# Not exactly-once: its identities would hide an output that was published twice. Save where a
# relay brings it to the log: after its death it publishes again, under the same identity.
outputs: Topic[int] = Topic("outputs", int, guarantee="at-least-once", retention_s=DAY_S)
relayed: Topic[int] = Topic("outputs", int, guarantee="exactly-once", retention_s=DAY_S)


class Journal:
    """What happened outside the database; a finished line survives any death."""

    def __init__(self, folder: Path) -> None:
        self._fd = os.open(folder / "journal", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(self, what: str) -> None:
        os.write(self._fd, f"{what} {os.getpid()}\n".encode())


class Process:
    """What every role needs: its orders, its crash points, the app and the journal."""

    def __init__(self, orders: dict[str, Any]) -> None:
        self.orders = orders
        self.folder = Path(orders["folder"])
        self.path = Path(orders.get("database", self.folder / "duly.db"))
        self.points = Points(orders.get("crash"), orders.get("trace"), orders.get("stop"))
        self.journal = Journal(self.folder)
        self.told_to_end = Told()

    def open(self) -> duly.App:
        """The app, on a broker and store with crash points around them."""
        broker = SQLiteBroker(self.path)
        store = SQLiteStore(
            self.folder / self.orders["store"] if "store" in self.orders else self.path,
            broker_database=broker.capabilities.database,
            **self.orders.get("store_options", {}),
        )
        app = duly.App(
            "faults",
            around_broker(broker, self.points),
            store=around_store(store, self.points),
        )
        self.broker = broker
        self.store = store
        self.app = app
        return app

    @property
    def outputs(self) -> Topic[int]:
        """Where handlers publish to."""
        return relayed if "store" in self.orders else outputs

    def is_drained(self) -> bool:
        """Whether every message is settled and every output on its way has arrived."""
        if not all(state.is_drained for state in self.broker.subscriptions()):
            return False
        if "store" not in self.orders or not self.orders.get("relay", True):
            return True
        return not self.store.outbox.backlog().unsent

    @functools.cached_property
    def inputs(self) -> Topic[int]:
        return inputs(self.orders["guarantee"], partitions=self.orders.get("partitions", 0))


# --- the worker


def work(process: Process) -> int:
    """Work until everything is settled, or until SIGTERM; returns the exit status."""
    orders = process.orders
    app = process.open()
    options: dict[str, Any] = {
        "batch": 3,
        "retry": RetryPolicy(attempts=3, first_s=0.0, longest_s=0.0, jitter=0.0),
    }
    options |= orders.get("options", {})
    if "attempts" in options:
        first_s = options.pop("first_s", 0.0)
        options["retry"] = RetryPolicy(
            attempts=options.pop("attempts"), first_s=first_s, longest_s=first_s, jitter=0.0
        )
    for name in orders.get("consumers", ["consumer"]):
        app.consumer(process.inputs, name=name, guarantee=orders["guarantee"], **options)(
            handler(process)
        )
    worker = Worker(app, supervised=bool(orders.get("supervised")))
    if not orders.get("relay", True):
        worker._start_relay = lambda broker, store: None  # type: ignore[method-assign]
    worker.start()
    process.journal.note("ready 0")
    forever = orders.get("until") == "told"
    while not process.told_to_end.wait(0.005):
        if worker.wait(0):
            break
        if not forever and process.is_drained():
            break
    if orders.get("leave") and not worker.wait(0):
        return 0  # as a worker that is done and has nothing to give back
    process.points.at("before drain")
    clean = worker.drain(orders.get("drain_s", 20.0))
    process.points.at("after drain")
    if not clean:
        return 1  # as duly's own worker process, which waits for nobody then
    process.app.close()
    process.store.close()
    process.broker.close()
    return 0


def handler(process: Process) -> Callable[..., Any]:
    """The handler that the orders ask for: ``def`` or ``async def``, with a transaction or not."""
    if process.orders["guarantee"] == "exactly-once":
        return _async_effects(process) if process.orders.get("async") else _effects(process)
    return _async_starts(process) if process.orders.get("async") else _starts(process)


def _effects(process: Process) -> Callable[..., Any]:
    at, misbehave = process.points.at, _misbehaviour(process)

    def handle(message: Message[int], tx: Transaction[sqlite3.Connection]) -> None:
        n = message.payload
        process.journal.note(f"start {n}")
        at("handler: started")
        tx.connection.execute("insert into effects values (?, 'a')", (n,))
        at("handler: one table written")
        misbehave(n, tx)
        tx.publish(process.outputs, n, id=f"out-{n}")
        at("handler: output given")
        tx.connection.execute("insert into ledger values (?)", (n,))
        at("handler: both tables written")
        tx.after_commit(lambda: process.journal.note(f"done {n}"))
        if n == POISON:
            raise ValueError("this one always fails")
        at("handler: returns")

    return handle


async def _hang(process: Process, n: int) -> None:
    """Hang, as the orders ask; once or twice cancelled, it may look away."""
    asked = process.orders.get("async_misbehaviour")
    if asked is None or asked["n"] != n:
        return
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        if asked["how"] == "hangs":
            raise


def _async_effects(process: Process) -> Callable[..., Any]:
    at = process.points.at

    async def handle(message: Message[int], tx: Transaction[sqlite3.Connection]) -> None:
        n = message.payload
        process.journal.note(f"start {n}")
        at("handler: started")
        tx.connection.execute("insert into effects values (?, 'a')", (n,))
        at("handler: before the await")
        await asyncio.sleep(0)
        await _hang(process, n)
        at("handler: after the await")
        tx.publish(process.outputs, n, id=f"out-{n}")
        tx.connection.execute("insert into ledger values (?)", (n,))
        if n == POISON:
            raise ValueError("this one always fails")
        await asyncio.sleep(0)
        at("handler: returns")

    return handle


def _starts(process: Process) -> Callable[..., Any]:
    at, misbehave = process.points.at, _misbehaviour(process)

    def handle(message: Message[int]) -> None:
        n = message.payload
        process.journal.note(f"start {n}")
        at("handler: started")
        misbehave(n, None)
        if n == POISON:
            raise ValueError("this one always fails")
        process.journal.note(f"end {n}")
        at("handler: returns")

    return handle


def _async_starts(process: Process) -> Callable[..., Any]:
    at = process.points.at

    async def handle(message: Message[int]) -> None:
        n = message.payload
        process.journal.note(f"start {n}")
        at("handler: started")
        await asyncio.sleep(0)
        await _hang(process, n)
        at("handler: after the await")
        if n == POISON:
            raise ValueError("this one always fails")
        process.journal.note(f"end {n}")
        at("handler: returns")

    return handle


def _misbehaviour(process: Process) -> Callable[[int, Any], None]:
    """What the handler does to one message, beside its work."""
    asked = process.orders.get("misbehaviour")
    if asked is None:
        return lambda n, tx: None
    culprit, how = asked["n"], misbehaviour.ALL[asked["how"]]

    done: list[int] = []

    def misbehave(n: int, tx: Any) -> None:
        if n == culprit and not (asked.get("once") and done):
            done.append(n)
            process.journal.note(f"misbehaves {n}")
            how(process, tx)

    return misbehave


# --- publishers


def publish(process: Process) -> int:
    """Publish the asked numbers, each under an id of its own; notes what was acknowledged."""
    orders = process.orders
    app = process.open()
    app.backends()[0].declare([process.inputs])
    process.journal.note("opened 0")
    how = PUBLISHING[orders.get("how", "publish")]
    at = process.points.at
    for n in orders["numbers"]:
        at("before publishing")
        if drops := orders.get("drops", {}).get(str(n)):
            eventually(lambda: sum(app.drops.values()) >= drops, "they are dropped")
            process.journal.note(f"dropped {drops}")
        _wait_for(process.folder, orders.get("gates", {}).get(str(n)))
        try:
            how(process, app, n)
        except duly.DulyError as error:
            process.journal.note(f"{type(error).__name__} {n}")
            os.write(1, f"{n}: {type(error).__name__}: {error}\n".encode())
        else:
            process.journal.note(f"acked {n}")
        at("after publishing")
    _wait_for(process.folder, orders.get("gates", {}).get("close"))
    app.close()
    process.store.close()
    process.broker.close()
    process.points.at("after closing")
    for topic, count in app.drops.items():
        process.journal.note(f"drops {count} of {topic}")
    return 0


def _wait_for(folder: Path, gate: str | None) -> None:
    """Wait until the test makes this file."""
    if gate is not None:
        eventually((folder / gate).exists, f"the gate {gate} opens")


def _plain(process: Process, app: duly.App, n: int) -> None:
    app.publish(process.inputs, n, id=str(n), delay_s=process.orders.get("delay_s"))


def _many(process: Process, app: duly.App, n: int) -> None:
    numbers = range(n * 10, n * 10 + 10)
    app.publish_many(process.inputs, list(numbers), ids=[str(each) for each in numbers])


def _within(process: Process, app: duly.App, n: int) -> None:
    at = process.points.at
    connection = sqlite3.connect(process.path, isolation_level=None)
    try:
        at("within: connected")
        connection.execute("pragma synchronous = full")
        connection.execute("pragma wal_autocheckpoint = 0")
        connection.execute("begin immediate")
        at("within: begun")
        connection.execute("insert into effects values (?, 'business')", (n,))
        at("within: business row written")
        app.publish(process.inputs, n, id=str(n), within=connection)
        at("within: message written")
        connection.execute("commit")
        at("within: committed")
    finally:
        connection.close()


def _transaction(process: Process, app: duly.App, n: int) -> None:
    at = process.points.at
    with app.transaction() as tx:
        at("transaction: begun")
        tx.connection.execute("insert into effects values (?, 'business')", (n,))
        at("transaction: business row written")
        tx.publish(process.inputs, n, id=str(n))
        at("transaction: message given")
    at("transaction: committed")


PUBLISHING: dict[str, Callable[[Process, duly.App, int], None]] = {
    "publish": _plain,
    "publish_many": _many,
    "within": _within,
    "transaction": _transaction,
}


# --- a publisher and a worker in one process, to be recorded; and who opens what is left of it


def _powered(process: Process) -> tuple[duly.App, Worker]:
    from duly.sql.sqlite.wal import Checkpoints

    # As in a long run: the log is moved into the database and starts anew again and again.
    defaults: Any = Checkpoints.__init__.__kwdefaults__
    defaults["pages"] = 20
    app = process.open()
    options: dict[str, Any] = {"batch": 4, "retry": RetryPolicy(attempts=1)}
    app.consumer(process.inputs, name="consumer", guarantee="exactly-once", **options)(
        _effects(process)
    )

    def once(message: Message[int]) -> None:
        process.journal.note(f"once {message.payload}")

    app.consumer(process.inputs, name="once", guarantee="at-most-once", **options)(once)
    return app, Worker(app)


def record(process: Process) -> int:
    """Publish and work at the same time, to be recorded."""
    connection = sqlite3.connect(process.path, isolation_level=None)
    connection.execute("pragma journal_mode = wal")
    connection.executescript(EFFECTS)
    connection.close()
    app, worker = _powered(process)
    worker.start()
    for n in range(0, process.orders["messages"], 3):
        numbers = [n, n + 1, n + 2]
        app.publish_many(process.inputs, numbers, ids=[str(each) for each in numbers])
        for each in numbers:
            process.journal.note(f"acked {each}")
    eventually(process.is_drained, "everything is handled")
    worker.drain()
    app.close()
    process.store.close()
    process.broker.close()
    return 0


def recover(process: Process) -> int:
    """After the power loss: look what is there, then handle what is left."""
    connection = sqlite3.connect(process.path, isolation_level=None)
    for (line,) in connection.execute("pragma integrity_check"):
        process.journal.note(f"integrity {line}")
    connection.execute("pragma journal_mode = wal")
    connection.executescript(EFFECTS)
    for (n,) in connection.execute("select n from ledger").fetchall():
        process.journal.note(f"effect {n}")
    connection.close()
    _, worker = _powered(process)
    worker.start()
    eventually(process.is_drained, "everything is handled")
    worker.drain()
    return 0


def crowd(process: Process) -> int:
    """One of many workers, with a consumer of each guarantee, until it is told to end."""
    app = process.open()
    options: dict[str, Any] = {"batch": 10, "retry": RetryPolicy(attempts=5, first_s=0.0, jitter=0)}
    app.consumer(process.inputs, name="exactly", guarantee="exactly-once", **options)(
        _effects(process)
    )
    app.consumer(process.inputs, name="least", guarantee="at-least-once", **options)(
        _starts(process)
    )

    def once(message: Message[int]) -> None:
        process.journal.note(f"once {message.payload}")

    app.consumer(process.inputs, name="most", guarantee="at-most-once", **options)(once)
    worker = Worker(app)
    worker.start()
    while not process.told_to_end.wait(0.01):
        assert not worker.wait(0), "a lane broke"
    return 0 if worker.drain() else 1


ROLES: dict[str, Callable[[Process], int]] = {
    "crowd worker": crowd,
    "worker": work,
    "publisher": publish,
    "record": record,
    "recover": recover,
}


def run(orders: dict[str, Any]) -> int:
    """Be the process that the orders ask for; returns its exit status."""
    process = Process(orders)
    signal.signal(signal.SIGTERM, lambda *_: process.told_to_end.set())
    if bug := orders.get("bug"):
        planted.BUGS[bug](process)
    if before := orders.get("before"):
        surroundings.ALL[before["what"]](process, **before.get("with", {}))
    return ROLES[orders["role"]](process)


if __name__ == "__main__":
    sys.stdout.flush()
    status = run(json.loads(sys.argv[1]))
    sys.stdout.flush()
    os._exit(status)

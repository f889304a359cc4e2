"""Broker and store in one, by URL, pool and function, under deadlines that somebody else has set.

A role or a pool may end every statement, wait for no lock and end whoever stands idle, much sooner
than duly would. What duly does in transactions of its own goes by its own deadlines; a handler has
the time that its consumer gives it; and what is refused all the same is done again and costs
nobody a message.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import psycopg
import psycopg_pool
import pytest

import duly
from duly.brokers.postgres import PostgresBroker
from duly.errors import PublishError
from duly.guarantees import Admission, RetryPolicy
from duly.message import Topic
from duly.stores.postgres import PostgresStore
from duly.worker import Worker
from tests.postgres.shop import Colour
from tests.servers.postgres import Schema
from tests.waiting import eventually

DEADLINES = {
    "statement_timeout": "500ms",
    "lock_timeout": "100ms",
    "idle_in_transaction_session_timeout": "500ms",
}
LONGER_S = 1.0
orders: Topic[str] = Topic("orders", str, guarantee="exactly-once")
FORMS = ("url", "pool", "configured pool", "function")


class Functions(NamedTuple):
    """What makes connections of either colour; a URL and a pool do for both."""

    connect: Any
    aconnect: Any


@pytest.fixture(params=FORMS)
def database(request: pytest.FixtureRequest, pg_schema: Schema) -> Iterator[Any]:
    """Where the messages are, as an application names it, with its deadlines."""
    settings = "".join(f"%20-c%20{name}%3D{value}" for name, value in DEADLINES.items())
    url = f"{pg_schema.url}{settings}"
    match request.param:
        case "url":
            yield f"{url}&schema={pg_schema.duly}"
        case "function":
            yield Functions(
                lambda: psycopg.connect(url), lambda: psycopg.AsyncConnection.connect(url)
            )
        case "pool":
            with psycopg_pool.ConnectionPool(url, min_size=2, max_size=8) as pool:
                yield pool
        case _:
            plain = pg_schema.url
            with psycopg_pool.ConnectionPool(
                plain, min_size=2, max_size=8, configure=_configure
            ) as pool:
                yield pool


def _configure(connection: psycopg.Connection[Any]) -> None:
    for name, value in DEADLINES.items():
        connection.execute(f"set {name} = '{value}'".encode())
    connection.commit()


@pytest.fixture(params=["def", "async def"])
def colour(request: pytest.FixtureRequest) -> Colour:
    found: Colour = request.param
    return found


class Three:
    """One consumer of each guarantee, in one colour. ``exactly`` runs in the transaction."""

    def __init__(self, database: Any, schema: Schema, colour: Colour) -> None:
        self.schema = schema
        self.handled: dict[str, Counter[str]] = {"most": Counter(), "least": Counter()}
        self.calls: Counter[str] = Counter()
        self.in_transaction: Callable[[Any, str], Any] = lambda connection, name: None
        with schema.connect() as connection:
            connection.execute("create table charges (name text)")
        self.closing = ExitStack()
        self.app = _app(database, schema, self.closing)
        (self._def if colour == "def" else self._async_def)()

    def _def(self) -> None:
        options: dict[str, Any] = {"retry": RetryPolicy(attempts=3, first_s=0.02), "batch": 4}
        insert = f"insert into {self.schema.name}.charges values (%s)".encode()

        @self.app.consumer(orders, name="most", guarantee="at-most-once", batch=4)
        def most(name: str) -> None:
            self.handled["most"][name] += 1

        @self.app.consumer(orders, name="least", guarantee="at-least-once", batch=4)
        def least(name: str) -> None:
            self.handled["least"][name] += 1

        @self.app.consumer(orders, name="exactly", guarantee="exactly-once", **options)
        def exactly(name: str, tx: duly.Transaction[psycopg.Connection]) -> None:
            self.calls[name] += 1
            tx.connection.execute(insert, (name,))
            self.in_transaction(tx.connection, name)

    def _async_def(self) -> None:
        options: dict[str, Any] = {"retry": RetryPolicy(attempts=3, first_s=0.02), "batch": 4}
        insert = f"insert into {self.schema.name}.charges values (%s)".encode()

        @self.app.consumer(orders, name="most", guarantee="at-most-once", batch=4)
        async def most(name: str) -> None:
            self.handled["most"][name] += 1

        @self.app.consumer(orders, name="least", guarantee="at-least-once", batch=4)
        async def least(name: str) -> None:
            self.handled["least"][name] += 1

        @self.app.consumer(orders, name="exactly", guarantee="exactly-once", **options)
        async def exactly(name: str, tx: duly.Transaction[psycopg.AsyncConnection]) -> None:
            self.calls[name] += 1
            await tx.connection.execute(insert, (name,))
            if (doing := self.in_transaction(tx.connection, name)) is not None:
                await doing

    def charged(self) -> Counter[str]:
        with self.schema.connect() as connection:
            rows = connection.execute("select name from charges").fetchall()
        return Counter(name for (name,) in rows)

    def wait_for(self, names: list[str]) -> None:
        wanted = set(names)

        def all_done() -> bool:
            return wanted <= set(self.charged()) and all(
                wanted <= set(handled) for handled in self.handled.values()
            )

        eventually(all_done, "all are handled", lambda: f"{self.charged()} {self.handled}")

    def judge(self, names: list[str]) -> None:
        """Nothing crashed: each once, whatever the guarantee."""
        once = Counter(names)
        assert self.charged() == once
        assert self.handled["most"] == once
        assert set(self.handled["least"]) == set(once)


def _app(database: Any, schema: Schema, closing: ExitStack) -> duly.App:
    if isinstance(database, str):
        return duly.App("shop", broker=database)
    connect = database.connect if isinstance(database, Functions) else database
    broker = PostgresBroker(connect, schema=schema.duly)
    closing.callback(broker.close)
    if connect is database:
        return duly.App("shop", broker=broker)
    store = PostgresStore(
        connect,
        async_database=database.aconnect,
        schema=schema.duly,
        broker_database=broker.capabilities.database,
        log=broker.log,
    )
    closing.callback(store.close)
    return duly.App("shop", broker=broker, store=store)


@contextmanager
def working(three: Three) -> Iterator[Worker]:
    with three.closing, three.app:
        worker = Worker(three.app)
        worker.start()
        try:
            yield worker
        finally:
            assert worker.drain(20), "did not drain"


def test_a_handler_has_the_time_of_its_consumer(
    pg_schema: Schema, database: Any, colour: Colour
) -> None:
    """A statement of its own, and standing idle, for longer than the role would allow."""
    three = Three(database, pg_schema, colour)

    def take_time(connection: Any, name: str) -> Any:
        if name == "o-1":
            return connection.execute("select pg_sleep(%s)", (LONGER_S,))
        if name == "o-2":
            return _stand_idle() if colour == "async def" else _never.wait(LONGER_S)
        return None

    three.in_transaction = take_time
    names = [f"o-{number}" for number in range(12)]
    with working(three) as worker:
        assert worker.contract is not None
        assert worker.contract.admission("exactly") is Admission.BY_CLAIM
        three.app.publish_many(orders, names, ids=names)
        three.wait_for(names)
    three.judge(names)
    assert three.calls == Counter(names), "in its first run"


_never = threading.Event()


async def _stand_idle() -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LONGER_S):
            await asyncio.Event().wait()


@pytest.mark.parametrize("table", ["claims", "cursors", "arrivals", "messages"])
def test_what_waits_too_long_for_a_strangers_lock_is_done_again(
    pg_schema: Schema,
    database: Any,
    colour: Colour,
    table: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    three = Three(database, pg_schema, colour)
    first, then = [f"a-{number}" for number in range(8)], [f"b-{number}" for number in range(8)]
    with working(three):
        three.app.publish_many(orders, first, ids=first)
        three.wait_for(first)
        refused: list[str] = []
        publishing = threading.Thread(target=_publish_all, args=(three.app, then, refused))
        with pg_schema.connect() as stranger:
            lock = f"lock table {pg_schema.duly}.{table} in access exclusive mode"
            stranger.execute(lock.encode())
            publishing.start()
            # A lane says so in its log, a publisher is told.
            eventually(
                lambda: "timeout" in caplog.text or bool(refused), "somebody has given up waiting"
            )
            stranger.rollback()
        publishing.join(30)
        three.wait_for(then)
    three.judge(first + then)


def _publish_all(app: duly.App, names: list[str], refused: list[str]) -> None:
    """Until it is known of each that it is stored; how often it was not is noted."""
    for name in names:
        while True:
            try:
                app.publish(orders, name, id=name)
            except PublishError as error:
                refused.append(str(error))
                continue
            break

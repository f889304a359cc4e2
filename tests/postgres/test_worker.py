"""Workers with effects in PostgreSQL: both colours, every way in which the server lets go."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from duly.broker import Broker
from duly.brokers.memory import MemoryLog, MemoryQueue
from duly.brokers.sqlite import SQLiteBroker
from duly.guarantees import RetryPolicy
from duly.store import Transaction
from duly.stores.postgres import PostgresSession, PostgresStore
from tests.postgres.proxy import Cut, Proxy
from tests.postgres.shop import Colour, Shop, orders, receipts
from tests.servers.postgres import PostgresServer, Schema
from tests.waiting import eventually

COLOURS: list[Colour] = ["def", "async def"]
NAMES = [f"o-{number}" for number in range(30)]

OpenShop = Callable[..., Shop]


@pytest.fixture(params=COLOURS)
def colour(request: pytest.FixtureRequest) -> Colour:
    each: Colour = request.param
    return each


@pytest.fixture
def open_shop(db_path: Path, pg_schema: Schema, colour: Colour) -> Iterator[OpenShop]:
    """Opens shops; ``url`` and ``broker`` where they are not the usual ones."""
    opened: list[Any] = []

    def open_(broker: Broker | None = None, url: str | None = None, **options: Any) -> Shop:
        schema = pg_schema.duly if url is None else "duly"
        store = PostgresStore(url or pg_schema.url, schema=schema, **options)
        broker = broker or SQLiteBroker(db_path)
        shop = Shop(broker, store, options.get("look_at", url) or pg_schema.url, colour)
        opened.extend([shop.app, store, broker])
        return shop

    yield open_
    for each in opened:
        each.close()


def ended_session(connection: Any, name: str) -> Any:
    """The server ends the session that asks: what an administrator does to it."""
    return connection.execute("select pg_terminate_backend(pg_backend_pid())")


# --- what it is for


def test_each_message_takes_effect_once(open_shop: OpenShop):
    shop = open_shop()
    shop.consumer()
    shop.publish(*NAMES)
    shop.publish(*NAMES)  # repeats are dropped
    shop.work(*NAMES)
    assert shop.calls == NAMES


def test_the_handler_gets_the_drivers_own_connection(open_shop: OpenShop, colour: Colour):
    shop = open_shop()
    shop.consumer()
    shop.publish("a")
    shop.work("a")
    kind = psycopg.Connection if colour == "def" else psycopg.AsyncConnection
    assert isinstance(shop.connections[0], kind)


def test_async_statements_run_on_the_workers_loop(open_shop: OpenShop, colour: Colour):
    if colour == "def":
        return
    shop = open_shop()
    seen: list[Any] = []

    async def look(connection: Any, name: str) -> None:
        seen.append((threading.current_thread().name, asyncio.get_running_loop()))
        await connection.execute("select pg_sleep(0.001)")

    shop.before = look
    shop.consumer()
    shop.publish("a", "b")
    shop.work("a", "b")
    assert {name for name, _ in seen} == {"duly-loop"}
    assert len({id(loop) for _, loop in seen}) == 1


def test_a_batch_handler(db_path: Path, pg_schema: Schema):
    store = PostgresStore(pg_schema.url, schema=pg_schema.duly)
    shop = Shop(SQLiteBroker(db_path), store, pg_schema.url, "def")

    @shop.app.batch_consumer(orders, name="billing", guarantee="exactly-once", batch=500)
    def charge(names: list[str], tx: Transaction[psycopg.Connection]) -> None:
        shop.calls.append(str(len(names)))
        with tx.connection.cursor().copy("copy charges from stdin") as copy:
            for name in names:
                copy.write_row((name,))

    shop.publish(*NAMES)
    shop.work(*NAMES)
    assert shop.calls == ["30"]
    shop.app.close()
    store.close()


def test_what_fails_has_no_effect_and_the_others_do(open_shop: OpenShop):
    shop = open_shop()

    def fail(connection: Any, name: str) -> None:
        if name == "o-7":
            raise ValueError("no such account")

    shop.before = fail
    shop.consumer()
    shop.publish(*NAMES)
    shop.work(*(name for name in NAMES if name != "o-7"))
    assert shop.dead() == ["o-7"]


def test_a_transaction_has_at_most_fifty_savepoints(
    open_shop: OpenShop, monkeypatch: pytest.MonkeyPatch
):
    shop = open_shop()
    sessions: dict[int, int] = {}
    savepoint = PostgresSession.savepoint

    def counted(session: PostgresSession) -> None:
        sessions[session._mark] = sessions.get(session._mark, 0) + 1
        savepoint(session)

    monkeypatch.setattr(PostgresSession, "savepoint", counted)

    def fail(connection: Any, name: str) -> None:
        if name == "o-149":
            raise ValueError("no such account")

    names = [f"o-{number}" for number in range(150)]
    shop.before = fail
    shop.consumer(batch=200, tx_s=60.0)  # no other reason to end a transaction
    shop.publish(*names)
    shop.work(*names[:149])
    assert max(sessions.values()) == 50
    assert sum(sessions.values()) == 150


# --- what is not to pass as success


def test_a_swallowed_error_commits_nothing(open_shop: OpenShop, colour: Colour):
    """PostgreSQL answers the COMMIT of such a transaction with ROLLBACK."""
    shop = open_shop()

    def swallow(connection: Any, name: str) -> Any:
        if name == "bad" and colour == "def":
            with pytest.raises(psycopg.Error):
                connection.execute("select nonsense")
        return aswallow(connection, name) if colour == "async def" else None

    async def aswallow(connection: Any, name: str) -> None:
        if name == "bad":
            with pytest.raises(psycopg.Error):
                await connection.execute("select nonsense")

    shop.before = swallow
    shop.consumer()
    shop.publish("bad", "good")
    shop.work("good")
    assert shop.dead() == ["bad"]


@pytest.mark.parametrize("end", ["commit", "rollback", "commit; begin"])
def test_sql_that_ends_the_transaction_is_refused(open_shop: OpenShop, end: str):
    shop = open_shop()

    def ends(connection: Any, name: str) -> Any:
        return connection.execute(end) if name == "bad" else None

    shop.before = ends
    shop.consumer()
    shop.publish("bad", "good")
    shop.work("good")
    assert shop.dead() == ["bad"]


def test_and_found_where_it_is_hidden(open_shop: OpenShop, colour: Colour):
    """Past every cursor of duly's; alone, for what it committed cannot be undone."""
    shop = open_shop()

    def hidden(connection: Any, name: str) -> Any:
        connection.pgconn.exec_(b"rollback")

    shop.before = hidden
    shop.consumer(batch=1)
    shop.publish("bad")
    with shop.working():
        eventually(lambda: shop.dead() == ["bad"], "given up on")


# --- what charges nobody


def test_a_session_that_was_ended_is_done_again_uncharged(open_shop: OpenShop):
    shop = open_shop()

    def once(connection: Any, name: str) -> Any:
        if shop.calls.count(name) == 1 and name == "o-3":
            return ended_session(connection, name)
        return None

    shop.before = once
    shop.consumer(batch=1)  # alone, it would be charged
    shop.publish(*NAMES[:6])
    shop.work(*NAMES[:6])
    assert shop.dead() == []


def test_a_serialization_failure_is_done_again_uncharged(
    open_shop: OpenShop, pg_schema: Schema, colour: Colour
):
    shop = open_shop(isolation="repeatable read")
    with pg_schema.connect(autocommit=True) as connection:
        connection.execute("create table counters (value int)")
        connection.execute("insert into counters values (0)")

    def beside(name: str) -> None:
        if shop.calls.count(name) == 1:
            with pg_schema.connect(autocommit=True) as connection:
                connection.execute("update counters set value = value + 10")

    def count(connection: Any, name: str) -> Any:
        if colour == "async def":
            return acount(connection, name)
        connection.execute("select * from counters")
        beside(name)
        return connection.execute("update counters set value = value + 1")

    async def acount(connection: Any, name: str) -> None:
        await connection.execute("select * from counters")
        beside(name)
        await connection.execute("update counters set value = value + 1")

    shop.before = count
    shop.consumer(batch=1)
    shop.publish("a", "b")
    shop.work("a", "b")
    assert shop.dead() == []
    assert shop.calls == ["a", "a", "b", "b"]
    with pg_schema.connect() as connection:
        assert connection.execute("select value from counters").fetchall() == [(22,)]


def test_a_deadlock_is_done_again_uncharged(
    db_path: Path, pg_schema: Schema, colour: Colour, open_shop: OpenShop
):
    """Two lanes that lock two rows crosswise."""
    shop = open_shop()
    with pg_schema.connect(autocommit=True) as connection:
        connection.execute("set deadlock_timeout = '50ms'")
        connection.execute("create table accounts (name text primary key, value int)")
        connection.execute("insert into accounts values ('x', 0), ('y', 0)")
    both = threading.Barrier(2)
    lock = "update accounts set value = value + 1 where name = %s"

    def meet(name: str) -> None:
        if shop.calls.count(name) == 1:
            both.wait(20)

    def crosswise(connection: Any, name: str) -> Any:
        first, second = ("x", "y") if name == "xy" else ("y", "x")
        if colour == "async def":
            return across(connection, name, first, second)
        connection.execute(lock, (first,))
        meet(name)
        return connection.execute(lock, (second,))

    async def across(connection: Any, name: str, first: str, second: str) -> None:
        await connection.execute(lock, (first,))
        await asyncio.to_thread(meet, name)
        await connection.execute(lock, (second,))

    shop.before = crosswise
    shop.consumer(lanes=2, batch=1)
    shop.publish("xy", "yx")
    shop.work("xy", "yx")
    assert shop.dead() == []
    assert len(shop.calls) > 2, "one of them was done again"


def test_what_always_ends_the_session_is_given_up_on(
    open_shop: OpenShop, monkeypatch: pytest.MonkeyPatch
):
    """Uncharged for ever, it would come again for ever."""
    monkeypatch.setattr("duly.worker.undone.INTERRUPTIONS", 3)
    monkeypatch.setattr("duly.worker.lane.LONGEST_PAUSE_S", 0.05)
    shop = open_shop()

    def always(connection: Any, name: str) -> Any:
        return ended_session(connection, name) if name == "bad" else None

    shop.before = always
    shop.consumer(batch=1)
    shop.publish("bad", "good")
    shop.work("good")
    assert shop.dead() == ["bad"]


def test_standing_idle_past_its_time_is_ended_by_the_server(
    open_shop: OpenShop, monkeypatch: pytest.MonkeyPatch, colour: Colour
):
    monkeypatch.setattr("duly.stores.postgres.store._GRACE_S", 0.0)
    shop = open_shop()

    def idle(connection: Any, name: str) -> Any:
        if shop.calls.count(name) > 1:
            return None
        return asyncio.sleep(0.6) if colour == "async def" else threading.Event().wait(0.6)

    shop.before = lambda connection, name: (
        idle(connection, name) if colour == "async def" else (idle(connection, name), None)[1]
    )
    shop.consumer(max_run_s=0.3, retry=RetryPolicy(attempts=3))
    shop.publish("a")
    shop.work("a")
    assert len(shop.calls) == 2


# --- the server and the link


def test_kill_9_of_the_server_in_the_middle(
    open_shop: OpenShop, pg_server: PostgresServer, colour: Colour
):
    shop = open_shop(url=pg_server.url)
    killed, back = threading.Event(), threading.Event()

    def restart() -> None:
        pg_server.start()
        back.set()

    def kill(connection: Any, name: str) -> None:
        if name == "o-12" and not killed.is_set():
            killed.set()
            pg_server.kill()
            threading.Thread(target=restart).start()

    shop.before = kill
    shop.consumer(batch=5)
    shop.publish(*NAMES)
    with shop.working():
        eventually(back.is_set, "the server was killed and is back")
        shop.wait_for(*NAMES)
    assert sorted(shop.charged()) == sorted(NAMES)
    assert shop.dead() == []


def test_a_restart_of_the_server_between_batches(open_shop: OpenShop, pg_server: PostgresServer):
    shop = open_shop(url=pg_server.url)
    shop.consumer()
    shop.publish("a")
    with shop.working():
        shop.wait_for("a")
        pg_server.restart()
        shop.publish("b")
        shop.wait_for("a", "b")
    assert shop.charged() == ["a", "b"]
    assert shop.calls == ["a", "b"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_lost_answer_to_commit_is_resolved_by_the_redelivery(
    open_shop: OpenShop, pg_server: PostgresServer, when: Cut
):
    with Proxy(pg_server.port) as proxy:
        shop = open_shop(url=proxy.url(pg_server.url))
        shop.url = pg_server.url
        shop.consumer(batch=5)
        shop.publish(*NAMES)

        def cut(connection: Any, name: str) -> None:
            if name == "o-12" and shop.calls.count(name) == 1:
                proxy.cut_at(b"commit\0", when)

        shop.before = cut
        shop.work(*NAMES)
        assert proxy.cuts == 1
        # Committed, they are found to have taken effect and do not run again.
        assert shop.calls.count("o-12") == (2 if when == "before" else 1)
        assert shop.dead() == []


# --- the outbox


@pytest.mark.parametrize("kind", ["sqlite", "log", "queue"])
def test_what_a_handler_publishes_reaches_the_broker(open_shop: OpenShop, kind: str, db_path: Path):
    brokers: dict[str, Callable[[], Broker]] = {
        "sqlite": lambda: SQLiteBroker(db_path),
        "log": MemoryLog,
        "queue": MemoryQueue,
    }
    shop = open_shop(brokers[kind]())
    shop.consumer(publishes=True)
    got: list[str] = []

    @shop.app.consumer(receipts, name="mail", guarantee="exactly-once")
    def mail(name: str, tx: Transaction[psycopg.Connection]) -> None:
        got.append(name)

    shop.publish(*NAMES)
    with shop.working():
        shop.wait_for(*NAMES)
        eventually(lambda: len(got) >= len(NAMES), "all receipts", lambda: f"{got}")
    assert sorted(got) == sorted(NAMES)
    outbox = shop.app.backends()[1]
    assert isinstance(outbox, PostgresStore)
    assert outbox.outbox.backlog().unsent == 0

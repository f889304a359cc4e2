"""The PostgreSQL store by itself: transactions, publishing within them, outbox, inbox, rights."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row
from psycopg_pool import ConnectionPool

from duly import App, connect
from duly.broker import Delivery
from duly.brokers.memory import MemoryDatabase, MemoryQueue
from duly.errors import (
    BrokerUnusable,
    ConfigurationError,
    TransactionFailed,
    TransactionInterrupted,
    TransactionLost,
)
from duly.guarantees import Admission, Done
from duly.message import Message, Topic, now_ms
from duly.relay import Relay
from duly.store import Outgoing, Scope
from duly.stores.postgres import PostgresStore
from tests.servers.postgres import PostgresServer, Schema

INBOX = Scope("billing", Admission.BY_INBOX)
news: Topic[str] = Topic("news", str, guarantee="at-least-once")


@pytest.fixture
def store(pg_schema: Schema) -> Iterator[PostgresStore]:
    with pg_schema.connect() as connection:
        connection.execute("create table effects (value text)")
    opened = PostgresStore(pg_schema.url, schema=pg_schema.duly)
    opened.declare([news])
    yield opened
    opened.close()


@pytest.fixture
def app(store: PostgresStore) -> Iterator[App]:
    with App("shop", broker=MemoryQueue(), store=store) as app:
        yield app


def effects(schema: Schema) -> list[str]:
    with schema.connect() as connection:
        return [value for (value,) in connection.execute("select value from effects")]


def delivery(id: str, **more: Any) -> Delivery:
    message: Message[Any] = Message("orders", "shop", id, b"body", more.pop("time_ms", now_ms()))
    return Delivery(message, receipt=id, **more)


def published(schema: Schema) -> list[str]:
    """What stands in the outbox, as a foreign program sees it."""
    with schema.connect() as connection:
        rows = connection.execute(f"select id from {schema.duly}.outbox order by position".encode())
        return [id for (id,) in rows]


# --- the application's own transactions


def test_a_block_commits_rows_and_messages_together(app: App, pg_schema: Schema):
    with app.transaction() as tx:
        assert isinstance(tx.connection, psycopg.Connection)
        tx.connection.execute("insert into effects values ('a')")
        tx.publish(news, "a", id="a")
    assert (effects(pg_schema), published(pg_schema)) == (["a"], ["a"])


def test_a_block_that_raises_leaves_nothing(app: App, pg_schema: Schema):
    def block() -> None:
        with app.transaction() as tx:
            tx.connection.execute("insert into effects values ('a')")
            tx.publish(news, "a")
            raise KeyError

    with pytest.raises(KeyError):
        block()
    assert (effects(pg_schema), published(pg_schema)) == ([], [])


def test_a_swallowed_error_does_not_pass_as_success(app: App, pg_schema: Schema):
    def block() -> None:
        with app.transaction() as tx:
            tx.connection.execute("insert into effects values ('a')")
            with pytest.raises(psycopg.Error):
                tx.connection.execute("select nonsense")

    with pytest.raises(TransactionLost):
        block()
    assert effects(pg_schema) == []


def test_what_a_block_set_on_the_connection_is_not_the_next_ones(app: App):
    with app.transaction() as tx:
        tx.connection.row_factory = dict_row
        first = tx.connection
    with app.transaction() as tx:
        assert tx.connection is first, "else this shows nothing"
        assert tx.connection.execute("select 1 as one").fetchall() == [(1,)]


def test_an_async_block_gets_an_async_connection_of_its_loop(app: App, pg_schema: Schema):
    async def raises() -> None:
        async with app.atransaction() as tx:
            await tx.connection.execute("insert into effects values ('b')")
            raise KeyError

    async def lasts() -> None:
        async with asyncio.timeout(0.05), app.atransaction() as tx:
            await tx.connection.execute("insert into effects values ('c')")
            await tx.connection.execute("select pg_sleep(10)")

    async def main() -> None:
        async with app.atransaction() as tx:
            assert isinstance(tx.connection, psycopg.AsyncConnection)
            await tx.connection.execute("insert into effects values ('a')")
            tx.publish(news, "a", id="a")
        with pytest.raises(KeyError):
            await raises()
        with pytest.raises(TimeoutError):
            await lasts()

    asyncio.run(main())
    assert (effects(pg_schema), published(pg_schema)) == (["a"], ["a"])


def test_of_each_loop_its_own_connections(app: App, pg_schema: Schema):
    async def main(value: str) -> Any:
        async with app.atransaction() as tx:
            await tx.connection.execute("insert into effects values (%s)", (value,))
            return tx.connection

    assert asyncio.run(main("a")) is not asyncio.run(main("b"))
    assert effects(pg_schema) == ["a", "b"]


# --- within=


def test_within_a_connection_of_the_application(app: App, pg_schema: Schema):
    for end in ("rollback", "commit"):
        with pg_schema.connect() as connection:
            connection.row_factory = dict_row
            connection.execute("insert into effects values (%s)", (end,))
            app.publish(news, end, id=end, within=connection)
            getattr(connection, end)()
    assert (effects(pg_schema), published(pg_schema)) == (["commit"], ["commit"])


def test_within_a_block_of_the_drivers_own(app: App, pg_schema: Schema):
    with pg_schema.connect(autocommit=True) as connection, connection.transaction():
        app.publish(news, "a", id="a", within=connection)
    assert published(pg_schema) == ["a"]


def test_within_an_async_connection(app: App, pg_schema: Schema):
    async def main() -> None:
        connection = await psycopg.AsyncConnection.connect(pg_schema.url)
        async with connection:
            await connection.execute("insert into effects values ('a')")
            await app.apublish(news, "a", id="a", within=connection)
            await app.apublish_many(news, ["b", "c"], ids=["b", "c"], within=connection)
            with pytest.raises(ConfigurationError, match=r"await app\.apublish"):
                app.publish(news, "d", within=connection)

    asyncio.run(main())
    assert published(pg_schema) == ["a", "b", "c"]


def test_within_what_cannot_carry_it(app: App, pg_schema: Schema, pg_server: PostgresServer):
    with (
        pg_schema.connect(autocommit=True) as connection,
        pytest.raises(ConfigurationError, match="autocommit"),
    ):
        app.publish(news, "a", within=connection)
    with pg_schema.connect() as connection:
        with pytest.raises(psycopg.Error):
            connection.execute("select nonsense")
        with pytest.raises(TransactionFailed, match="has failed"):
            app.publish(news, "a", within=connection)
    with (
        psycopg.connect(pg_server.url) as connection,
        pytest.raises(ConfigurationError, match="another server"),
    ):
        app.publish(news, "a", within=connection)
    with pg_schema.connect() as connection:
        connection.execute("set synchronous_commit = off")
        with pytest.raises(ConfigurationError, match="synchronous_commit"):
            app.publish(news, "a", within=connection)
    with app.transaction() as tx, pytest.raises(ConfigurationError, match=r"tx\.publish"):
        app.publish(news, "a", within=tx.connection)
    assert published(pg_schema) == []


# --- the outbox


def unsent(store: PostgresStore) -> list[Outgoing]:
    return list(store.outbox.unsent(100, 1 << 20, 0.0))


def texts(found: list[Outgoing]) -> list[str]:
    return [outgoing.message.body.decode() for outgoing in found]


def put(app: App, connection: Any, text: str) -> None:
    app.publish(news, text, within=connection)


def test_a_late_commit_is_not_skipped(app: App, store: PostgresStore, pg_schema: Schema):
    """It has the lower position, and is seen after a higher one was sent."""
    late, early = pg_schema.connect(), pg_schema.connect()
    put(app, late, "late")
    put(app, early, "early")
    early.commit()
    first = unsent(store)
    assert len(first) == 1
    store.outbox.sent([first[0].position])
    assert unsent(store) == []
    late.commit()
    [second] = unsent(store)
    assert second.position < first[0].position
    late.close()
    early.close()


def test_transactions_that_follow_one_another_come_in_their_order(
    app: App, store: PostgresStore, pg_schema: Schema
):
    numbers = [str(number) for number in range(20)]
    connections = [pg_schema.connect() for _ in range(3)]
    for number in numbers:
        connection = connections[int(number) % 3]
        app.publish(news, number, key="k", within=connection)
        connection.commit()
    assert texts(unsent(store)) == numbers
    for connection in connections:
        connection.close()


def test_several_relays_send_nothing_twice(app: App, store: PostgresStore, pg_schema: Schema):
    """A broker that drops no repeats shows every one."""
    queue = MemoryQueue()
    queue.declare([news])
    lane = queue.subscribe([news], "reader", _options())
    relays = [Relay(store.outbox, queue, wait_s=0.01) for _ in range(4)]
    stop = threading.Event()
    threads = [threading.Thread(target=relay.run, args=(stop,)) for relay in relays]
    for thread in threads:
        thread.start()
    for start in range(0, 200, 10):
        with app.transaction() as tx:
            for number in range(start, start + 10):
                tx.publish(news, str(number))
    got: list[str] = []
    for _ in range(200):
        got += [d.message.body.decode() for d in lane.claim(500, 1 << 20, 0.1)]
        if len(got) >= 200:
            break
    stop.set()
    for thread in threads:
        thread.join(20)
    assert got == [str(number) for number in range(200)]
    assert sum(relay.counts.published for relay in relays) == 200


def _options() -> Any:
    from duly.broker import SubscribeOptions
    from duly.guarantees import Guarantee

    return SubscribeOptions(Guarantee.AT_LEAST_ONCE, lease_s=60.0)


def test_a_relay_that_died_is_replaced_when_its_lease_ends(store: PostgresStore):
    now = [1_000_000]
    outbox = store.outbox_by(lambda: now[0])
    assert outbox.hold("one", 10.0)
    assert not outbox.hold("two", 10.0)
    now[0] += 9_000
    assert outbox.hold("one", 10.0), "renewed"
    now[0] += 9_000
    assert not outbox.hold("two", 10.0)
    now[0] += 2_000
    assert outbox.hold("two", 10.0)
    assert not outbox.hold("one", 10.0)
    outbox.let_go("two")
    assert outbox.hold("one", 10.0)


def test_the_lease_of_a_relay_goes_by_the_database_clock(store: PostgresStore):
    wrong = PostgresStore(
        store._database.named, schema=store._database.schema, wall_ms=lambda: now_ms() + 3_600_000
    )
    assert store.outbox.hold("one", 10.0)
    assert not wrong.outbox.hold("two", 10.0), "an hour ahead, it does not take over"
    wrong.close()


# --- the inbox


def run(store: PostgresStore, *deliveries: Delivery, scope: Scope = INBOX) -> int:
    session = store.begin(scope)
    try:
        fresh = session.admit(deliveries).fresh
        session.settle([Done(d.receipt) for d in fresh], fresh)
        session.commit()
    finally:
        session.rollback()
    return len(fresh)


def test_what_is_old_is_forgotten_while_others_come(pg_schema: Schema):
    now = [now_ms()]
    store = PostgresStore(pg_schema.url, schema=pg_schema.duly, wall_ms=lambda: now[0])
    scope = Scope("billing", Admission.BY_INBOX, inbox_retention_s=60.0)
    for round_ in range(20):
        # Ids that grow, as duly makes them: cleaning must not only follow the newest.
        ids = [f"{round_:02}-{n:03}" for n in range(600)]
        assert run(store, *map(delivery, ids), scope=scope) == 600
        now[0] += 20_000
    with pg_schema.connect() as connection:
        [(kept,)] = connection.execute(f"select count(*) from {pg_schema.duly}.inbox".encode())
    # Three rounds are young; cleaning looks at two rows for each that comes.
    assert 1800 <= kept <= 7200
    store.close()


def test_a_row_that_was_cleaned_away_meanwhile_is_fresh(store: PostgresStore, pg_schema: Schema):
    """It was in the way of the insert, and gone when it was to be looked at."""
    assert run(store, delivery("a")) == 1
    session = store.begin(INBOX)
    line = session._line.run
    steps_seen: list[str] = []

    def cleaning(steps: Any) -> Any:
        def watched() -> Any:
            answer, step = None, next(steps)
            try:
                while True:
                    steps_seen.append(getattr(step, "name", ""))
                    if steps_seen[-1] == "inbox_known" and steps_seen.count("inbox_known") == 1:
                        with pg_schema.connect() as connection:
                            connection.execute(f"delete from {pg_schema.duly}.inbox".encode())
                    answer = yield step
                    step = steps.send(answer)
            except StopIteration as stop:
                return stop.value

        return line(watched())

    session._line.run = cleaning  # type: ignore[method-assign]  # a race, made to happen
    assert len(session.admit([delivery("a")]).fresh) == 1
    session.rollback()


def test_different_messages_of_a_new_flow_do_not_wait(store: PostgresStore):
    """The row that numbers their flow is not theirs to lock."""
    one = store.begin(INBOX)
    assert len(one.admit([delivery("a")]).fresh) == 1
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(run, store, delivery("b"))
        try:
            assert beside.result(10) == 1
        finally:
            one.rollback()


def test_batches_that_overlap_crosswise_do_not_deadlock(store: PostgresStore):
    """Whatever the order of delivery, ids go in sorted."""
    names = [f"m-{number}" for number in range(50)]
    start = threading.Barrier(4)
    counts: list[int] = []

    def work(order: list[str]) -> None:
        start.wait(20)
        counts.append(run(store, *(delivery(name) for name in order)))

    threads = [threading.Thread(target=work, args=(names[::step],)) for step in (1, -1, 1, -1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(counts) == [0, 0, 0, 50]


# --- what a statement of duly's runs into


def test_a_deadlock_in_a_statement_of_dulys_is_an_interruption(
    store: PostgresStore, pg_schema: Schema
):
    assert run(store, delivery("x")) == 1
    scope = Scope("billing", Admission.BY_INBOX)
    one, two = store.begin(scope), store.begin(scope)
    assert len(one.admit([delivery("a")]).fresh) == 1
    assert len(two.admit([delivery("b")]).fresh) == 1
    ends: list[Any] = []

    def cross(session: Any, id: str) -> None:
        try:
            ends.append(len(session.admit([delivery(id)]).fresh))
            session.rollback()
        except TransactionInterrupted:
            ends.append("interrupted")
            session.rollback()

    threads = [
        threading.Thread(target=cross, args=(one, "b")),
        threading.Thread(target=cross, args=(two, "a")),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(ends, key=str) == [1, "interrupted"]


def test_a_statement_after_a_swallowed_error_says_so(store: PostgresStore):
    session = store.begin(INBOX)
    session.admit([delivery("a")])
    with pytest.raises(psycopg.Error):
        session.connection.execute("select nonsense")
    with pytest.raises(TransactionLost, match="swallowed"):
        session.publish([news.message("x", source="shop")])
    session.rollback()


# --- how it is named, and by whom it may be used


def test_as_url_pool_and_function(pg_schema: Schema):
    broker = MemoryDatabase()
    url = f"{pg_schema.url}&schema={pg_schema.duly}&isolation=repeatable%20read"
    with ConnectionPool(pg_schema.url, min_size=1, open=True) as pool:
        for named in (url, pool, pg_schema.connect):
            store = connect.open_store(named, broker)
            assert isinstance(store, PostgresStore)
            session = store.begin(None)
            isolation = session.connection.execute("show transaction_isolation").fetchall()
            session.rollback()
            assert isolation == [("repeatable read" if named is url else "read committed",)]
            store.close()
        with pg_schema.connect() as connection:
            connection.execute("drop schema duly cascade")
    with pytest.raises(ConfigurationError, match="isolation='dirty'"):
        connect.open_store(f"{pg_schema.url}&isolation=dirty", broker)


def test_a_pool_serves_async_handlers_too(pg_schema: Schema):
    async def main(app: App) -> None:
        async with app.atransaction() as tx:
            await tx.connection.execute("create table made (value int)")

    with ConnectionPool(pg_schema.url, min_size=1, open=True) as pool:
        store = PostgresStore(pool, schema=pg_schema.duly)
        with App("shop", broker=MemoryQueue(), store=store) as app:
            asyncio.run(main(app))
        store.close()


PAGE = Path(__file__).parents[2] / "docs/stores/postgres.md"


def documented_grants(role: str) -> str:
    """The statements that the page gives to an operator."""
    [block] = re.findall(r"^```sql\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return str(block).replace(" to app;", f" to {role};")


def test_a_role_with_the_documented_grants_is_enough(pg_server: PostgresServer):
    PostgresStore(pg_server.url).close()
    with psycopg.connect(pg_server.url, autocommit=True) as connection:
        connection.execute("create role plain login")
        url = pg_server.url_of("duly", user="plain")
        with pytest.raises(BrokerUnusable, match="permission denied"):
            PostgresStore(url)
        connection.execute(documented_grants("plain").encode())
    store = PostgresStore(url)
    store.declare([news])
    assert run(store, delivery("a"), delivery("b")) == 2
    assert run(store, delivery("a")) == 0
    session = store.begin(None)
    session.publish([news.message("x", source="shop")])
    session.commit()
    [found] = unsent(store)
    assert store.outbox.hold("relay", 10.0)
    store.outbox.sent([found.position])
    assert store.outbox.backlog().unsent == 0
    store.close()

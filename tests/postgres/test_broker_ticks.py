"""What commits late is delivered, once, in the order of its key, and holds up nobody else."""

from __future__ import annotations

import random
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Any

import psycopg
import pytest

import duly
from duly.broker import SubscribeOptions
from duly.brokers.postgres import PostgresBroker
from duly.guarantees import Guarantee
from duly.relay import Relay
from duly.sql import ticks
from duly.sql.postgres import OwnLine
from duly.sql.steps import Ask
from tests.postgres.brokers import (
    LEASE_S,
    claim,
    drain,
    lane,
    message,
    opened,
    publish,
    publish_in,
    take,
    topic,
)
from tests.servers.postgres import PostgresServer, Schema
from tests.waiting import eventually

T = topic()
ONCE = topic("once", "exactly-once")
ORDERED = topic("ordered", partitions=4)


@pytest.fixture(scope="module")
def two_phase_server() -> Iterator[PostgresServer]:
    with PostgresServer(durable=False, settings=["max_prepared_transactions=20"]) as server:
        yield server


def test_a_late_commit_is_not_skipped(pg_schema: Schema):
    with opened(pg_schema, T) as broker, pg_schema.connect() as late:
        publish_in(late, pg_schema, T, "first, and late")
        publish(broker, T, "second")
        sub = lane(broker, T)
        assert drain(sub) == ["second"]
        publish(broker, T, "third")
        assert drain(sub) == ["third"]
        late.commit()
        assert drain(sub) == ["first, and late"]
        publish(broker, T, "fourth")
        assert drain(sub) == ["fourth"]


def test_an_open_transaction_holds_up_nobody_else(pg_schema: Schema):
    with opened(pg_schema, T) as broker, pg_schema.connect() as open_for_long:
        open_for_long.execute("create table something (value int)")
        sub = lane(broker, T)
        for number in range(20):
            publish(broker, T, str(number))
            assert take(sub) == [str(number)]
        publish_in(open_for_long, pg_schema, T, "at last")
        open_for_long.commit()
        assert drain(sub) == ["at last"]


def test_what_is_rolled_back_is_never_seen(pg_schema: Schema):
    with opened(pg_schema, T) as broker, pg_schema.connect() as undone:
        sub = lane(broker, T)
        publish_in(undone, pg_schema, T, "never")
        publish(broker, T, "a")
        undone.rollback()
        publish(broker, T, "b")
        assert drain(sub) == ["a", "b"]
        with pg_schema.connect() as connection:
            arrivals = f"select count(*) from {pg_schema.duly}.arrivals"
            assert connection.execute(arrivals.encode()).fetchall() == [(0,)]


@pytest.mark.parametrize("between", ["no tick", "a tick"])
def test_keys_keep_the_order_of_transactions_not_of_their_ids(pg_schema: Schema, between: str):
    """The older transaction publishes after the younger one has committed."""
    with opened(pg_schema, ORDERED) as broker, pg_schema.connect() as older:
        sub = lane(broker, ORDERED, order_by_key=True)
        older.execute("select pg_current_xact_id()")
        publish(broker, ORDERED, "one", key="k")
        got = take(sub) if between == "a tick" else []
        publish_in(older, pg_schema, ORDERED, "two", key="k")
        publish(broker, ORDERED, "elsewhere", key="other")
        older.commit()
        got += drain(sub)
        assert [body for body in got if body != "elsewhere"] == ["one", "two"]
        assert sorted(got) == ["elsewhere", "one", "two"]


def test_savepoints_are_part_of_their_transaction(pg_schema: Schema):
    with opened(pg_schema, T) as broker, pg_schema.connect() as connection:
        sub = lane(broker, T)
        publish_in(connection, pg_schema, T, "outside")
        with connection.transaction():
            publish_in(connection, pg_schema, T, "kept")
        with connection.transaction(force_rollback=True):
            publish_in(connection, pg_schema, T, "undone")
        with connection.transaction(), connection.transaction():
            publish_in(connection, pg_schema, T, "deep")
        publish(broker, T, "other")
        assert drain(sub) == ["other"]
        connection.commit()
        assert drain(sub) == ["outside", "kept", "deep"]


def test_prepared_transactions_are_seen_once_committed(two_phase_server: PostgresServer):
    schema = Schema(two_phase_server.url, "prepared").create()
    with opened(schema, T) as broker, schema.connect() as connection:
        sub = lane(broker, T)
        for number, end in enumerate(["commit", "rollback", "commit"]):
            connection.autocommit = True
            connection.execute("begin")
            publish_in(connection, schema, T, f"{end} {number}")
            connection.execute(f"prepare transaction 'tx {number}'".encode())
            publish(broker, T, f"plain {number}")
            assert drain(sub) == [f"plain {number}"]
            connection.execute(f"{end} prepared 'tx {number}'".encode())
            assert drain(sub) == ([f"commit {number}"] if end == "commit" else [])


def test_a_prepared_transaction_outlives_the_server(two_phase_server: PostgresServer):
    schema = Schema(two_phase_server.url, "outlives").create()
    with opened(schema, T) as broker:
        publish(broker, T, "before")
        assert drain(lane(broker, T)) == ["before"]
        with schema.connect(autocommit=True) as connection:
            connection.execute("begin")
            publish_in(connection, schema, T, "prepared")
            connection.execute("prepare transaction 'survivor'")
        publish(broker, T, "after")
        assert drain(lane(broker, T)) == ["after"]
    two_phase_server.kill()
    two_phase_server.start()
    with opened(schema, T) as broker, schema.connect(autocommit=True) as connection:
        sub = lane(broker, T)
        publish(broker, T, "new")
        assert drain(sub) == ["new"]
        connection.execute("commit prepared 'survivor'")
        assert drain(sub) == ["prepared"]


@pytest.mark.parametrize("broker", ["the same database", "another"])
def test_within_a_prepared_transaction_that_another_session_commits(
    two_phase_server: PostgresServer, broker: str
):
    """By the application's own two-phase commit: into the log, or by the outbox and its relay."""
    schema = Schema(two_phase_server.url, f"within_{len(broker)}").create()
    url = f"{schema.url}&schema={schema.duly}"
    elsewhere = broker == "another"
    with duly.App("shop", broker="memory://" if elsewhere else url, store=url) as app:
        # Otherwise the first to publish makes the topic known, as part of its transaction.
        app.publish(ONCE, "first", id="first")
        for number, end in enumerate(["commit", "rollback", "commit"]):
            with closing(schema.connect()) as own:
                own.tpc_begin(f"within {broker} {number}")
                app.publish(ONCE, f"{end} {number}", id=str(number), within=own)
                own.tpc_prepare()
        app.publish(ONCE, "plain", id="plain")
        log, store = app.backends()
        sub = log.subscribe([ONCE], "sub", SubscribeOptions(Guarantee.AT_LEAST_ONCE, LEASE_S))
        relay = Relay(store.outbox, log, wait_s=0.0) if elsewhere else None  # type: ignore[union-attr]

        def found() -> list[str]:
            if relay is not None:
                relay.step()
            return take(sub)  # type: ignore[arg-type]

        assert found() == ["first", "plain"]
        with closing(schema.connect()) as another:
            for number, end in reversed(list(enumerate(["commit", "rollback", "commit"]))):
                getattr(another, f"tpc_{end}")(f"within {broker} {number}")
                assert found() == ([f"{end} {number}"] if end == "commit" else [])


def test_an_open_transaction_that_knows_a_topic_keeps_nobody_from_it(pg_schema: Schema):
    """Each app declares the topic for itself, one of them in a transaction that it leaves open."""
    url = f"{pg_schema.url}&schema={pg_schema.duly}"
    with (
        opened(pg_schema, T),
        pg_schema.connect() as own,
        duly.App("one", broker=url) as one,
        duly.App("two", broker=url) as two,
    ):
        one.publish(T, "open", within=own)
        two.publish(T, "meanwhile")
        own.commit()


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_a_default_of_another_isolation_level_changes_nothing(pg_schema: Schema, level: str):
    def connect() -> psycopg.Connection[Any]:
        connection = pg_schema.connect(autocommit=True)
        connection.execute(f"set default_transaction_isolation to '{level}'".encode())
        return connection

    broker = PostgresBroker(connect, schema=pg_schema.duly)
    try:
        broker.declare([T])
        sub = lane(broker, T)
        for number in range(5):
            publish(broker, T, str(number))
            assert take(sub) == [str(number)]
    finally:
        broker.close()


def test_ticks_wait_for_each_other_and_then_look_anew(pg_schema: Schema):
    """A tick that was asked for before another committed must not go by what it saw then."""
    with opened(pg_schema, T) as broker, pg_schema.connect() as connection:
        sub = lane(broker, T)
        line = OwnLine(connection, pg_schema.duly)
        line.run(_one(Ask("lock_ticks")))
        publish(broker, T, "a")
        waiting = threading.Thread(target=lambda: claimed.extend(take(sub, wait_s=10)))
        claimed: list[str] = []
        waiting.start()
        with pg_schema.connect(autocommit=True) as watching:
            eventually(
                lambda: _waits(watching), "the lane waits for the turn to tick", timeout_s=10
            )
        system = broker.database.facts.system
        assert line.run(_one(Ask("tick", (system,)))) == [(1,)]
        publish(broker, T, "b")
        connection.commit()
        waiting.join(20)
        assert claimed + drain(sub) == ["a", "b"]


def _one(ask: Ask) -> Any:
    return (yield ask)


def _waits(connection: psycopg.Connection[Any], kind: str = "advisory") -> bool:
    [(count,)] = connection.execute(
        "select count(*) from pg_locks where locktype = %s and not granted", (kind,)
    ).fetchall()
    return bool(count)


def test_publishers_wait_for_nobody(pg_schema: Schema):
    """Thirty-two transactions have published to one topic, and not one of them has committed."""
    once = topic("once", "exactly-once", partitions=4)
    with opened(pg_schema, T, once) as broker, ExitStack() as stack:
        connections = [stack.enter_context(pg_schema.connect()) for _ in range(32)]
        for number, connection in enumerate(connections):
            connection.execute("set lock_timeout = '2s'")
            publish_in(connection, pg_schema, T, str(number))
            publish_in(connection, pg_schema, once, str(number), id=str(number), key=str(number))
        sub, other = lane(broker, T), lane(broker, once)
        assert drain(sub) == drain(other) == []
        for connection in reversed(connections):
            connection.commit()
        assert sorted(map(int, drain(sub))) == sorted(map(int, drain(other))) == list(range(32))


def test_an_identity_of_an_open_transaction_is_waited_for(pg_schema: Schema):
    once = topic("once", "exactly-once")
    with opened(pg_schema, once) as broker, pg_schema.connect() as connection:
        for end, outcome in [("rollback", "Published"), ("commit", "RepeatDropped")]:
            publish_in(connection, pg_schema, once, "body", id=end)
            found: list[Any] = []
            repeat = message(once, "body", id=end)
            waiting = threading.Thread(
                target=lambda m=repeat, f=found: f.extend(broker.publish([m]))
            )
            waiting.start()
            with pg_schema.connect(autocommit=True) as watching:
                eventually(lambda: _waits(watching, "transactionid"), "it waits")
            getattr(connection, end)()
            waiting.join(20)
            assert [type(one).__name__ for one in found] == [outcome]
        assert drain(lane(broker, once)) == ["body", "body"]


# --- any interleaving


@dataclass
class Writer:
    """A transaction, with what it has published; ``levels``: savepoints within it."""

    connection: psycopg.Connection[Any]
    sent: list[tuple[str, str]] = field(default_factory=list)
    levels: list[int] = field(default_factory=list)


@pytest.mark.parametrize("seed", range(12))
def test_any_interleaving_loses_nothing_and_keeps_keys_in_order(pg_schema: Schema, seed: int):
    """Transactions begin, publish, go back to savepoints and end in any order, between claims.

    Of each key, what was committed before another was published comes before it.
    """
    chance = random.Random(seed)
    committed: list[str] = []
    before: dict[str, set[str]] = {}
    done_of_key: dict[str, set[str]] = defaultdict(set)
    got: list[str] = []
    with opened(pg_schema, ORDERED) as broker, ExitStack() as stack:
        lanes = [lane(broker, ORDERED, order_by_key=True) for _ in range(2)]
        writers = [Writer(stack.enter_context(pg_schema.connect())) for _ in range(5)]
        for number in range(250):
            writer = chance.choice(writers)
            match chance.choice(["publish"] * 5 + ["mark", "back", "end", "end", "claim", "claim"]):
                case "publish":
                    key, body = chance.choice("abc"), f"{number}"
                    before[body] = set(done_of_key[key])
                    publish_in(writer.connection, pg_schema, ORDERED, body, key=key)
                    writer.sent.append((key, body))
                case "mark":
                    writer.connection.execute("savepoint s")
                    writer.levels.append(len(writer.sent))
                case "back" if writer.levels:
                    writer.connection.execute("rollback to s; release s")
                    del writer.sent[writer.levels.pop() :]
                case "end" if chance.random() < 0.75:
                    writer.connection.commit()
                    for key, body in writer.sent:
                        done_of_key[key].add(body)
                        committed.append(body)
                    writer.sent, writer.levels = [], []
                case "end":
                    writer.connection.rollback()
                    writer.sent, writer.levels = [], []
                case "claim":
                    got += take(chance.choice(lanes), limit=chance.choice([1, 3, 100]))
                case _:
                    pass
        for writer in writers:
            writer.connection.rollback()
        got += drain(lanes[0])
    assert sorted(got, key=int) == sorted(committed, key=int), f"seed {seed}"
    place = {body: at for at, body in enumerate(got)}
    inverted = [(a, b) for b in got for a in before[b] if place[a] > place[b]]
    assert not inverted, f"seed {seed}: delivered before what was committed before it: {inverted}"


def test_a_tick_finds_nothing_where_the_ids_are_another_clusters(pg_schema: Schema):
    with opened(pg_schema, T) as broker:
        publish(broker, T, "a")
        assert broker.database.write(lambda: ticks.tick(1)) == 0
        assert list(claim(lane(broker, T)))


def test_publishers_of_the_same_identities_do_not_wait_in_a_circle(pg_schema: Schema):
    """Two relays after a failover send the same batch, each in an order of its own."""
    once = topic("once", "exactly-once", partitions=2)
    with opened(pg_schema, once) as broker:
        kinds: Counter[str] = Counter()
        together = threading.Barrier(3)

        def send(order: int) -> None:
            for number in range(20):
                together.wait(20)
                batch = [message(once, "x", id=f"{number}-{n}") for n in range(40)]
                kinds.update(
                    type(o).__name__ for o in broker.publish(batch[:: 1 - 2 * (order % 2)])
                )

        threads = [threading.Thread(target=send, args=(order,)) for order in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert kinds == {"Published": 800, "RepeatDropped": 1_600}
        assert len(drain(lane(broker, once))) == 800

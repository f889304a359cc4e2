"""A person's messages removed beside workers and publishers that are in the middle of something."""

from __future__ import annotations

import pytest

import duly
from duly.errors import BrokerUnavailable
from duly.guarantees import Dead, Retry
from duly.inspection.erasing import Erasing, Whose
from duly.sql import log
from duly.sql.publishing import identity_hash
from duly.worker import Worker
from tests.postgres.brokers import claim, drain, lane, message, opened, publish, publish_in, topic
from tests.postgres.test_broker_steering import ask, meanwhile, waiting, within
from tests.servers.postgres import Schema
from tests.waiting import eventually

T = topic(retention_s=3600.0)
ONCE = topic("once", "exactly-once")
ANN = Whose(id="ann", source="tests")


def erase(broker: Erasing, whose: Whose = ANN) -> int:
    return sum(broker.erase(whose))


def everything(schema: Schema, tables_in: str = "") -> str:
    """Every row of every table of duly's, as text."""
    name_of = tables_in or schema.duly
    with schema.connect(autocommit=True) as connection:
        tables = connection.execute(
            "select tablename from pg_tables where schemaname = %s", (name_of,)
        ).fetchall()
        found: list[str] = []
        for (name,) in tables:
            rows = connection.execute(f"select t::text from {name_of}.{name} t".encode())
            found += [row for (row,) in rows]
    return "\n".join(found)


def test_nothing_of_it_is_in_any_table(pg_schema: Schema):
    with opened(pg_schema, T, ONCE) as broker:
        sub = lane(broker, T)
        for n in range(3):
            publish(broker, T, "yellow house", id=f"ann-{n}", key="ann@example.org")
        publish(broker, ONCE, "yellow house", id="ann-once", key="ann@example.org")
        first, second, _ = [delivery.receipt for delivery in claim(sub)]
        sub.settle([Dead(first, "yellow"), Retry(second, 60.0, "yellow")])
        assert broker.holdings(Whose(key="ann@example.org")) == 5
        assert erase(broker, Whose(key="ann@example.org")) == 5
        left = everything(pg_schema)
        for secret in ("yellow", "ann"):
            assert secret not in left
            assert secret.encode().hex() not in left


def test_who_is_killed_in_the_middle_leaves_no_trace_of_what_is_gone(pg_schema: Schema):
    """What failed after the first look goes with the message: later a key finds nothing."""
    ann = Whose(key="ann@example.org")
    with opened(pg_schema, T) as broker:
        sub = lane(broker, T)
        for n in range(101):
            publish(broker, T, "yellow house", id=f"ann-{n}", key="ann@example.org")
        killed = broker.erase(ann)
        assert next(killed) == 100
        [last] = [delivery.receipt for delivery in claim(sub, 101)]
        sub.settle([Retry(last, 60.0, "yellow house")])
        assert next(killed) == 1
        del killed
        assert broker.holdings(ann) == 0
        assert "yellow" not in everything(pg_schema)


def test_what_another_transaction_has_published_comes_with_it(pg_schema: Schema):
    """It is nobody's yet: who erases does so again once it is there."""
    with opened(pg_schema, T) as broker, pg_schema.connect() as late:
        publish_in(late, pg_schema, T, "a", id="ann")
        assert erase(broker) == 0
        late.commit()
        assert erase(broker) == 1
        assert drain(lane(broker, T)) == []


def test_a_dead_letter_that_is_just_being_written_goes_too(pg_schema: Schema):
    with opened(pg_schema, T) as broker:
        sub = lane(broker, T)
        publish(broker, T, "a", id="ann")
        [held] = claim(sub)
        with within(pg_schema) as (connection, line):
            line.run(log.settle([Dead(held.receipt, "no such house")], 0))
            with meanwhile(pg_schema, lambda: erase(broker)):
                connection.commit()
        assert list(broker.dead_letters()) == []
        assert "such house" not in everything(pg_schema)


def test_a_repeat_that_is_just_being_published_is_dropped(pg_schema: Schema):
    """Between the identity that goes and its hash that comes there is nothing to pass through."""
    with opened(pg_schema, ONCE) as broker, pg_schema.connect() as late:
        it = message(ONCE, "a", id="ann")
        broker.publish([it])
        publish_in(late, pg_schema, ONCE, "b", id="bob")
        with meanwhile(pg_schema, lambda: erase(broker)):
            late.commit()
        assert [type(o).__name__ for o in broker.publish([it])] == ["RepeatDropped"]
        other = message(ONCE, "c", id="cid")
        told = broker.publish([it, other, message(ONCE, "another body", id="ann")])
        assert [type(o).__name__ for o in told] == ["RepeatDropped", "Published", "RepeatDropped"]
        assert drain(lane(broker, ONCE)) == ["b", "c"]


def test_a_publisher_that_stays_open_is_named_and_nothing_is_half(pg_schema: Schema):
    with opened(pg_schema, ONCE) as broker, pg_schema.connect() as late:
        broker.publish([message(ONCE, "a", id="ann")])
        publish_in(late, pg_schema, ONCE, "b", id="bob")
        with pytest.raises(BrokerUnavailable, match="open for long"):
            erase(broker)
        assert broker.holdings(ANN) == 1
        late.rollback()
        assert erase(broker) >= 1
        assert broker.holdings(ANN) == 0


def test_the_server_makes_the_same_hash(pg_schema: Schema):
    with opened(pg_schema, ONCE), pg_schema.connect() as connection:
        for identity in (("once", "shop", "o-1"), ("ü", "a\\b", "'x' \N{SNOWMAN}")):
            query = f"select {pg_schema.duly}.identity_hash(%s, %s, %s)"
            rows = connection.execute(query.encode(), identity).fetchall()
            assert rows == [(identity_hash(*identity),)]


def test_it_is_forgotten_with_the_identities(pg_schema: Schema):
    short = topic("short", "exactly-once", identity_retention_s=0.0)
    with opened(pg_schema, short) as broker:
        broker.publish([message(short, "a", id="ann")])
        erase(broker)
        with within(pg_schema) as (_, line):
            line.run(ask("forget_erased", 1 << 50))
            assert line.run(ask("erase_topics", None, "ann", "tests", None))
            rows = line.connection.execute(f"select 1 from {pg_schema.duly}.erased".encode())
            assert rows.fetchall() == []


@pytest.mark.parametrize("alone", [False, True])
def test_a_worker_whose_message_is_erased_goes_on(pg_schema: Schema, alone: bool):
    mark = "&" if "?" in pg_schema.url else "?"
    app = duly.App("tests", broker=f"{pg_schema.url}{mark}schema={pg_schema.duly}")
    seen: list[str] = []
    orders: duly.Topic[str] = duly.Topic("orders", str, guarantee="at-least-once", retention_s=60)

    @app.consumer(orders, name="sub", guarantee="at-least-once")
    def handle(order: str) -> None:
        seen.append(order)
        if order == "ann":
            assert app.erase(id="ann") == 1
            raise ValueError(order)

    with app, Worker(app):
        app.publish(orders, "ann", id="ann")
        if alone:
            eventually(lambda: "ann" in seen, "it is handled, and nothing else of its claim")
        app.publish(orders, "bob", id="bob")
        eventually(lambda: "bob" in seen, "the next one is handled")
        assert waiting(pg_schema) == 0
    assert seen.count("ann") == 1

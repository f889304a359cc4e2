"""Where the log lies: schemas, versions, roles with few rights, and what is swept away."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources

import psycopg
import pytest

import duly
from duly.broker import Published, RepeatDropped
from duly.brokers.postgres import PostgresBroker
from duly.errors import BrokerUnusable, ConfigurationError
from duly.guarantees import Dead
from duly.worker import Worker
from tests.postgres.brokers import claim, drain, lane, opened, publish, take, topic
from tests.servers.postgres import PostgresServer, Schema
from tests.waiting import eventually

T = topic()
ONCE = topic("once", "exactly-once")


def test_two_schemas_are_two_brokers(pg_schema: Schema):
    with opened(pg_schema, T) as here, opened(Schema(pg_schema.database, pg_schema.name), T):
        other = PostgresBroker(pg_schema.url, schema=f"{pg_schema.name}_two_duly")
        try:
            other.declare([T])
            assert other.capabilities.database != here.capabilities.database
            publish(here, T, "here")
            publish(other, T, "there")
            assert drain(lane(here, T)) == ["here"]
            assert drain(lane(other, T)) == ["there"]
        finally:
            other.close()
            with pg_schema.connect(autocommit=True) as connection:
                connection.execute(f"drop schema {pg_schema.name}_two_duly cascade".encode())


def test_an_app_names_it_by_url(pg_schema: Schema):
    mark = "&" if "?" in pg_schema.url else "?"
    app = duly.App("shop", broker=f"{pg_schema.url}{mark}schema={pg_schema.duly}")
    orders = duly.Topic("orders", dict[str, int], guarantee="exactly-once")
    assert app.publish(orders, {"n": 1}, id="one") == Published("one")
    assert app.publish(orders, {"n": 1}, id="one") == RepeatDropped("one")
    app.close()
    with opened(pg_schema) as broker:
        broker.declare([orders])
        assert drain(lane(broker, orders)) == ['{"n":1}']


def test_a_newer_schema_is_refused(pg_schema: Schema):
    with opened(pg_schema, T):
        pass
    with pg_schema.connect(autocommit=True) as connection:
        connection.execute(f"update {pg_schema.duly}.meta set version = 99, oldest = 98".encode())
    with pytest.raises(
        BrokerUnusable, match="brought this database to schema 99, which code of schema 98"
    ):
        PostgresBroker(pg_schema.url, schema=pg_schema.duly)


def test_roles_need_no_more_than_the_script_grants(pg_server: PostgresServer):
    """An owner makes the schema; the application's role makes nothing and owns nothing."""
    owner = Schema(pg_server.url, "public")
    with opened(owner, T, ONCE):
        pass
    with owner.connect(autocommit=True) as admin:
        admin.execute("revoke all on schema public from public")
        admin.execute("create role shop login")
        for statement in _grants("shop", owner.duly):
            admin.execute(statement)
    theirs = Schema(pg_server.url_of("duly", user="shop"), "public")
    new = topic("new", partitions=4)
    with opened(theirs, T, ONCE, new) as broker:
        publish(broker, T, "a", "b")
        publish(broker, ONCE, "once", id="one")
        publish(broker, new, "keyed", key="k")
        sub = lane(broker, T)
        deliveries = claim(sub)
        assert list(sub.settle([Dead(deliveries[0].receipt, "no")])) == []
        assert len(broker.dead_letters()) == 1
        assert broker.replay(broker.dead_letters()) == []
        sub.close()
        assert sorted(drain(lane(broker, T))) == ["a", "b"]
        assert drain(lane(broker, new, order_by_key=True)) == ["keyed"]
        assert drain(lane(broker, ONCE)) == ["once"]
        broker._sweeper._sweep()
        with owner.connect(autocommit=True) as admin:
            admin.execute(f"revoke delete on {owner.duly}.messages from shop".encode())
        publish(broker, T, "c")
        broker._sweeper._claimed = 1_000_000
        assert take(lane(broker, T)) == ["c"], "a sweep that fails costs no claim"
        with theirs.connect() as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("create table public_duly.mine (x int)")


def test_a_role_with_these_rights_works_publishes_and_operates(pg_server: PostgresServer):
    owner = Schema(pg_server.url, "public")
    mark = "&" if "?" in owner.url else "?"
    with duly.App("shop", broker=f"{owner.url}{mark}schema={owner.duly}") as made:
        made.backends()
    with owner.connect(autocommit=True) as admin:
        admin.execute("create table charges (n integer)")
        admin.execute("create role shop login")
        admin.execute("grant insert on charges to shop")
        for statement in _grants("shop", owner.duly):
            admin.execute(statement)
        # A later version's, which its owner makes.
        admin.execute(f"create table {owner.duly}.later (n integer)".encode())
        may = f"select has_table_privilege('shop', '{owner.duly}.later', 'insert, delete')"
        assert admin.execute(may.encode()).fetchall() == [(True,)]
    url = Schema(pg_server.url_of("duly", user="shop"), "public").url
    app = duly.App("shop", broker=f"{url}{mark}schema={owner.duly}")
    orders: duly.Topic[int] = duly.Topic("orders", int, guarantee="exactly-once")
    app.every("1h", orders, 0, name="hourly")

    @app.consumer(orders, name="billing", guarantee="exactly-once")
    def charge(n: int, tx: duly.Transaction[psycopg.Connection]) -> None:
        if n == 13:
            raise duly.Reject("no")
        tx.connection.execute("insert into charges values (%s)", (n,))

    def charged() -> list[int]:
        with owner.connect(autocommit=True) as admin:
            return [n for (n,) in admin.execute("select n from charges")]

    with app, Worker(app):
        app.publish_many(orders, [1, 13, 2], ids=["1", "13", "2"])
        eventually(lambda: {1, 2} <= set(charged()) and app.dead_letters(), "it works")
        assert app.pause("billing")
        assert app.resume("billing")
        assert app.trace("1")
        assert app.erase(id="2") >= 1
        broker = app.backends()[0]
        assert isinstance(broker, PostgresBroker)
        assert {each.level for each in broker.examine()} == {"ok"}
        assert app.discard(app.dead_letters()) == 1
        assert app.drop("billing")


def _grants(role: str, schema: str) -> Iterator[bytes]:
    script = resources.files("duly.sql").joinpath("postgres_grants.sql").read_text()
    code = "\n".join(line for line in script.splitlines() if not line.startswith("--"))
    code = code.replace("duly_app", role).replace("schema duly", f"schema {schema}")
    for statement in code.split(";"):
        if statement.strip():
            yield statement.encode()


def test_a_role_without_the_schema_says_what_to_do(pg_server: PostgresServer):
    with psycopg.connect(pg_server.url, autocommit=True) as admin:
        admin.execute("create role nobody_in_particular login")
    with pytest.raises(BrokerUnusable, match="role"):
        PostgresBroker(pg_server.url_of("duly", user="nobody_in_particular"))


# --- retention


def counts(schema: Schema) -> dict[str, int]:
    found = {}
    with schema.connect() as connection:
        for table in ("messages", "runs", "arrivals", "cursors", "claims", "ticks"):
            count = f"select count(*) from {schema.duly}.{table}".encode()
            [(found[table],)] = connection.execute(count).fetchall()
    return found


def test_what_everybody_is_done_with_goes_beside_an_idle_transaction(pg_schema: Schema):
    """It holds a lock on every table, for reading, and has no snapshot: nothing waits for it."""
    brief = topic("brief", retention_s=0.0)
    with opened(pg_schema, brief) as broker, pg_schema.connect() as idle:
        sub = lane(broker, brief)
        for number in range(30):
            publish(broker, brief, *(f"{number}-{n}" for n in range(20)))
            assert len(take(sub)) == 20
        for table in counts(pg_schema):
            idle.execute(f"select 1 from {pg_schema.duly}.{table} limit 1".encode())
        publish(broker, brief, "parked", "last")
        assert len(claim(sub)) == 2
        broker._sweeper._tidy_s = 0.0
        broker._sweeper._sweep()
        left = counts(pg_schema)
        assert left["messages"] == 2
        assert left["runs"] <= 2
        assert left["cursors"] == 1
        assert left["arrivals"] == 0
        assert drain(lane(broker, brief)) == []
        sub.close()
        assert drain(lane(broker, brief)) == ["parked", "last"]


def test_the_log_grows_no_further_than_what_it_holds_at_once(pg_server: PostgresServer):
    """What is deleted leaves room that the next messages take, once it is vacuumed: by hand here,
    by autovacuum elsewhere. An idle transaction that has written keeps the room until it ends;
    hence a server that no other test has transactions on.
    """
    pg_schema = Schema(pg_server.url, "place").create()
    brief = topic("brief", retention_s=0.0)
    body = "x" * 500
    with opened(pg_schema, brief) as broker, pg_schema.connect(autocommit=True) as watching:
        sub = lane(broker, brief)

        def pages_after_a_round() -> int:
            publish(broker, brief, *[body] * 1_000)
            assert len(take(sub, limit=1_000)) == 1_000
            broker._sweeper._sweep()
            assert counts(pg_schema)["messages"] == 0
            watching.execute(f"vacuum {pg_schema.duly}.messages".encode())
            size = f"select pg_relation_size('{pg_schema.duly}.messages') / 8192"
            [(pages,)] = watching.execute(size.encode()).fetchall()
            return int(pages)

        full = 1_000 * len(body) / 8192
        assert max(pages_after_a_round() for _ in range(6)) < 2 * full
        with pg_schema.connect() as idle:
            idle.execute("select pg_current_xact_id()")
            held = [pages_after_a_round() for _ in range(4)]
            assert held[-1] > 3 * full, "nothing of it can be taken yet"
        assert max(pages_after_a_round() for _ in range(6)) <= held[-1] + full


def test_positions_go_on_where_everything_was_swept_away(pg_schema: Schema):
    brief = topic("brief", retention_s=0.0)
    with opened(pg_schema, brief) as broker:
        sub = lane(broker, brief)
        for number in range(3):
            publish(broker, brief, f"a{number}", f"b{number}")
            assert take(sub) == [f"a{number}", f"b{number}"]
            broker._sweeper._tidy_s = 0.0
            broker._sweeper._sweep()
            assert counts(pg_schema)["messages"] == 0
        assert lane(broker, brief, name="new", start="earliest").claim(1, 1, 0.0) == []


def test_a_dead_letter_comes_back_though_the_log_forgot_it(pg_schema: Schema):
    brief = topic("brief", retention_s=0.0)
    with opened(pg_schema, brief) as broker:
        sub = lane(broker, brief)
        publish(broker, brief, "a", "bad", "c")
        deliveries = claim(sub)
        assert (
            list(
                sub.settle([Dead(d.receipt, "no") for d in deliveries if b"bad" in d.message.body])
            )
            == []
        )
        sub.close()
        sub = lane(broker, brief)
        assert drain(sub) == ["a", "c"]
        publish(broker, brief, "later")
        assert drain(sub) == ["later"]
        broker._sweeper._tidy_s = 0.0
        broker._sweeper._sweep()
        assert counts(pg_schema)["messages"] == 0
        assert broker.replay(broker.dead_letters()) == []
        assert drain(sub) == ["bad"]
        publish(broker, brief, "latest")
        assert drain(sub) == ["latest"]


def test_a_topic_keeps_everything_until_somebody_subscribes(pg_schema: Schema):
    brief = topic("brief", retention_s=0.0)
    with opened(pg_schema, brief, T) as broker:
        publish(broker, brief, "a", "b")
        assert drain(lane(broker, T)) == []
        broker._sweeper._sweep()
        assert drain(lane(broker, brief)) == ["a", "b"]


def test_publishers_tick_where_no_worker_runs(pg_schema: Schema, monkeypatch: pytest.MonkeyPatch):
    """Else the first worker after weeks would go through all of it at once."""
    monkeypatch.setattr("duly.brokers.postgres.ticker._PUBLISHES", 20)
    with opened(pg_schema, T) as broker:
        for number in range(45):
            publish(broker, T, str(number))
        eventually(lambda: counts(pg_schema)["runs"] >= 20, "publishers have ticked")
        assert drain(lane(broker, T)) == [str(number) for number in range(45)]


def test_an_option_nobody_honours_is_refused(pg_schema: Schema):
    mark = "&" if "?" in pg_schema.url else "?"
    app = duly.App("shop", broker=f"{pg_schema.url}{mark}shcema=x")
    with pytest.raises(ConfigurationError):
        app.publish(T, "a")

"""What ``duly doctor`` finds on a PostgreSQL server, each with what to do about it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from duly.brokers.postgres import PostgresBroker
from duly.cli import run
from duly.inspection.health import Finding
from duly.message import Message, now_ms
from duly.sql.postgres import Database, health
from duly.stores.postgres import PostgresStore
from tests.cli.conftest import shop_on, url_of
from tests.postgres.brokers import lane, opened, topic
from tests.servers.postgres import PostgresServer, Schema

T = topic()


def found(database: Database) -> dict[str, Finding]:
    return {finding.what: finding for finding in health.examine(database)}


@contextmanager
def looked_at(url: str, schema: str = "duly") -> Iterator[dict[str, Finding]]:
    """The findings about a server, by what they are about."""
    database = Database(url, schema=schema)
    try:
        yield found(database)
    finally:
        database.close()


@pytest.fixture
def doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Callable[[str], Any]:
    """``duly doctor --json`` of an application on this URL: the status, and the findings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def call(url: str) -> tuple[int, list[dict[str, str]]]:
        (tmp_path / "shop.py").write_text(shop_on(url))
        monkeypatch.delitem(sys.modules, "shop", raising=False)
        status = run(["doctor", "shop:app", "--json"])
        return status, json.loads(capsys.readouterr().out)

    return call


def test_nothing_is_wrong_with_a_server_as_it_is_installed(
    pg_server: PostgresServer, doctor: Callable[[str], Any]
):
    status, findings = doctor(pg_server.url)
    assert status == 0, findings
    assert {each["level"] for each in findings} == {"ok"}, findings
    told = {each["what"]: each["found"] for each in findings}
    assert told["broker"] == "PostgreSQL: reachable"
    assert told["broker, durability"] == "fsync and full_page_writes are on"
    assert told["broker, connection"] == "to the server itself"
    assert told["broker, clock"] == "in step"
    assert "of 197 in use" in told["broker, connections"]
    assert told["contract"] == "kept for 1 consumers"


def test_a_server_that_loses_what_it_acknowledged(pg_schema: Schema, doctor: Callable[[str], Any]):
    """The server that tests share is such a one."""
    with psycopg.connect(pg_schema.url) as connection:
        if connection.execute("show fsync").fetchall() == [("on",)]:
            pytest.skip("another server was named for the tests, which keeps what it acknowledges")
    status, findings = doctor(url_of(pg_schema))
    assert status == 1
    wrong = {each["what"]: each["remedy"] for each in findings if each["level"] == "wrong"}
    assert set(wrong) == {"broker, fsync", "broker, full_page_writes"}
    assert all("postgresql.conf" in remedy for remedy in wrong.values())


def test_a_server_that_is_not_there(doctor: Callable[[str], Any]):
    status, findings = doctor("postgresql://duly@127.0.0.1:1/shop")
    assert status == 1
    assert findings[-1]["what"] == "broker or store"
    assert "127.0.0.1" in findings[-1]["found"]


def test_a_standby(pg_server: PostgresServer, doctor: Callable[[str], Any]):
    with pg_server.standby() as standby:
        status, findings = doctor(standby.url)
    assert status == 1
    assert "only reads (a standby)" in findings[-1]["found"]


def test_a_primary_that_has_become_a_standby_or_went_away(pg_server: PostgresServer):
    broker = PostgresBroker(pg_server.url)
    pg_server.stop()
    [server] = [each for each in health.examine(broker.database) if each.level == "wrong"]
    assert server.what == "server"
    pg_server.start()
    broker.close()


def test_a_role_that_only_reads_or_does_not_wait_for_its_commits(pg_schema: Schema):
    with opened(pg_schema, T):
        pass
    for option, what, level in (
        ("default_transaction_read_only=on", "server", "wrong"),
        ("synchronous_commit=off", "synchronous_commit", "warning"),
    ):
        url = pg_schema.url.replace("options=", f"options=-c{option.replace('=', '%3D')}%20")
        with looked_at(url, pg_schema.duly) as findings:
            assert findings[what].level == level, findings[what]
            assert "alter role" in findings[what].remedy


def test_few_connections_are_left():
    settings = ["max_connections=13", "superuser_reserved_connections=2"]
    with PostgresServer(durable=False, settings=settings) as server, looked_at(server.url) as told:
        assert told["connections"].found == "1 of 11 in use"
        assert told["connections"].level == "ok"
        others = [psycopg.connect(server.url) for _ in range(4)]
        with looked_at(server.url) as later:
            assert later["connections"].level == "warning"
            assert "max_connections" in later["connections"].remedy
        for other in others:
            other.close()


def test_somebody_who_holds_an_old_snapshot(pg_schema: Schema, monkeypatch: pytest.MonkeyPatch):
    with opened(pg_schema, T) as broker, pg_schema.connect() as other:
        monkeypatch.setattr(health, "_LONG_SNAPSHOT_S", 0)
        other.execute("set application_name = 'a report'")
        other.commit()
        other.execute("begin isolation level repeatable read")
        other.execute("select count(*) from pg_class")
        told = [each for each in broker.examine() if each.what == "snapshots"]
        mine = [each for each in told if "(a report)" in each.found]
        assert [each.level for each in mine] == ["warning"]
        assert f"pg_terminate_backend({other.info.backend_pid})" in mine[0].remedy


def test_a_transaction_that_was_prepared_and_forgotten(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(health, "_LONG_SNAPSHOT_S", 0)
    with PostgresServer(durable=False, settings=["max_prepared_transactions=2"]) as server:
        with psycopg.connect(server.url, autocommit=True) as connection:
            connection.execute("create table t (a integer)")
            connection.execute("begin; insert into t values (1); prepare transaction 'lost'")
        with looked_at(server.url) as told:
            assert "'lost' was prepared" in told["snapshots"].found
            assert "ROLLBACK PREPARED" in told["snapshots"].remedy


def test_transaction_ids_that_come_to_their_end(pg_schema: Schema, monkeypatch: pytest.MonkeyPatch):
    for name, level in (("_OLD_XIDS", "warning"), ("_TOO_OLD_XIDS", "wrong")):
        monkeypatch.setattr(health, name, -1)
        with looked_at(pg_schema.url) as told:
            assert told["transaction ids"].level == level
            assert "vacuum freeze" in told["transaction ids"].remedy


def test_a_host_whose_clock_is_another(pg_schema: Schema, monkeypatch: pytest.MonkeyPatch):
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 3600)
    with looked_at(pg_schema.url) as told:
        assert told["clocks"].level == "warning"
        assert "+3,6" in told["clocks"].found
        assert "NTP" in told["clocks"].remedy


def test_messages_of_a_time_that_has_not_come(pg_schema: Schema):
    with opened(pg_schema, T) as broker:
        assert [each.level for each in broker.examine() if each.what == "clock"] == ["ok"]
        broker.publish([Message(T.name, "tests", "late", b"x", now_ms() + 3_600_000)])
        lane(broker, T)  # which gives it its position
        [told] = [each for each in broker.examine() if each.what == "clock"]
        assert told.level == "warning"
        assert "from now" in told.found


def test_somebody_elses_trigger(pg_schema: Schema):
    with opened(pg_schema, T) as broker:
        with pg_schema.connect(autocommit=True) as connection:
            connection.execute(
                "create function audit() returns trigger language plpgsql as "
                "'begin return new; end'"
            )
            connection.execute(
                f"create trigger watch before insert on {pg_schema.duly}.messages "
                "for each row execute function audit()".encode()
            )
        told = {each.what: each for each in broker.examine()}
        assert told["triggers"].level == "wrong"
        assert "messages.watch" in told["triggers"].found


def test_a_store_apart_is_looked_at_too(pg_schema: Schema):
    store = PostgresStore(pg_schema.url, schema=pg_schema.duly)
    told = {each.what for each in store.examine()}
    assert {"PostgreSQL", "connections", "snapshots", "tables"} <= told
    store.close()


def test_a_plain_role_sees_enough(pg_server: PostgresServer):
    broker = PostgresBroker(pg_server.url)
    with psycopg.connect(pg_server.url, autocommit=True) as connection:
        connection.execute("create role plain login")
    with looked_at(pg_server.url_of("duly", user="plain")) as told:
        assert {each.level for each in told.values()} == {"ok"}, told
    broker.close()

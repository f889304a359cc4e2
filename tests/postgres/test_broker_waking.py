"""Lanes are woken by what others publish, at no cost to those; where they are not, they look."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from zlib import crc32

import psycopg
import pytest

from duly.brokers.postgres import PostgresBroker, listener
from duly.brokers.postgres import lane as lanes
from tests.postgres.brokers import claim, drain, lane, opened, publish, publish_in, take, topic
from tests.servers.postgres import PostgresServer, Schema
from tests.waiting import eventually

T = topic()


def test_a_waiting_lane_is_woken_by_another_process_soon(pg_schema: Schema):
    """Far sooner than it would look by itself; the fastest of some, for the machine may be busy."""
    with opened(pg_schema, T) as here, opened(pg_schema, T) as there:
        sub = lane(here, T)
        took_s = []
        for number in range(8):
            found: list[str] = []
            waiting = threading.Thread(target=lambda f=found: f.extend(take(sub, wait_s=10)))
            waiting.start()
            publish(there, T, str(number))
            sent_s = time.monotonic()
            waiting.join(20)
            took_s.append(time.monotonic() - sent_s)
            assert found == [str(number)]
        assert min(took_s) < 0.1


def test_what_wakes_it_is_the_news_and_not_a_look(
    pg_schema: Schema, monkeypatch: pytest.MonkeyPatch
):
    """Lanes that look every half minute are quick all the same."""
    monkeypatch.setattr(listener, "LISTENING_S", 30.0)
    monkeypatch.setattr(lanes, "_LOOK_S", 30.0)
    with opened(pg_schema, T) as here, opened(pg_schema, T) as there:
        sub = lane(here, T)
        assert list(claim(sub)) == []
        waits, wait = threading.Event(), here._bell.wait

        def waiting_now(*of: Any) -> None:
            waits.set()
            wait(*of)

        monkeypatch.setattr(here._bell, "wait", waiting_now)
        found: list[str] = []
        waiting = threading.Thread(target=lambda: found.extend(take(sub, wait_s=15)))
        waiting.start()
        assert waits.wait(20)
        publish(there, T, "a")
        waiting.join(10)
        in_time = list(found)
        waiting.join(20)
        assert in_time == ["a"]


def test_notices_are_few_and_not_the_publishers(pg_schema: Schema):
    """Thirty-two publishers at once: one NOTIFY stands for many publishes."""
    with opened(pg_schema, T) as broker, ExitStack() as stack:
        hearing = stack.enter_context(pg_schema.connect(autocommit=True))
        channel = f"duly_{crc32(broker.capabilities.database.encode()):08x}"  # type: ignore[union-attr]
        hearing.execute(f'listen "{channel}"'.encode())
        publishing = threading.Barrier(32)

        def run(name: int) -> None:
            publishing.wait(20)
            for number in range(20):
                publish(broker, T, f"{name}-{number}")

        began_s = time.monotonic()
        threads = [threading.Thread(target=run, args=(name,)) for name in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        took_s = time.monotonic() - began_s
        heard = len(list(hearing.notifies(timeout=1.0)))
        assert 1 <= heard <= took_s / 0.01 + 2, "at most one in ten milliseconds"
        assert heard < 640 / 2
        assert len(drain(lane(broker, T))) == 640


def test_a_transaction_of_the_applications_own_is_found_by_looking(pg_schema: Schema):
    """Nobody rings for what psql or a trigger inserted."""
    with opened(pg_schema, T) as broker, pg_schema.connect() as own:
        sub = lane(broker, T)
        assert list(claim(sub)) == []
        publish_in(own, pg_schema, T, "a")
        own.commit()
        assert take(sub, wait_s=10) == ["a"]


class _Deaf(psycopg.Connection[Any]):
    """As behind a pooler: LISTEN is taken, and what is notified goes elsewhere."""

    def notifies(self, **_: Any) -> Iterator[Any]:  # type: ignore[override]
        return iter(())


def test_behind_a_pooler_lanes_look_and_it_says_so(
    pg_schema: Schema, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("duly.brokers.postgres.listener._ECHO_S", 0.1)
    broker = PostgresBroker(lambda: _Deaf.connect(pg_schema.url), schema=pg_schema.duly)
    with opened(pg_schema, T) as there, caplog.at_level(logging.WARNING, "duly.postgres"):
        broker.declare([T])
        sub = lane(broker, T)
        assert "PgBouncer" in caplog.text
        found: list[str] = []
        waiting = threading.Thread(target=lambda: found.extend(take(sub, wait_s=10)))
        waiting.start()
        publish(there, T, "a")
        waiting.join(20)
        assert found == ["a"]
        # Its session does not say whether it lives: others go by its lease.
        publish(there, T, "b")
        assert len(claim(sub)) == 1
        [holder] = there.holders()
        assert holder.alive
        assert list(claim(lane(there, T), wait_s=1.5)) == []
        broker.close()
        assert take(lane(there, T)) == ["b"]


@pytest.mark.slow
def test_a_held_snapshot_slows_nothing_down(pg_server: PostgresServer):
    """Somebody's report, open since before the first message: no dead row can be removed.

    Of the last claims each looks at about as many pages as the first did, as soon as the planner
    knows that the tables have grown; the server's own autovacuum tells it within a minute.
    """
    schema = Schema(pg_server.url, "public")
    ordered = topic("ordered", partitions=2)
    with schema.connect() as report:
        report.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        report.execute("select count(*) from pg_class")

        def pages(rounds: int) -> float:
            """Pages looked at by a round: publish, claim and settle one message of each topic."""
            before = _pages(schema)
            with opened(schema, T, ordered) as broker:
                lanes = {T: lane(broker, T), ordered: lane(broker, ordered, order_by_key=True)}
                for number in range(rounds):
                    for of, sub in lanes.items():
                        publish(broker, of, str(number), key=str(number % 7))
                        assert take(sub) == [str(number)]
            return (_pages(schema) - before) / rounds

        pages(50)
        first = pages(100)
        pages(800)
        with schema.connect(autocommit=True) as autovacuum:
            autovacuum.execute("analyze")
        pages(10)
        last = pages(100)
        assert last < 3 * first, f"{first:.0f} pages a round at first, {last:.0f} at last"


def _pages(schema: Schema) -> int:
    """Pages that were looked at in the tables and indexes of duly so far.

    Sessions report what they did when they like, and all of it when they end.
    """
    with schema.connect(autocommit=True) as watching:

        def are_gone() -> bool:
            [(others,)] = watching.execute(
                "select count(*) from pg_stat_activity where backend_type = 'client backend' "
                "and pid <> pg_backend_pid()"
            ).fetchall()
            return int(others) <= 1  # the report's

        eventually(are_gone, "the sessions of who has closed end")
        [(count,)] = watching.execute(
            "select sum(heap_blks_hit + heap_blks_read + idx_blks_hit + idx_blks_read)::bigint "
            "from pg_statio_user_tables where schemaname = 'duly' or schemaname like '%_duly'"
        ).fetchall()
        return int(count or 0)

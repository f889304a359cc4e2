"""The link between a crowd and its server, cut around a COMMIT."""

from __future__ import annotations

import threading
from urllib.parse import urlsplit

import psycopg
import pytest

from duly import Topic
from duly.broker import Published
from duly.brokers.postgres import PostgresBroker
from duly.errors import PublishUnknown
from duly.testing.chaos.link import Cut, Link
from tests.servers.postgres import Schema
from tests.waiting import eventually


@pytest.mark.parametrize(("when", "stands"), [("before COMMIT", []), ("after COMMIT", [(1,)])])
def test_a_cut_is_before_or_after_the_server_knows(
    pg_schema: Schema, when: Cut, stands: list[tuple[int]]
):
    told: list[Cut] = []
    parts = urlsplit(pg_schema.url)
    link = Link(parts.hostname or "127.0.0.1", parts.port or 5432, told.append)
    try:
        with pg_schema.connect() as direct:
            direct.execute("create table rows (n int)")
        login, at, _ = parts.netloc.rpartition("@")
        url = parts._replace(netloc=f"{login}{at}127.0.0.1:{link.port}").geturl()
        connection = psycopg.connect(url)
        link.cut(when)
        # What is set is no COMMIT, though it is named after one.
        connection.execute("set local synchronous_commit = on")
        connection.execute("insert into rows values (1)")
        with pytest.raises(psycopg.OperationalError):
            connection.commit()
        connection.close()
        assert told == [when]
        with pg_schema.connect() as direct:
            assert direct.execute("select n from rows").fetchall() == stands
        psycopg.connect(url).close()
    finally:
        link.close()


@pytest.mark.parametrize(("when", "stands"), [("before COMMIT", 0), ("after COMMIT", 1)])
@pytest.mark.parametrize("before", [0, 1, 10])
def test_a_statement_that_commits_by_itself_is_a_commit(
    pg_schema: Schema, when: Cut, stands: int, before: int
):
    """With its text in it, and prepared, which it is after some times."""
    told: list[Cut] = []
    parts = urlsplit(pg_schema.url)
    link = Link(parts.hostname or "127.0.0.1", parts.port or 5432, told.append)
    login, at, _ = parts.netloc.rpartition("@")
    url = parts._replace(netloc=f"{login}{at}127.0.0.1:{link.port}").geturl()
    topic = Topic("t", str, guarantee="at-least-once")
    broker = PostgresBroker(url, schema=pg_schema.duly)
    try:
        broker.declare([topic])
        for number in range(before):
            [outcome] = broker.publish([topic.message(str(number), source="tests")])
            assert isinstance(outcome, Published)
        link.cut(when)
        [outcome] = broker.publish([topic.message("cut", source="tests")])
        assert isinstance(outcome, PublishUnknown)
        assert told == [when]
        with pg_schema.connect() as direct:
            count = f"select count(*) from {pg_schema.duly}.messages"
            assert direct.execute(count.encode()).fetchall() == [(before + stands,)]
    finally:
        broker.close()
        link.close()


def test_where_nobody_listens_nobody_waits():
    """A server that is down refuses at once, and so does the link to it."""
    link = Link("127.0.0.1", 1, lambda _: None)
    ended = threading.Event()

    def connect() -> None:
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(f"postgresql://duly@127.0.0.1:{link.port}/duly")
        ended.set()

    threading.Thread(target=connect).start()
    eventually(ended.is_set, "the connection was refused")
    link.close()

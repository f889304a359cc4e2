"""The link between a crowd and its server, cut around a COMMIT and what a broker is told."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import struct
import threading
from contextlib import closing
from random import Random
from urllib.parse import urlsplit

import psycopg
import pytest

from duly import Topic
from duly.broker import Published
from duly.brokers.postgres import PostgresBroker
from duly.errors import PublishUnknown
from duly.guarantees import Done
from duly.testing.chaos.link import Cut, Frames, Link, Requests
from tests.rabbitmq.work import awaited, bodies, broker_at, lane_of, message, publish, work_off
from tests.servers.postgres import Schema
from tests.servers.rabbitmq import in_namespace
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


def kafka_request(number: int, size: int = 40) -> bytes:
    return struct.pack(">ih", size, number) + bytes(size - 2)


def test_a_request_of_kafka_is_made_out_wherever_it_is_cut_into_pieces():
    """Produce, a fetch, the commit of a position, the end of a transaction."""
    whole = b"".join(kafka_request(number, 40 + number) for number in (0, 1, 8, 1, 26))
    for size in (1, 3, 5, 6, 7, 44, 46, 100, len(whole)):
        listens = Requests()
        pieces = [whole[at : at + size] for at in range(0, len(whole), size)]
        found = [kind for piece in pieces for kind in listens.to(piece)]
        assert found == ["publish", "ack", "transaction"], size


def test_each_cut_has_its_turn(pg_schema: Schema):
    """One that waits for what nobody asks for does not keep another from its own."""
    told: list[Cut] = []
    parts = urlsplit(pg_schema.url)
    link = Link(parts.hostname or "127.0.0.1", parts.port or 5432, told.append)
    login, at, _ = parts.netloc.rpartition("@")
    url = parts._replace(netloc=f"{login}{at}127.0.0.1:{link.port}").geturl()
    cuts: tuple[Cut, ...] = ("before ack", "before COMMIT", "after COMMIT")
    for cut in cuts:
        link.cut(cut)
    try:
        for _ in range(2):
            connection = psycopg.connect(url)
            connection.execute("select 1")
            with pytest.raises(psycopg.OperationalError):
                connection.commit()
            connection.close()
        assert told == ["before COMMIT", "after COMMIT"]
        psycopg.connect(url).close()
    finally:
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


def test_a_connection_just_accepted_ends_with_the_link():
    """Whoever connects while it closes is not left with an end that nobody holds."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        for _ in range(50):
            link = Link("127.0.0.1", server.getsockname()[1], lambda _: None)
            clients = [socket.create_connection(("127.0.0.1", link.port)) for _ in range(4)]
            link.close()
            for client in clients:
                with client, contextlib.suppress(ConnectionResetError):
                    client.settimeout(5)
                    assert client.recv(1) == b""


@pytest.mark.parametrize("turns", range(5))
def test_a_connection_just_cut_ends_with_the_link(turns: int):
    """So many turns of its loop after the cut."""

    def told(_: Cut) -> None:
        async def ends() -> None:
            for _ in range(turns):
                await asyncio.sleep(0)
            for task in link._tasks:
                task.cancel()

        ending.append(asyncio.get_running_loop().create_task(ends()))

    ending: list[asyncio.Task[None]] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        link = Link("127.0.0.1", server.getsockname()[1], told)
        link.cut("before COMMIT")
        with closing(link), socket.create_connection(("127.0.0.1", link.port)) as client:
            there = server.accept()[0]
            client.sendall(b"Q\0\0\0\x0bcommit\0")
            for end in (there, client):
                with end, contextlib.suppress(ConnectionResetError):
                    end.settimeout(5)
                    assert end.recv(1) == b""


class Between:
    """A link to the node that tests share, and what it told."""

    def __init__(self) -> None:
        self.told: list[Cut] = []
        parts = urlsplit(in_namespace(f"chaos-{secrets.token_hex(4)}"))
        host, port = parts.hostname or "127.0.0.1", parts.port or 5672
        self.link = Link(host, port, self.told.append, Frames)
        login, at, _ = parts.netloc.rpartition("@")
        self.url = parts._replace(netloc=f"{login}{at}127.0.0.1:{self.link.port}").geturl()


@pytest.mark.parametrize(("when", "stands"), [("before publish", 0), ("after publish", 1)])
def test_a_publish_is_cut_before_or_after_the_node_knows(when: Cut, stands: int):
    between = Between()
    with closing(between.link), broker_at(between.url, deadline_s=5.0) as broker:
        lane = lane_of(broker)
        between.link.cut(when)
        [outcome] = broker.publish([message("cut", id="cut")])
        assert isinstance(outcome, PublishUnknown)
        assert between.told == [when]
        publish(broker, "next")
        assert work_off(lane, {"next"}.issubset).count("cut") == stands


def test_an_acknowledgement_that_is_cut_brings_the_message_again():
    between = Between()
    with closing(between.link), broker_at(between.url) as broker:
        lane = lane_of(broker)
        publish(broker, "a")
        [held] = awaited(lane)
        between.link.cut("before ack")
        lane.settle([Done(held.receipt)])
        eventually(lambda: between.told == ["before ack"], "it was cut")
        assert bodies(awaited(lane)) == ["a"]


def test_a_silent_connection_is_given_up_and_does_not_end_by_itself():
    between = Between()
    with closing(between.link), broker_at(f"{between.url}&heartbeat=1") as broker:
        lane = lane_of(broker)
        generation = lane.intake.generation
        while between.link.silence(Random(1)):  # those of publishers and of consumers
            pass
        assert broker.link.is_up
        eventually(lambda: lane.intake.generation > generation, "the silence is noticed")
        # Publishers have a connection of their own, and notice by themselves.
        eventually(
            lambda: isinstance(broker.publish([message("a", id="a")])[0], Published),
            "publishers go on",
        )
        assert set(work_off(lane, {"a"}.issubset)) == {"a"}

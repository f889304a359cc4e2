"""Pipelines: a batch of statements costs a few round trips; errors are found all the same."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from duly.brokers.sqlite import SQLiteBroker
from duly.store import Transaction
from duly.stores.postgres import PostgresStore
from tests.postgres.proxy import Proxy
from tests.postgres.shop import Colour, Shop, orders
from tests.servers.postgres import PostgresServer

NAMES = [f"o-{number}" for number in range(500)]
# One way, so that 500 round trips would take 5 s.
DELAY_S = 0.005


@pytest.fixture
def far(pg_server: PostgresServer) -> Iterator[str]:
    """The URL of a server that is 10 ms away."""
    with Proxy(pg_server.port, delay_s=DELAY_S) as proxy:
        yield proxy.url(pg_server.url)


@pytest.fixture(params=["def", "async def"])
def shop(request: pytest.FixtureRequest, db_path: Path, far: str) -> Iterator[Shop]:
    colour: Colour = request.param
    store = PostgresStore(far)
    shop = Shop(SQLiteBroker(db_path), store, far, colour)
    yield shop
    shop.app.close()
    store.close()


def seconds_for(shop: Shop, names: list[str]) -> float:
    """From the first call of the handler to the last commit."""
    began: list[float] = []
    before = shop.before

    def note(connection: Any, name: str) -> Any:
        began.append(time.monotonic())
        return before(connection, name)

    shop.before = note
    shop.publish(*NAMES)
    with shop.working() as worker:
        shop.wait_for(*names)
        ended = time.monotonic()
        commits = worker.counts()["billing"].commits
    assert commits <= 3, "in few transactions, or it shows nothing"
    return ended - began[0]


def test_a_batch_does_not_wait_for_each_statement(shop: Shop):
    shop.consumer(pipeline=True, batch=500, tx_s=30.0)
    took_s = seconds_for(shop, NAMES)
    assert took_s < 500 * DELAY_S, "not even half of its round trips"
    assert sorted(shop.charged()) == sorted(NAMES)


def test_nor_does_a_batch_handler(db_path: Path, far: str):
    store = PostgresStore(far)
    shop = Shop(SQLiteBroker(db_path), store, far, "def")

    @shop.app.batch_consumer(orders, name="billing", guarantee="exactly-once", batch=500)
    def charge(names: list[str], tx: Transaction[psycopg.Connection]) -> None:
        shop.before(tx.connection, "")
        tx.connection.cursor().executemany(
            "insert into charges (name) values (%s)", [(name,) for name in names]
        )

    assert seconds_for(shop, NAMES) < 500 * DELAY_S
    assert sorted(shop.charged()) == sorted(NAMES)
    shop.app.close()
    store.close()


@pytest.mark.parametrize("name", ["o-250", "o-499"])
def test_an_error_that_surfaces_later_is_the_culprits_alone(
    db_path: Path, pg_server: PostgresServer, name: str
):
    """Of the last message's statement nobody hears before the end of the pipeline."""
    store = PostgresStore(pg_server.url)
    shop = Shop(SQLiteBroker(db_path), store, pg_server.url, "def")
    with psycopg.connect(pg_server.url) as connection:
        connection.execute("create table accounts (name text primary key)")
        connection.execute("insert into accounts values (%s)", (name,))
    shop.before = lambda connection, each: (
        connection.execute("insert into accounts values (%s)", (each,)) and None
    )
    shop.consumer(pipeline=True, batch=500, tx_s=30.0)
    shop.publish(*NAMES)
    shop.work(*(each for each in NAMES if each != name))
    assert shop.dead() == [name]
    shop.app.close()
    store.close()

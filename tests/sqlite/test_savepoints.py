"""Savepoints that handlers set for themselves: none reaches into the effects of another message."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest

import duly
from duly.worker import Worker
from tests.waiting import eventually

Tx = duly.Transaction[sqlite3.Connection]
Colour = Literal["def", "async def"]

orders: duly.Topic[str] = duly.Topic("orders", str, guarantee="at-least-once")
others: duly.Topic[str] = duly.Topic("others", str, guarantee="at-least-once")
ONCE = duly.RetryPolicy(attempts=1)


class Shop:
    """Handlers that first do what their message's own ``before`` says, then charge."""

    def __init__(self, url: str, colour: Colour) -> None:
        self.app = duly.App("shop", broker=url)
        self.colour = colour
        self.calls: list[str] = []
        with self.app.transaction() as tx:
            tx.connection.execute("create table charges (name)")

    def consumer(
        self,
        before: Callable[[sqlite3.Connection, str], object],
        *,
        topic: duly.Topic[str] = orders,
        name: str = "billing",
        **options: Any,
    ) -> None:
        decorate = self.app.consumer(
            topic, name=name, guarantee="exactly-once", retry=ONCE, tx_s=30.0, **options
        )

        def charge(order: str, tx: Tx) -> None:
            self.calls.append(order)
            before(tx.connection, order)
            tx.connection.execute("insert into charges values (?)", (order,))

        async def acharge(order: str, tx: Tx) -> None:
            charge(order, tx)

        decorate(charge if self.colour == "def" else acharge)

    def work(self, *names: str, topic: duly.Topic[str] = orders, consumer: str = "billing") -> int:
        """Work until as many have ended; the number of transactions."""
        self.app.publish_many(topic, names)
        with Worker(self.app, consumers=[consumer]) as worker:
            eventually(
                lambda: worker.counts()[consumer].handled == len(names),
                "all have ended",
                lambda: f"called for {self.calls}",
            )
            return worker.counts()[consumer].commits

    def charged(self) -> list[str]:
        with self.app.transaction() as tx:
            return [n for (n,) in tx.connection.execute("select name from charges order by rowid")]

    def dead(self, consumer: str = "billing") -> list[str]:
        return [letter.message.body.decode().strip('"') for letter in self.letters(consumer)]

    def letters(self, consumer: str = "billing") -> list[Any]:
        return list(self.app.dead_letters(consumer))


@pytest.fixture(params=["def", "async def"])
def shop(request: pytest.FixtureRequest, db_url: str) -> Iterator[Shop]:
    shop = Shop(db_url, request.param)
    yield shop
    shop.app.close()


def careless(connection: sqlite3.Connection, order: str) -> None:
    """Opens and does not release; "back" goes back to what another has opened."""
    connection.execute("rollback to mine" if order == "back" else "savepoint mine")


def test_who_goes_back_to_anothers_savepoint_undoes_nothing_of_its(shop: Shop):
    shop.consumer(careless)
    shop.work("a", "b", "back", "c")
    assert shop.charged() == ["a", "b", "c"]
    [letter] = shop.letters()
    assert "back" in letter.message.body.decode()
    assert "no such savepoint: mine" in letter.error
    assert shop.calls.count("back") == 1, "the culprit is known: nothing was run twice for it"


def test_of_the_same_name_each_has_its_own(shop: Shop):
    def before(connection: sqlite3.Connection, order: str) -> None:
        connection.execute("savepoint mine")
        connection.execute("insert into charges values (?)", (f"no {order}",))
        connection.execute("rollback to mine")  # and stays open

    shop.consumer(before)
    shop.work("a", "b", "c")
    assert shop.charged() == ["a", "b", "c"]
    assert shop.dead() == []


def test_a_statement_that_another_consumer_has_prepared_is_seen_too(shop: Shop):
    shop.consumer(careless)
    shop.consumer(careless, topic=others, name="elsewhere")
    shop.work("a", "b")
    shop.work("c", "d", "back", "e", topic=others, consumer="elsewhere")
    assert shop.charged() == ["a", "b", "c", "d", "e"]
    assert shop.dead("elsewhere") == ["back"]


def test_a_cursor_of_another_class_goes_around_nothing(shop: Shop):
    def before(connection: sqlite3.Connection, order: str) -> None:
        cursor = connection.cursor(sqlite3.Cursor)
        cursor.execute("rollback to mine" if order == "back" else "savepoint mine")

    shop.consumer(before)
    shop.work("a", "b", "back", "c")
    assert shop.charged() == ["a", "b", "c"]


def test_by_another_round_too_nothing_is_shared(shop: Shop):
    """Long after the first was seen, and after failures between them."""
    shop.consumer(careless)
    for number in range(20):
        names = [f"{number}a", "back", f"{number}b"]
        shop.work(*names)
    assert shop.charged() == [f"{number}{letter}" for number in range(20) for letter in "ab"]


def test_released_ones_cost_no_transaction_each(shop: Shop):
    def before(connection: sqlite3.Connection, order: str) -> None:
        connection.execute("savepoint mine")
        connection.execute("insert into charges values (?)", (f"with {order}",))
        connection.execute("release mine")

    names = [f"o-{number}" for number in range(50)]
    shop.consumer(before)
    assert shop.work(*names) <= 3
    assert shop.charged() == [n for name in names for n in (f"with {name}", name)]
    assert shop.calls == names


def test_a_handler_without_savepoints_pays_nothing(shop: Shop):
    said: list[str] = []

    def before(connection: sqlite3.Connection, _: str) -> None:
        connection.set_trace_callback(said.append)

    shop.consumer(before)
    assert shop.work(*(f"o-{number}" for number in range(50))) == 1
    assert len([text for text in said if text.startswith("insert into charges")]) == 50
    assert not [text for text in said if "savepoint" in text.lower()]


def test_a_batch_handler_keeps_its_batches(db_url: str):
    calls: list[int] = []
    with duly.App("shop", broker=db_url) as app:

        @app.batch_consumer(orders, name="billing", guarantee="exactly-once", batch=10)
        def load(names: list[str], tx: Tx) -> None:
            calls.append(len(names))
            tx.connection.execute("savepoint mine")

        app.publish_many(orders, [str(number) for number in range(30)])
        with Worker(app) as worker:
            eventually(lambda: worker.counts()["billing"].handled == 30, "all")
    assert calls == [10, 10, 10]

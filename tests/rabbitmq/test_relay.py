"""What transactions publish reaches RabbitMQ through the outbox, whatever ends in the middle."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import pytest

import duly
from duly.errors import BrokerUnavailable
from duly.relay import Relay, RelayOptions
from duly.store import outbox_of
from duly.worker import Worker
from tests.rabbitmq.test_faults import settled
from tests.servers.postgres import Schema, named_after
from tests.servers.rabbitmq import RabbitMQNode, in_namespace
from tests.waiting import eventually

ORDERS = duly.Topic("orders", int, guarantee="exactly-once")
QUICK = RelayOptions(batch=20, first_s=0.05, longest_s=0.5)


class Shop:
    """An app that publishes within transactions, and takes each order once."""

    def __init__(self, broker: str, store: str, schema: Schema | None) -> None:
        self.app = duly.App("shop", broker=broker, store=store)
        self.app.declare(ORDERS)
        self.mark = "?" if schema is None else "%s"
        self.schema = schema
        self.handled: list[int] = []

        @self.app.consumer(ORDERS, name="sub", guarantee="exactly-once")
        def charge(order: int, tx: duly.Transaction[Any]) -> None:
            tx.connection.execute(f"insert into charges values ({self.mark})", (order,))
            self.handled.append(order)

    def __enter__(self) -> Self:
        with self.app.transaction() as tx:
            tx.connection.execute("create table charges (id integer)")
        return self

    def __exit__(self, *_: object) -> None:
        self.app.close()

    def order(self, numbers: Sequence[int]) -> None:
        """Five in one transaction."""
        for start in range(0, len(numbers), 5):
            with self.app.transaction() as tx:
                for number in numbers[start : start + 5]:
                    tx.publish(ORDERS, number, id=str(number))

    def give_way(self) -> None:
        """A transaction that is rolled back."""
        with self.app.transaction() as tx:
            tx.publish(ORDERS, 1000)
            raise ZeroDivisionError

    def relay(self, **more: Any) -> Relay:
        broker, store = self.app.backends()
        assert store is not None
        outbox = outbox_of(store)
        assert outbox is not None
        return Relay(more.get("outbox", outbox), broker, QUICK, wait_s=0.0)

    @property
    def unsent(self) -> int:
        _, store = self.app.backends()
        assert store is not None
        outbox = outbox_of(store)
        assert outbox is not None
        return outbox.backlog().unsent

    def charged(self) -> list[int]:
        with self.app.transaction() as tx:
            return sorted(
                row[0] for row in tx.connection.execute("select id from charges").fetchall()
            )


@pytest.fixture(params=["sqlite", "postgres"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Schema | None]:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/effects.db", None
    schema: Schema = request.getfixturevalue("pg_schema")
    mark = "&" if "?" in schema.url else "?"
    return f"{schema.url}{mark}schema={schema.duly}", schema


@pytest.fixture
def shop(rabbit_url: str, store: tuple[str, Schema | None]) -> Iterator[Shop]:
    with Shop(rabbit_url, *store) as shop:
        yield shop


def until_empty(shop: Shop, relay: Relay) -> None:
    def sent() -> bool:
        relay.step()
        return shop.unsent == 0

    eventually(sent, "the outbox is empty", lambda: str(relay.counts), 60.0)


def test_what_transactions_publish_arrives_confirmed_and_once(shop: Shop):
    shop.order(range(100))
    with pytest.raises(ZeroDivisionError):
        shop.give_way()
    relay = shop.relay()
    until_empty(shop, relay)
    assert (relay.counts.published, relay.counts.unknown) == (100, 0)
    with Worker(shop.app):
        eventually(lambda: len(shop.charged()) == 100, "each was charged")
    assert shop.charged() == list(range(100))


class Forgets:
    """An outbox whose relay dies between the broker's confirmation and the memory of it."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.left = 3

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def sent(self, positions: Sequence[int]) -> None:
        self.left -= 1
        if self.left >= 0:
            raise BrokerUnavailable("the process ends here")
        self.inner.sent(positions)


def test_what_is_published_twice_takes_effect_once(shop: Shop):
    _, store = shop.app.backends()
    assert store is not None
    shop.order(range(30))
    relay = shop.relay(outbox=Forgets(outbox_of(store)))
    until_empty(shop, relay)
    with Worker(shop.app) as worker:
        eventually(lambda: worker.counts()["sub"].repeats >= 60, "the repeats came and went")
        eventually(lambda: len(shop.charged()) >= 30, "each was charged")
    assert shop.charged() == list(range(30))


@pytest.mark.long
def test_a_server_that_is_killed_in_the_middle_loses_nothing(
    rabbit_node: RabbitMQNode, store: tuple[str, Schema | None], request: pytest.FixtureRequest
):
    rabbit_node.start_again()
    name = f"{named_after(request.node.name)[:30]}_{os.getpid()}"
    url = in_namespace(name, rabbit_node.url)
    orders = list(range(600))
    with Shop(url, *store) as shop:
        shop.app.backends()
        settled(rabbit_node, url)
        with Worker(shop.app):  # which relays too
            with ThreadPoolExecutor(1) as pool:
                publishing = pool.submit(shop.order, orders)
                eventually(lambda: len(shop.handled) > 50, "some are through")
                rabbit_node.kill()
                before = len(shop.charged())
                publishing.result(60)  # a transaction needs no server
                assert shop.unsent > 0
                rabbit_node.start()
            eventually(
                lambda: len(shop.charged()) >= len(orders),
                "all are charged",
                lambda: f"{len(shop.charged())} charged, {shop.unsent} unsent",
                90.0,
            )
            eventually(lambda: shop.unsent == 0, "the outbox is empty")
        assert before < len(orders), "it was killed in the middle"
        assert shop.charged() == orders

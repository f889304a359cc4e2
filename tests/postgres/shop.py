"""An application with its effects in PostgreSQL, beside any broker, in either colour."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import psycopg

from duly import App
from duly.broker import Broker
from duly.guarantees import RetryPolicy
from duly.message import Topic
from duly.store import Transaction
from duly.stores.postgres import PostgresStore
from duly.worker import Worker
from tests.waiting import eventually

Colour = Literal["def", "async def"]

orders: Topic[str] = Topic("orders", str, guarantee="exactly-once")
receipts: Topic[str] = Topic("receipts", str, guarantee="exactly-once")

INSERT = "insert into charges (name) values (%s)"


class Shop:
    """``before`` runs in each call of the handler, ahead of its insert."""

    def __init__(self, broker: Broker, store: PostgresStore, url: str, colour: Colour) -> None:
        self.url = url
        self.app = App("shop", broker=broker, store=store)
        self.app.declare(receipts)
        self.calls: list[str] = []
        self.connections: list[Any] = []
        self.before: Callable[[Any, str], Any] = lambda connection, name: None
        self._colour = colour
        with psycopg.connect(url) as connection:
            connection.execute("create table if not exists charges (name text)")

    def consumer(self, *, publishes: bool = False, **options: Any) -> None:
        """Declare the one consumer."""
        options.setdefault("retry", RetryPolicy(attempts=1))
        decorate = self.app.consumer(orders, name="billing", guarantee="exactly-once", **options)
        if self._colour == "def":

            def charge(name: str, tx: Transaction[psycopg.Connection]) -> None:
                self._called(name, tx.connection)
                self.before(tx.connection, name)
                tx.connection.execute(INSERT, (name,))
                if publishes:
                    tx.publish(receipts, name, key=name[:1])

            decorate(charge)
            return

        async def acharge(name: str, tx: Transaction[psycopg.AsyncConnection]) -> None:
            self._called(name, tx.connection)
            if (doing := self.before(tx.connection, name)) is not None:
                await doing
            await tx.connection.execute(INSERT, (name,))
            if publishes:
                tx.publish(receipts, name, key=name[:1])

        decorate(acharge)

    def _called(self, name: str, connection: Any) -> None:
        self.calls.append(name)
        self.connections.append(connection)

    def publish(self, *names: str) -> None:
        """Publish these, each under its own name."""
        self.app.publish_many(orders, names, ids=names)

    def charged(self) -> list[str]:
        """What took effect, in the order of its rows."""
        with psycopg.connect(self.url) as connection:
            return [n for (n,) in connection.execute("select name from charges order by ctid")]

    @contextmanager
    def working(self, **more: Any) -> Iterator[Worker]:
        """A worker, drained at the end."""
        worker = Worker(self.app, **more)
        worker.start()
        try:
            yield worker
        finally:
            assert worker.drain(20), "did not drain"

    def work(self, *names: str) -> None:
        """Work until these and no others have taken effect, each once."""
        with self.working():
            self.wait_for(*names)
        assert sorted(self.charged()) == sorted(names)

    def wait_for(self, *names: str) -> None:
        """Until all of these have taken effect."""
        eventually(
            lambda: set(names) <= set(self.charged()),
            f"{len(names)} charged",
            lambda: f"{self.charged()}, called for {self.calls}",
        )

    def dead(self) -> list[str]:
        """Which were given up on."""
        return sorted(letter.message.id for letter in self.app.dead_letters("billing"))

"""An application that publishes, commits, fails, loses and repeats, one consumer each."""

from __future__ import annotations

import sqlite3

import duly

Tx = duly.Transaction[sqlite3.Connection]


class City:
    """Made anew for each test: what watches an app stays with it."""

    def __init__(self, name: str = "city") -> None:
        self.orders = duly.Topic("orders", str, guarantee="exactly-once")
        self.receipts = duly.Topic("receipts", str, guarantee="at-least-once")
        self.readings = duly.Topic("readings", float, guarantee="at-most-once")
        self.app = duly.App(name, broker="sqlite:///city.db")
        self.mailed: list[str] = []
        once = duly.RetryPolicy(attempts=2, first_s=1.0)

        @self.app.consumer(self.orders, name="billing", guarantee="exactly-once", retry=once)
        def charge(order: str, tx: Tx) -> None:
            tx.connection.execute("create table if not exists charges (id)")
            tx.connection.execute("insert into charges values (?)", (order,))
            if order == "bad":
                raise ValueError("no card")
            tx.publish(self.receipts, order)

        @self.app.consumer(self.receipts, name="mail", guarantee="at-least-once", concurrency=5)
        async def mail(receipt: str) -> None:
            self.mailed.append(receipt)

        @self.app.consumer(self.readings, name="alarm", guarantee="at-most-once")
        def watch(celsius: float) -> None:
            if celsius > 30:
                raise ValueError("hot")

"""A small application to be tested: orders are charged once, receipts mailed, views counted.

`test_orders_app.py` beside it tests it, and is what docs/testing.md shows.
"""

from __future__ import annotations

import os
import sqlite3
from dataclasses import dataclass

import duly


@dataclass(frozen=True)
class Order:
    """What somebody ordered."""

    number: str
    cents: int


orders = duly.Topic("orders", Order, guarantee="exactly-once")
receipts = duly.Topic("receipts", str, guarantee="at-least-once")
views = duly.Topic("views", str, guarantee="at-most-once")

app = duly.App("shop", os.environ.get("DULY_BROKER", "sqlite:///shop.db"))

TABLES = "create table if not exists charges (number text, cents integer)"


class PaymentRefused(Exception):
    """The card was refused; perhaps it will not be, later."""


@app.consumer(
    orders,
    name="billing",
    guarantee="exactly-once",
    retry=duly.RetryPolicy(attempts=5, first_s=60),
)
def charge(order: Order, tx: duly.Transaction[sqlite3.Connection]) -> None:
    """The row and the receipt become true together, once."""
    if order.cents < 0:
        raise duly.Reject("nobody is charged a negative amount")
    if order.number.startswith("refused-"):
        raise PaymentRefused(order.number)
    tx.connection.execute("insert into charges values (?, ?)", (order.number, order.cents))
    tx.publish(receipts, order.number)


class Mailer:
    """What sends mails. It drops what it has sent before, by the key it is given."""

    def __init__(self) -> None:
        self.sent: dict[str, str] = {}

    async def send(self, text: str, *, key: str) -> None:
        """Send a mail, once for each key."""
        self.sent.setdefault(key, text)


def mailer() -> Mailer:
    """The real one would speak SMTP."""
    return Mailer()


@app.consumer(receipts, name="mail", guarantee="at-least-once", concurrency=20)
async def mail(
    receipt: duly.Message[str], *, mailer: Mailer = duly.use(mailer, per="worker")
) -> None:
    """A mail lies outside of any transaction: the key is what makes a second one harmless."""
    await mailer.send(f"thank you for {receipt.payload}", key=receipt.idempotency_key)
    app.publish(views, receipt.payload)


seen: list[str] = []


@app.consumer(views, name="dashboard", guarantee="at-most-once")
def count(view: str) -> None:
    """Whether one is missing does not matter."""
    seen.append(view)

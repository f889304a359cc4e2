"""An application as a module of somebody's: its broker is a file that no test may make."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator

import duly
from duly import RetryPolicy, Topic
from duly.testing import Running

NEVER = "never-made-by-a-test.db"

orders: Topic[dict[str, int]] = Topic("orders", dict[str, int], guarantee="exactly-once")
receipts: Topic[int] = Topic("receipts", int, guarantee="at-least-once")
views: Topic[int] = Topic("views", int, guarantee="at-most-once")

app = duly.App("shop", f"sqlite:///{NEVER}")

POLICY = RetryPolicy(attempts=3, first_s=10.0, factor=2.0, jitter=0.0)


def prices() -> Iterator[dict[str, int]]:
    yield {"a": 1}


@app.consumer(orders, name="billing", guarantee="exactly-once", retry=POLICY)
def bill(
    order: dict[str, int],
    tx: duly.Transaction[sqlite3.Connection],
    *,
    prices: dict[str, int] = duly.use(prices),
) -> None:
    cents = order["cents"] * prices["a"]
    tx.connection.execute("insert into charges values (?)", (cents,))
    tx.publish(receipts, cents)
    if cents < 0:
        raise ValueError(f"nobody is charged {cents}")


mailed: list[int] = []


@app.consumer(receipts, name="mail", guarantee="at-least-once", concurrency=5)
async def mail(cents: int) -> None:
    await asyncio.sleep(0)
    mailed.append(cents)
    app.publish(views, cents)


seen: list[int] = []


@app.consumer(views, name="dashboard", guarantee="at-most-once")
def show(cents: int) -> None:
    seen.append(cents)


TABLE = "create table charges (cents integer)"


def charged(t: Running) -> list[int]:
    with t.connection() as db:
        return [cents for (cents,) in db.execute("select cents from charges order by rowid")]


def deciding(app: duly.App, raises: Exception) -> Topic[int]:
    topic: Topic[int] = Topic("t", int, guarantee="at-least-once")

    @app.consumer(topic, name="c", guarantee="at-least-once")
    def decide(n: int) -> None:
        raise raises

    return topic

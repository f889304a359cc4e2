"""Warehouse: rows loaded in batches into a database of their own, each once.

The messages live in one file, the warehouse in another. What has taken effect is remembered in
the warehouse (its inbox), in the transaction that loads the rows; what the handler publishes goes
into an outbox there, and a relay in every worker brings it to the broker.

    duly run ex05_warehouse:app
    duly publish ex05_warehouse:app sales --from sales.csv    # columns: shop,item,pieces
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

import duly


@dataclass(frozen=True)
class Sale:
    """A line of a shop's till."""

    shop: str
    item: str
    pieces: int


sales = duly.Topic("sales", Sale, guarantee="exactly-once")
loads = duly.Topic("loads", int, guarantee="at-least-once")
app = duly.App("warehouse", broker="sqlite:///queue.db", store="sqlite:///warehouse.db")


@app.batch_consumer(sales, name="load", guarantee="exactly-once", batch=2000)
def load(batch: list[Sale], tx: duly.Transaction[sqlite3.Connection]) -> None:
    tx.connection.execute("create table if not exists sales (shop, item, pieces)")
    rows = [(sale.shop, sale.item, sale.pieces) for sale in batch]
    tx.connection.executemany("insert into sales values (?, ?, ?)", rows)
    tx.publish(loads, len(rows))


@app.consumer(loads, name="report", guarantee="at-least-once")
def report(rows: int) -> None:
    print(f"{rows} rows were loaded", flush=True)

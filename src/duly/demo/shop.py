"""The demonstration's application: three topics, four consumers, one for each way to handle.

Worked like any application: ``DULY_BROKER=sqlite:///shop.db duly run duly.demo.shop:app``.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import duly
from duly.demo.journal import Journal

FOLDER_VARIABLE = "DULY_DEMO_FOLDER"


@dataclass(frozen=True, slots=True)
class Reading:
    """What a sensor measured."""

    sensor: int
    number: int
    value: float


@dataclass(frozen=True, slots=True)
class RideUpdate:
    """A ride has got one step further."""

    ride: int
    step: int
    status: str


@dataclass(frozen=True, slots=True)
class Payment:
    """An order is paid: money goes from one account to another."""

    order: str
    payer: int
    payee: int
    cents: int


@dataclass(frozen=True, slots=True)
class PaymentReceipt:
    """An order was charged."""

    order: str
    cents: int


# Kept for a day after everybody is done with them, so that the verdict can look at the log.
DAY_S = 86400.0
sensors = duly.Topic("sensors", Reading, guarantee="at-most-once", retention_s=DAY_S)
rides = duly.Topic("rides", RideUpdate, guarantee="at-least-once", retention_s=DAY_S)
checkout = duly.Topic("checkout", Payment, guarantee="exactly-once", retention_s=DAY_S)
# Not exactly-once: its identity table would hide a receipt that was published twice.
receipts = duly.Topic("receipts", PaymentReceipt, guarantee="at-least-once", retention_s=DAY_S)

# Nothing here is unique where a repeat would have to be seen: a second charge of an order, or
# a second pair of entries, would simply be stored.
TABLES = """
create table accounts (account integer primary key, opening integer, balance integer);
create table charges (order_id text, payer integer, payee integer, cents integer);
create table entries (order_id text, account integer, cents integer);
create table board (
    ride integer, step integer, status text, runs integer, primary key (ride, step)
) without rowid
"""

app = duly.App("shop", os.environ.get("DULY_BROKER"))


def readings() -> Iterator[Journal]:
    """The file that the dashboard draws its curves from."""
    with Journal(_folder() / "readings.log") as journal:
        yield journal


def notices() -> Iterator[Journal]:
    """Stands for a push service: what was sent once cannot be taken back."""
    with Journal(_folder() / "notices.log") as journal:
        yield journal


def _folder() -> Path:
    return Path(os.environ[FOLDER_VARIABLE])


@app.consumer(sensors, name="dashboard", guarantee="at-most-once", batch=50)
def record(reading: Reading, *, curve: Journal = duly.use(readings, per="worker")) -> None:
    """Add a point to a curve: one point more or less does not matter, a double one shows."""
    curve.write(f"{reading.number}")


@app.batch_consumer(rides, name="board", guarantee="at-least-once", batch=50)
def show(updates: list[RideUpdate]) -> None:
    """Put updates on the board. Idempotent: a repeat writes what is there already."""
    rows = [(update.ride, update.step, update.status) for update in updates]
    with app.transaction() as tx:
        # runs counts how often an update came; it is there for the verdict only.
        tx.connection.executemany(
            "insert into board values (?, ?, ?, 1) on conflict (ride, step) "
            "do update set status = excluded.status, runs = runs + 1",
            rows,
        )


@app.consumer(rides, name="notify", guarantee="at-least-once", batch=50)
def notify(update: RideUpdate, *, push: Journal = duly.use(notices, per="worker")) -> None:
    """Tell the passenger. Deliberately not idempotent: a repeat is a second notice."""
    push.write(f"{update.ride}-{update.step}")


@app.consumer(checkout, name="billing", guarantee="exactly-once", batch=100)
def charge(payment: Payment, tx: duly.Transaction[sqlite3.Connection]) -> None:
    """Move the money by double entry and publish a receipt, all in one transaction."""
    order, payer, payee, cents = payment.order, payment.payer, payment.payee, payment.cents
    execute = tx.connection.execute
    execute("insert into charges values (?, ?, ?, ?)", (order, payer, payee, cents))
    for account, amount in ((payer, -cents), (payee, cents)):
        execute("insert into entries values (?, ?, ?)", (order, account, amount))
        execute("update accounts set balance = balance + ? where account = ?", (amount, account))
    tx.publish(receipts, PaymentReceipt(order, cents))

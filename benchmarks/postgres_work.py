"""What every row on PostgreSQL does to the effects, and how that is checked afterwards."""

from __future__ import annotations

import asyncio
from typing import Any

import psycopg
from workload import HasConnection, Order

SLOW_S = 0.002  # how long a slow statement takes
WAIT_S = 0.01  # what an async handler that waits does: somebody else's answer
IN_FLIGHT = 500

CHARGES = "create table if not exists charges (order_id text not null, cents bigint not null)"
CHARGE = "insert into charges values (%s, %s)"
LOAD = "insert into charges select * from unnest(%s::text[], %s::bigint[])"


def charge(order: Order, tx: HasConnection) -> None:
    """One inserted row a message."""
    tx.connection.execute(CHARGE, (order.order_id, order.cents))


def charge_slowly(order: Order, tx: HasConnection) -> None:
    """The same behind a statement that takes its time."""
    tx.connection.execute("select pg_sleep(%s)", (SLOW_S,))
    charge(order, tx)


async def acharge(order: Order, tx: HasConnection) -> None:
    """The same, awaited."""
    await tx.connection.execute(CHARGE, (order.order_id, order.cents))


def load(batch: list[Order], tx: HasConnection) -> None:
    """One statement a batch."""
    tx.connection.execute(LOAD, columns(batch))


def columns(batch: list[Order]) -> tuple[list[str], list[int]]:
    return [order.order_id for order in batch], [order.cents for order in batch]


async def wait(_order: Order) -> None:
    """What waits for somebody else."""
    await asyncio.sleep(WAIT_S)


def create_charges(url: str) -> None:
    with psycopg.connect(url) as connection:
        connection.execute(CHARGES)


def check_charges(url: str, messages: int) -> None:
    """Each order was charged once; a fast row that loses or repeats is no result."""
    with psycopg.connect(url) as connection:
        found: Any = connection.execute(
            "select count(*), count(distinct order_id) from charges"
        ).fetchone()
    if found != (messages, messages):
        raise AssertionError(f"{found[0]} charges of {found[1]} orders, {messages} were published")

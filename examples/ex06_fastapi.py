"""FastAPI: an order and its message become true together, or neither does.

The request writes a row through the application's own connection and publishes within that very
transaction. No message is sent for an order that was rolled back, and no order is stored whose
message could be lost.

    uvicorn ex06_fastapi:api
    duly run ex06_fastapi:app
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException
from pydantic import BaseModel

import duly


class Order(BaseModel):
    """What a customer sends."""

    number: str
    cents: int


orders = duly.Topic("orders", Order, guarantee="exactly-once")
app = duly.App("shop", broker="sqlite:///shop.db")


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Open the file before a request holds a transaction on it."""
    await asyncio.to_thread(app.backends)
    yield
    await app.aclose()


api = FastAPI(lifespan=lifespan)


def database() -> Iterator[sqlite3.Connection]:
    """A connection for one request: committed at its end, rolled back where it fails."""
    db = sqlite3.connect("shop.db", check_same_thread=False)
    db.execute("pragma busy_timeout = 10000")
    db.execute("pragma wal_autocheckpoint = 0")  # duly checkpoints, from one place
    try:
        with db:
            db.execute("create table if not exists orders (number primary key, cents)")
            yield db
    finally:
        db.close()


Database = Annotated[sqlite3.Connection, Depends(database, scope="function")]


@api.post("/orders", status_code=201)
def order(order: Order, db: Database) -> dict[str, str]:
    """`def`, so that FastAPI runs it on a thread: the database blocks."""
    try:
        db.execute("insert into orders values (?, ?)", (order.number, order.cents))
    except sqlite3.IntegrityError:
        raise HTTPException(409, f"there is an order {order.number}") from None
    app.publish(orders, order, id=order.number, within=db)
    if order.cents <= 0:
        raise HTTPException(422, "an order costs something")  # rolls back both
    return {"number": order.number}


@app.consumer(orders, name="billing", guarantee="exactly-once")
def charge(order: Order, tx: duly.Transaction[Any]) -> None:
    tx.connection.execute("create table if not exists charges (number, cents)")
    tx.connection.execute("insert into charges values (?, ?)", (order.number, order.cents))

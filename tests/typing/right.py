"""Handlers and publishes that are right: both type checkers accept every line.

Checked, never run; see tests/api/test_typing.py.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypedDict, assert_type

import msgspec
import psycopg

import duly


@dataclass
class Ride:
    ride: str


class Checkout(msgspec.Struct, tag=True):
    order: str
    cents: int


class Refund(msgspec.Struct, tag=True):
    order: str


class Reading(TypedDict):
    celsius: float


class Db:
    def add(self, row: object) -> None: ...


class Http: ...


rides = duly.Topic("rides", Ride, guarantee="at-least-once")
checkouts = duly.Topic("checkouts", Checkout, guarantee="exactly-once")
readings = duly.Topic("readings", Reading, guarantee="at-most-once")
receipts = duly.Topic("receipts", dict[str, str], guarantee="at-least-once")
anything = duly.Topic("anything", dict, guarantee="at-least-once")
raw = duly.Topic("raw", bytes, guarantee="at-least-once")
moves: duly.Topic[Checkout | Refund] = duly.Topic(
    "moves", Checkout | Refund, guarantee="exactly-once"
)
keyed = duly.Topic("keyed", Ride, guarantee="at-least-once", key=lambda ride: ride.ride)


class OldRide(msgspec.Struct):
    name: str


class OlderRide(msgspec.Struct):
    number: int


def old_of_older(older: OlderRide) -> OldRide:
    return OldRide(str(older.number))


def ride_of_old(old: OldRide) -> Ride:
    return Ride(old.name)


versioned = duly.Topic("versioned", Ride, guarantee="at-least-once").versioned(
    "ride.v3",
    upcast={
        "ride.v1": duly.Upcast(OlderRide, old_of_older).then(ride_of_old),
        "ride.v2": duly.Upcast(OldRide, ride_of_old),
        "ride.v0": duly.Upcast(dict[str, str], lambda old: Ride(old["ride"])),
    },
    unknown_type="wait",
)
first_version = duly.Topic("first", Ride, guarantee="at-least-once").versioned(
    "ride.v1", unknown_type="dead", look_again_s=5
)
assert_type(versioned, duly.Topic[Ride])
assert_type(first_version, duly.Topic[Ride])
assert_type(duly.Upcast(OlderRide, old_of_older).then(ride_of_old), duly.Upcast[Ride])

app = duly.App("shop", broker="sqlite:///shop.db")
app.every("5m", rides, Ride("r-1"), name="one")
app.every(90, rides, lambda tick: Ride(tick.isoformat()), name="two", misfire=10)
app.cron("0 9 * * mon", receipts, {"week": "over"}, name="three", tz="UTC", misfire="latest")
group = duly.Group()

assert_type(rides, duly.Topic[Ride])
assert_type(checkouts, duly.Topic[Checkout])


# --- dependencies: the value is what the factory gives


def plain() -> Db:
    return Db()


def generated() -> Iterator[Db]:
    yield Db()


@contextmanager
def managed() -> Iterator[Db]:
    yield Db()


async def awaited() -> Http:
    return Http()


async def agenerated() -> AsyncIterator[Http]:
    yield Http()


@asynccontextmanager
async def amanaged() -> AsyncIterator[Http]:
    yield Http()


def connection() -> sqlite3.Connection:  # a context manager too, and still the value itself
    return sqlite3.connect(":memory:")


def nested(*, db: Db = duly.use(generated)) -> Http:
    db.add(1)
    return Http()


assert_type(duly.use(plain), Db)
assert_type(duly.use(generated), Db)
assert_type(duly.use(managed), Db)
assert_type(duly.use(awaited), Http)
assert_type(duly.use(agenerated), Http)
assert_type(duly.use(amanaged), Http)
assert_type(duly.use(connection), sqlite3.Connection)
assert_type(duly.use(Db), Db)
assert_type(duly.use(nested, per="worker"), Http)


# --- without a transaction


@app.consumer(rides, name="board", guarantee="at-least-once")
def board(ride: Ride) -> None: ...


@app.consumer(rides, name="aboard", guarantee="at-least-once", concurrency=500)
async def aboard(ride: Ride) -> None: ...


@app.consumer(rides, name="log", guarantee="at-least-once", retry=duly.RetryPolicy(attempts=3))
def log(message: duly.Message[Ride]) -> None:
    assert_type(message.payload, Ride)


@app.consumer(readings, name="chart", guarantee="at-most-once", batch=500)
def chart(reading: Reading, *, db: Db = duly.use(generated), http: Http = duly.use(nested)) -> int:
    return 1


@app.consumer(raw, name="copy", guarantee="at-least-once", start="latest")
async def copy(message: duly.Message[bytes], *, http: Http = duly.use(amanaged)) -> None: ...


@app.consumer(anything, name="any", guarantee="at-least-once")
def anything_goes(payload: dict[str, Any]) -> None: ...


@app.consumer(rides, name="loose", guarantee="at-least-once")
def loose(ride: object) -> None: ...


@app.consumer(receipts, name="plain-default", guarantee="at-least-once")
def plain_default(receipt: dict[str, str], *, copies: int = 2) -> None: ...


# --- with a transaction


@app.consumer(checkouts, name="billing", guarantee="exactly-once")
def charge(order: Checkout, tx: duly.Transaction[sqlite3.Connection]) -> None:
    tx.connection.execute("insert into charges values (?, ?)", (order.order, order.cents))
    tx.publish(receipts, {"order": order.order})
    tx.after_commit(lambda: None)


@app.consumer(checkouts, name="abilling", guarantee="exactly-once", lanes=2)
async def acharge(
    order: duly.Message[Checkout],
    tx: duly.Transaction[sqlite3.Connection],
    *,
    http: Http = duly.use(awaited),
) -> None: ...


@app.consumer(moves, name="moves", guarantee="exactly-once")
def move(what: Checkout | Refund, tx: duly.Transaction[Any]) -> None: ...


# --- batches


@app.batch_consumer(rides, name="warehouse", guarantee="at-least-once", batch=5000)
def load(rides: list[Ride]) -> None: ...


@app.batch_consumer(rides, name="warehouse2", guarantee="at-least-once")
async def aload(rides: Sequence[duly.Message[Ride]], *, db: Db = duly.use(managed)) -> None: ...


@app.batch_consumer(checkouts, name="ledger", guarantee="exactly-once")
def ledger(orders: list[Checkout], tx: duly.Transaction[sqlite3.Connection]) -> None: ...


@app.batch_consumer(checkouts, name="ledger2", guarantee="exactly-once")
def ledger2(
    orders: list[duly.Message[Checkout]],
    tx: duly.Transaction[sqlite3.Connection],
    *,
    db: Db = duly.use(plain),
) -> None: ...


# --- several topics


@app.consumer((rides, checkouts), name="both", guarantee="at-least-once")
def both(event: Ride | Checkout) -> None: ...


@app.consumer((rides, checkouts, raw), name="three", guarantee="exactly-once")
def three(event: duly.Message[Ride | Checkout | bytes], tx: duly.Transaction[Any]) -> None: ...


@app.consumer([rides, checkouts], name="list", guarantee="at-least-once")
def listed(event: Ride | Checkout) -> None: ...


@app.batch_consumer((rides, checkouts), name="bothbatch", guarantee="at-least-once")
def both_batch(events: list[Ride | Checkout]) -> None: ...


@group.consumer(rides, name="grouped", guarantee="at-least-once")
def grouped(ride: Ride) -> None: ...


app.include(group)


# --- the decorated name keeps its type


board(Ride("r-1"))
chart({"celsius": 1.0}, db=Db())
charge(Checkout("o-1", 1), duly.Transaction(sqlite3.connect(":memory:"), "test"))
assert_type(chart({"celsius": 1.0}, http=Http()), int)
load([Ride("r-1")])


async def calls() -> None:
    await aboard(Ride("r-1"))
    await app.apublish(rides, Ride("r-1"), key="r-1")
    await app.apublish_many(rides, [Ride("r-1")], ids=["1"])
    async with app.atransaction() as tx:
        tx.publish(rides, Ride("r-1"))


# --- publishing


app.publish(rides, Ride("r-1"), id="r-1", headers={"traceparent": "00"}, delay_s=5)
app.publish(rides, Ride("r-1"), due=datetime.now(UTC), within=sqlite3.connect(":memory:"))
app.publish(moves, Refund("o-1"))
app.publish(anything, {"a": [1, 2]})
app.publish(readings, Reading(celsius=1.5))
app.publish_many(checkouts, (Checkout(str(n), n) for n in range(3)))
with app.transaction() as tx:
    tx.publish(receipts, {"order": "o-1"})
    app.publish(rides, Ride("r-1"), within=tx)


@app.consumer(checkouts, name="in-postgres", guarantee="exactly-once", pipeline=True)
def in_postgres(order: Checkout, tx: duly.Transaction[psycopg.Connection]) -> None:
    tx.connection.execute("insert into charges values (%s, %s)", (order.order, order.cents))


@app.consumer(checkouts, name="in-postgres-async", guarantee="exactly-once")
async def in_postgres_async(order: Checkout, tx: duly.Transaction[psycopg.AsyncConnection]) -> None:
    await tx.connection.execute("insert into charges values (%s, %s)", (order.order, order.cents))

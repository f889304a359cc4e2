"""Handlers and publishes that are wrong: both type checkers refuse every line marked so.

A comment that begins with "wrong:" marks a line on which each checker reports, and no other line
has a report. Checked, never run; the same mistakes at run time are in tests/api/test_handlers.py.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import duly


@dataclass
class Ride:
    ride: str


@dataclass
class Checkout:
    order: str


class Db: ...


def session() -> Iterator[Db]:
    yield Db()


def needy(url: str) -> Db:
    return Db()


rides = duly.Topic("rides", Ride, guarantee="at-least-once")
checkouts = duly.Topic("checkouts", Checkout, guarantee="exactly-once")
app = duly.App("shop")


# --- versions


class OldRide:
    name: str


def ride_of_old(old: OldRide) -> Ride:
    return Ride(old.name)


def checkout_of_old(old: OldRide) -> Checkout:
    return Checkout(old.name)


order_of_old = duly.Upcast(OldRide, checkout_of_old)
rides.versioned("v2", upcast={"v1": order_of_old}, unknown_type="dead")  # wrong: no ride
duly.Upcast(Checkout, ride_of_old)  # wrong: takes an old ride
rides.versioned("v2", upcast={"v1": ride_of_old}, unknown_type="dead")  # wrong: of which type?
rides.versioned("v2", upcast={"v1": duly.Upcast(OldRide, ride_of_old)})  # wrong: unknown types?
rides.versioned("v2", unknown_type="drop")  # wrong: nothing is dropped
duly.Upcast(OldRide, ride_of_old).then(ride_of_old)  # wrong: takes an old ride
app.every("5m", rides, Checkout("o"), name="a")  # wrong: no ride
app.every("5m", rides, lambda: Ride("r"), name="a")  # wrong: takes no tick
app.every("5m", rides, Ride("r"))  # wrong: no name
app.every(0.5, rides, Ride("r"), name="a")  # wrong: no whole seconds
app.cron("0 9 * * *", rides, Ride("r"), name="a")  # wrong: in which time zone?
app.cron("0 9 * * *", rides, Ride("r"), name="a", tz="UTC", misfire="all")  # wrong: how many?
Tx = duly.Transaction[sqlite3.Connection]


# --- the transaction


@app.consumer(rides, name="a", guarantee="at-least-once")  # wrong: only exactly-once has tx
def tx_without_exactly_once(ride: Ride, tx: Tx) -> None: ...


@app.consumer(rides, name="a", guarantee="at-most-once")  # wrong: only exactly-once has tx
async def tx_without_exactly_once_async(ride: Ride, tx: Tx) -> None: ...


@app.batch_consumer(rides, name="a", guarantee="at-least-once")  # wrong: only exactly-once has tx
def tx_in_a_batch(rides: list[Ride], tx: Tx) -> None: ...


@app.consumer(checkouts, name="a", guarantee="exactly-once")  # wrong: no tx
def no_tx(order: Checkout) -> None: ...


@app.consumer(checkouts, name="a", guarantee="exactly-once")  # wrong: no tx
async def no_tx_async(order: duly.Message[Checkout]) -> None: ...


@app.batch_consumer(checkouts, name="a", guarantee="exactly-once")  # wrong: no tx
def no_tx_in_a_batch(orders: list[Checkout]) -> None: ...


@app.consumer(checkouts, name="a", guarantee="exactly-once")  # wrong: tx comes second
def tx_first(tx: Tx, order: Checkout) -> None: ...


@app.consumer(checkouts, name="a", guarantee="exactly-once")  # wrong: the bare connection
def bare_connection(order: Checkout, tx: sqlite3.Connection) -> None: ...


@app.consumer(checkouts, name="a", guarantee="exactly-once")  # wrong: tx is not a keyword
def tx_by_keyword(order: Checkout, *, tx: Tx) -> None: ...


# --- the payload


@app.consumer(rides, name="a", guarantee="at-least-once")  # wrong: another payload
def other_payload(order: Checkout) -> None: ...


@app.consumer(rides, name="a", guarantee="at-least-once")  # wrong: another payload
async def other_payload_async(order: Checkout) -> None: ...


@app.consumer(rides, name="a", guarantee="at-least-once")  # wrong: a message of another type
def other_message(order: duly.Message[Checkout]) -> None: ...


@app.consumer(checkouts, name="a", guarantee="exactly-once")  # wrong: a message of another type
async def other_message_async(ride: duly.Message[Ride], tx: Tx) -> None: ...


@app.consumer(rides, name="a", guarantee="at-least-once")  # wrong: no payload
def nothing() -> None: ...


@app.consumer((rides, checkouts), name="a", guarantee="at-least-once")  # wrong: one of two
def one_of_two(ride: Ride) -> None: ...


@app.consumer((rides, checkouts), name="a", guarantee="exactly-once")  # wrong: one of two
def one_of_two_messages(ride: duly.Message[Ride], tx: Tx) -> None: ...


# --- one and many


@app.consumer(rides, name="a", guarantee="at-least-once")  # wrong: that is batch_consumer's
def list_for_one(rides: list[Ride]) -> None: ...


@app.batch_consumer(rides, name="a", guarantee="at-least-once")  # wrong: one for a batch
def one_for_list(ride: Ride) -> None: ...


@app.batch_consumer(rides, name="a", guarantee="at-least-once")  # wrong: one for a batch
async def message_for_list(ride: duly.Message[Ride]) -> None: ...


@app.batch_consumer(rides, name="a", guarantee="at-least-once")  # wrong: of another type
def other_list(orders: list[Checkout]) -> None: ...


@app.batch_consumer(checkouts, name="a", guarantee="exactly-once")  # wrong: of another type
def other_messages(rides: list[duly.Message[Ride]], tx: Tx) -> None: ...


# --- dependencies


@app.consumer(rides, name="a", guarantee="at-least-once")  # wrong: nothing fills db
def positional(ride: Ride, db: Db) -> None: ...


@app.consumer(rides, name="a", guarantee="at-least-once")  # wrong: nothing fills db
def keyword_without_default(ride: Ride, *, db: Db) -> None: ...


@app.consumer(checkouts, name="a", guarantee="exactly-once")  # wrong: nothing fills db
def positional_after_tx(order: Checkout, tx: Tx, db: Db) -> None: ...


@app.consumer(rides, name="a", guarantee="at-least-once")
def other_value(ride: Ride, *, db: int = duly.use(session)) -> None: ...  # wrong: gives Db


duly.use(needy)  # wrong: nothing fills url
duly.use(session, per="process")  # wrong: message or worker
duly.use(Db())  # wrong: no factory


# --- the declaration


@app.consumer(rides, name="a")  # wrong: no guarantee
def no_guarantee(ride: Ride) -> None: ...


@app.batch_consumer(rides, name="a")  # wrong: no guarantee
def no_guarantee_batch(rides: list[Ride]) -> None: ...


@app.consumer(rides, name="a", guarantee="once")  # wrong: there is no such guarantee
def other_guarantee(ride: Ride) -> None: ...


@app.consumer(rides, guarantee="at-least-once")  # wrong: no name
def no_name(ride: Ride) -> None: ...


@app.consumer(rides, name="a", guarantee="at-least-once", prefetch=3)  # wrong: no such option
def unknown_option(ride: Ride) -> None: ...


@app.consumer(rides, name="a", guarantee="at-least-once", batch="many")  # wrong: an int
def other_option(ride: Ride) -> None: ...


@app.consumer("rides", name="a", guarantee="at-least-once")  # wrong: no topic
def no_topic(ride: Ride) -> None: ...


duly.Topic("rides", Ride)  # wrong: no guarantee
duly.Topic("rides", Ride, guarantee="sometimes")  # wrong: there is no such guarantee


# --- publishing


app.publish(rides, Checkout("o-1"))  # wrong: another payload
app.publish(rides, Ride("r-1"), id=7)  # wrong: an id is a str
app.publish(rides, Ride("r-1"), priority=1)  # wrong: no such option
app.publish_many(rides, [Checkout("o-1")])  # wrong: another payload
app.publish("rides", Ride("r-1"))  # wrong: no topic


async def publishing(tx: duly.Transaction[Any]) -> None:
    await app.apublish(rides, Checkout("o-1"))  # wrong: another payload
    tx.publish(rides, Checkout("o-1"))  # wrong: another payload


# --- the decorated name keeps its type


@app.consumer(rides, name="a", guarantee="at-least-once")
def kept(ride: Ride, *, db: Db = duly.use(session)) -> None: ...


kept(Checkout("o-1"))  # wrong: another payload
kept(Ride("r-1"), db=1)  # wrong: another dependency
kept(Ride("r-1"), http=1)  # wrong: no such dependency

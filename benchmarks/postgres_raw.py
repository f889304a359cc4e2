"""The raw loops on PostgreSQL: what one would write by hand for the same work with psycopg.

A table with the columns of duly's log; publishing by ``executemany`` or by one statement with
arrays; working by ``delete ... for update skip locked``, 500 messages a transaction, in which the
same handlers run. What they leave out is everything else: leases, retries, dead letters, other
subscriptions, order, wake-up, and what commits late.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any, cast

import msgspec
import psycopg
from postgres_work import acharge, charge, check_charges, create_charges, load, wait
from workload import BATCH, WARM, Order, Sample, Stopwatch, ignore, in_batches, measured, orders

from duly.identity import new_ids

SCHEMA = """
create table raw (
    position bigint generated always as identity primary key,
    source text not null, id text not null, key text, time_ms bigint not null, headers text,
    due_ms bigint, body bytea not null
);
create table seen (
    source text not null, id text not null, hash bytea not null, time_ms bigint not null,
    primary key (source, id)
)
"""
INSERT = "insert into raw (source, id, time_ms, body) values ('shop', %s, %s, %s)"
INSERT_ARRAYS = """
insert into raw (source, id, time_ms, body)
select 'shop', id, %s, body from unnest(%s::text[], %s::bytea[]) r (id, body)
"""
REMEMBER = """
insert into seen (source, id, hash, time_ms) values ('shop', %s, %s, %s) on conflict do nothing
"""
TAKE = """
with next as (select position from raw order by position limit %s for update skip locked)
delete from raw using next where raw.position = next.position returning raw.id, raw.body
"""

encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(Order).decode


@dataclass(frozen=True, slots=True)
class Tx:
    """What the handlers take instead of `duly.Transaction`."""

    connection: Any


# --- publishing

Publish = Callable[[psycopg.Connection[Any], Sequence[Order]], None]


def publish_batch(connection: psycopg.Connection[Any], batch: Sequence[Order]) -> None:
    now_ms = time.time_ns() // 1_000_000
    rows = [(id, now_ms, encode(o)) for id, o in zip(new_ids(len(batch)), batch, strict=True)]
    connection.cursor().executemany(INSERT, rows)
    connection.commit()


def publish_arrays(connection: psycopg.Connection[Any], batch: Sequence[Order]) -> None:
    now_ms = time.time_ns() // 1_000_000
    bodies = [encode(order) for order in batch]
    connection.execute(INSERT_ARRAYS, (now_ms, list(new_ids(len(batch))), bodies), binary=True)
    connection.commit()


def remember_and_publish(connection: psycopg.Connection[Any], batch: Sequence[Order]) -> None:
    now_ms = time.time_ns() // 1_000_000
    rows = [(id, now_ms, encode(o)) for id, o in zip(new_ids(len(batch)), batch, strict=True)]
    known = [(id, blake2b(body, digest_size=16).digest(), now_ms) for id, _, body in rows]
    connection.cursor().executemany(REMEMBER, known)
    connection.cursor().executemany(INSERT, rows)
    connection.commit()


def publish(url: str, messages: int, how: Publish = publish_batch, size: int = BATCH) -> Sample:
    warm, rest = orders(WARM if size > 1 else 100), orders(messages, WARM)
    with psycopg.connect(url) as connection:
        connection.execute(SCHEMA)
        for batch in in_batches(warm, size):
            how(connection, batch)
        with measured(messages) as sample:
            for batch in in_batches(rest, size):
                how(connection, batch)
        return sample


def filled(url: str, messages: int) -> None:
    create_charges(url)
    with psycopg.connect(url) as connection:
        connection.execute(SCHEMA)
        for batch in in_batches(orders(messages), BATCH):
            publish_arrays(connection, batch)


# --- consuming

Run = Callable[[Any, list[Order]], None]


def run_empty(_: Any, batch: list[Order]) -> None:
    """The empty handler, called for each."""
    for order in batch:
        ignore(order)


def run_charge(connection: Any, batch: list[Order]) -> None:
    tx = Tx(connection)
    for order in batch:
        charge(order, tx)


def run_load(connection: Any, batch: list[Order]) -> None:
    load(batch, Tx(connection))


def consume(url: str, messages: int, run: Run = run_empty, size: int = BATCH) -> Sample:
    warm = WARM if size > 1 else 100
    filled(url, warm + messages)
    watch = Stopwatch(messages)
    done = 0
    with psycopg.connect(url) as connection:
        while rows := connection.execute(TAKE, (size,), binary=True).fetchall():
            if done == warm:
                watch.start()
            run(connection, [decode(body) for _, body in rows])
            connection.commit()
            done += len(rows)
        watch.stop()
    if run is not run_empty:
        check_charges(url, warm + messages)
    return watch.sample


def consume_then_settle(url: str, messages: int) -> Sample:
    """Effects in a transaction of their own, then the messages are deleted in another."""
    filled(url, WARM + messages)
    watch = Stopwatch(messages)
    done = 0
    with psycopg.connect(url) as connection, psycopg.connect(url) as effects:
        while rows := connection.execute(TAKE, (BATCH,), binary=True).fetchall():
            if done == WARM:
                watch.start()
            run_charge(effects, [decode(body) for _, body in rows])
            effects.commit()
            connection.commit()
            done += len(rows)
        watch.stop()
    check_charges(url, WARM + messages)
    return watch.sample


ARun = Callable[[Any, list[Order]], Awaitable[None]]


async def arun_charge(connection: Any, batch: list[Order]) -> None:
    tx = Tx(connection)
    for order in batch:
        await acharge(order, tx)


async def arun_wait(_: Any, batch: list[Order]) -> None:
    """All of a batch wait side by side, and the next is fetched when the last has ended."""
    await asyncio.gather(*map(wait, batch))


def aconsume(url: str, messages: int, run: ARun) -> Sample:
    filled(url, WARM + messages)
    watch = Stopwatch(messages)

    async def work() -> None:
        done = 0
        async with await psycopg.AsyncConnection.connect(url) as connection:
            while True:
                cursor = await connection.execute(TAKE, (BATCH,), binary=True)
                rows = cast(list[tuple[str, bytes]], await cursor.fetchall())
                if not rows:
                    break
                if done == WARM:
                    watch.start()
                await run(connection, [decode(body) for _, body in rows])
                await connection.commit()
                done += len(rows)
            watch.stop()

    asyncio.run(work())
    if run is not arun_wait:
        check_charges(url, WARM + messages)
    return watch.sample


def inbox(url: str, messages: int) -> Sample:
    """Effects of messages from elsewhere, with an inbox written by hand: two statements a batch."""
    create_charges(url)
    with psycopg.connect(url) as connection:
        connection.execute("create table inbox (id text primary key)")
        connection.commit()

        def handle(batch: Sequence[Order]) -> None:
            ids = [order.order_id for order in batch]
            fresh = connection.execute(
                "insert into inbox select unnest(%s::text[]) on conflict do nothing returning id",
                (ids,),
            ).fetchall()
            new = {id for (id,) in fresh}
            run_load(connection, [order for order in batch if order.order_id in new])
            connection.commit()

        for batch in in_batches(orders(WARM), BATCH):
            handle(batch)
        with measured(messages) as sample:
            for batch in in_batches(orders(messages, WARM), BATCH):
                handle(batch)
    check_charges(url, WARM + messages)
    return sample


publish_singly = partial(publish, size=1)

"""The raw loops: what one would write by hand for the same work, each under 40 lines.

They store the columns of duly's log, make ids with duly's function, encode and decode with the
same codec, call the very same handlers, on the same driver, WAL and ``synchronous=FULL``, one
commit a batch. What they leave out is everything else: leases, retries, dead letters, other
subscriptions, a second worker, wake-up, shutdown.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec
from workload import (
    BATCH,
    BIG_BATCH,
    CHARGES,
    WARM,
    HasConnection,
    Order,
    Sample,
    Stopwatch,
    charge,
    check_charges,
    connect,
    ignore,
    in_batches,
    load,
    measured,
    orders,
)

from duly.identity import new_ids
from duly.message import NO_HEADERS, Message

# The columns of duly's log and identities, and positions as wide as its own.
SCHEMA = """
create table messages (
    position integer primary key, source text not null, id text not null, key text,
    time_ms integer not null, headers text, due_ms integer, body blob not null
);
create table identities (
    topic_no integer not null, source text not null, id text not null, hash blob not null,
    position integer not null, time_ms integer not null, primary key (topic_no, source, id)
) without rowid;
create table cursors (subscription text primary key, position integer not null);
insert into cursors values ('raw', 0);
"""
FIRST = 1 << 40
INSERT = "insert into messages values (?, 'shop', ?, null, ?, null, null, ?)"
REMEMBER = "insert or ignore into identities values (1, 'shop', ?, ?, ?, ?)"
SELECT = "select position, body from messages where position > ? order by position limit ?"
# Every column, in the order that `run_empty_whole` gives them to a Message.
SELECT_WHOLE = """
select position, source, id, body, time_ms, key, headers, due_ms
from messages where position > ? order by position limit ?
"""
ADVANCE = "update cursors set position = ? where subscription = 'raw'"

encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(Order).decode


@dataclass(frozen=True, slots=True)
class Tx:
    """What the handlers take instead of `duly.Transaction`."""

    connection: sqlite3.Connection


def create(directory: Path) -> sqlite3.Connection:
    connection = connect(directory / "raw.db")
    connection.executescript(SCHEMA)
    connection.execute(CHARGES)
    return connection


def publish_batch(connection: sqlite3.Connection, first: int, batch: Sequence[Order]) -> None:
    now = time.time_ns() // 1_000_000
    ids = new_ids(len(batch))
    rows = [(first + n, ids[n], now, encode(order)) for n, order in enumerate(batch)]
    connection.execute("begin immediate")
    connection.executemany(INSERT, rows)
    connection.execute("commit")


def remember_and_publish_batch(
    connection: sqlite3.Connection, first: int, batch: Sequence[Order]
) -> None:
    now = time.time_ns() // 1_000_000
    ids = new_ids(len(batch))
    rows = [(first + n, ids[n], now, encode(order)) for n, order in enumerate(batch)]
    known = [
        (id, blake2b(body, digest_size=16).digest(), position, now)
        for position, id, _, body in rows
    ]
    connection.execute("begin immediate")
    connection.executemany(REMEMBER, known)
    connection.executemany(INSERT, rows)
    connection.execute("commit")


Rows = Sequence[tuple[Any, ...]]
Publish = Callable[[sqlite3.Connection, int, Sequence[Order]], None]


def publish(
    directory: Path, messages: int, size: int = BATCH, how: Publish = publish_batch
) -> Sample:
    connection = create(directory)
    warm, rest = orders(WARM), orders(messages, WARM)
    position = FIRST
    for batch in in_batches(warm, max(size, 50)):
        how(connection, position, batch)
        position += len(batch)
    with measured(messages) as sample:
        for batch in in_batches(rest, size):
            how(connection, position, batch)
            position += len(batch)
    return sample


def consume(
    directory: Path,
    messages: int,
    run: Callable[..., None],
    batch: int = BATCH,
    select: str = SELECT,
) -> Sample:
    """The loop: claim, run, settle. ``run`` takes the connection and the rows of a batch."""
    connection = create(directory)
    total = messages + warm_up(batch)
    for n, published in enumerate(in_batches(orders(total), BIG_BATCH)):
        publish_batch(connection, FIRST + 1 + n * BIG_BATCH, published)
    watch = Stopwatch(messages)
    position = FIRST
    while position < FIRST + total:
        if position == FIRST + warm_up(batch):
            watch.start()
        connection.execute("begin immediate")
        rows = connection.execute(select, (position, batch)).fetchall()
        run(connection, rows)
        position = rows[-1][0]
        connection.execute(ADVANCE, (position,))
        connection.execute("commit")
    watch.stop()
    return watch.sample


def warm_up(batch: int) -> int:
    """Messages handled before the clock starts: whole batches."""
    return batch * max(1, WARM // batch)


def run_empty(_connection: sqlite3.Connection, rows: Rows) -> None:
    for _, body in rows:
        ignore(decode(body))


def run_empty_whole(_connection: sqlite3.Connection, rows: Rows) -> None:
    """Makes the whole message of each row, as whoever wants to log its id on a failure does."""
    for _, source, id, body, time_ms, key, headers, due_ms in rows:
        message: Message[Order] = Message(
            "checkout", source, id, body, time_ms, key, headers or NO_HEADERS, due_ms, decode(body)
        )
        ignore(message.decoded)


def run_charge(connection: sqlite3.Connection, rows: Rows) -> None:
    tx: HasConnection = Tx(connection)
    for _, body in rows:
        charge(decode(body), tx)


def run_load(connection: sqlite3.Connection, rows: Rows) -> None:
    load([decode(body) for _, body in rows], Tx(connection))


def consume_and_charge(directory: Path, messages: int, run: Any, batch: int = BATCH) -> Sample:
    sample = consume(directory, messages, run, batch)
    check_charges(directory / "raw.db", messages + warm_up(batch))
    return sample


def effects_then_settle(directory: Path, messages: int) -> Sample:
    """At-least-once by hand: effects in one commit a batch, the cursor in a second one."""
    connection = create(directory)
    own = connect(directory / "raw.db")
    total = messages + WARM
    for n, published in enumerate(in_batches(orders(total), BIG_BATCH)):
        publish_batch(connection, FIRST + 1 + n * BIG_BATCH, published)
    watch = Stopwatch(messages)
    position = FIRST
    while position < FIRST + total:
        if position == FIRST + WARM:
            watch.start()
        rows = connection.execute(SELECT, (position, BATCH)).fetchall()
        own.execute("begin immediate")
        run_charge(own, rows)
        own.execute("commit")
        position = rows[-1][0]
        connection.execute(ADVANCE, (position,))
    watch.stop()
    check_charges(directory / "raw.db", total)
    return watch.sample

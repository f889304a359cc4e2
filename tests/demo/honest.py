"""The files of a small run that kept every promise, made by hand, for tests to falsify."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import duly
from duly.broker import SubscribeOptions
from duly.demo import shop
from duly.demo.book import BOOK, Book, Kill
from duly.demo.crew import url
from duly.demo.evidence import DATABASE, NOTICES, READINGS
from duly.demo.journal import Journal
from duly.guarantees import Dead, Done
from duly.message import Topic

ORDERS = 20
KILLED = "4711-feed"
OPENING = 1000
CRASH_COSTS = 3

# What the one kill did: readings lost, and updates handled again (their positions in the log).
LOST_READINGS = (7, 8)
AGAIN = (5, 6)


def honest_run(folder: Path) -> None:
    """Write what a run of `ORDERS` messages a flow and one kill leaves behind."""
    with Book(folder) as book:
        _publish(folder, book)
        book.open_accounts([(0, OPENING), (1, OPENING)])
        book.note_limits([("dashboard", CRASH_COSTS, 0), ("notify", 0, CRASH_COSTS)])
        held = {"dashboard": 3, "board": 3, "notify": 3, "billing": 3}
        book.note_kill(0, Kill(0.5, KILLED, "billing", held, True))
    with Journal(folder / READINGS) as readings, Journal(folder / NOTICES) as notices:
        for number in range(ORDERS):
            if number not in LOST_READINGS:
                readings.write(f"{number}")
            for _ in range(2 if number in AGAIN else 1):
                notices.write(f"{number}-0")
    _write_effects(folder)


def _publish(folder: Path, book: Book) -> None:
    numbers = range(ORDERS)
    with duly.App("shop", url(folder)) as app:
        readings = [shop.Reading(0, n, 20.0) for n in numbers]
        book.invoke("sensors", [(str(n), 0, n, 20.0) for n in numbers])
        app.publish_many(shop.sensors, readings, ids=[str(n) for n in numbers])
        updates = [shop.RideUpdate(n, 0, "requested") for n in numbers]
        book.invoke("rides", [(f"{n}-0", n, 0, "requested") for n in numbers])
        app.publish_many(shop.rides, updates, ids=[f"{n}-0" for n in numbers])
        payments = [shop.Payment(f"o-{n}", 0, 1, 10) for n in numbers]
        book.invoke("checkout", [(f"o-{n}", 0, 1, 10) for n in numbers])
        app.publish_many(shop.checkout, payments, ids=[f"o-{n}" for n in numbers])
        receipts = [shop.PaymentReceipt(f"o-{n}", 10) for n in numbers]
        app.publish_many(shop.receipts, receipts)
        with app.transaction() as tx:
            for statement in shop.TABLES.split(";"):
                tx.connection.execute(statement)
    book.end("sensors", [("ok", str(n)) for n in numbers])
    book.end("rides", [("ok", f"{n}-0") for n in numbers])
    book.end("checkout", [("ok", f"o-{n}") for n in numbers])


def _write_effects(folder: Path) -> None:
    moved = 10 * ORDERS
    statements: list[tuple[str, Sequence[tuple[object, ...]]]] = [
        (
            "insert into accounts values (?, ?, ?)",
            [(0, OPENING, OPENING - moved), (1, OPENING, OPENING + moved)],
        ),
        ("insert into charges values (?, 0, 1, 10)", [(f"o-{n}",) for n in range(ORDERS)]),
        ("insert into entries values (?, 0, -10)", [(f"o-{n}",) for n in range(ORDERS)]),
        ("insert into entries values (?, 1, 10)", [(f"o-{n}",) for n in range(ORDERS)]),
        (
            "insert into board values (?, 0, 'requested', ?)",
            [(n, 2 if n in AGAIN else 1) for n in range(ORDERS)],
        ),
    ]
    with closing(sqlite3.connect(folder / DATABASE)) as db, db:
        for statement, rows in statements:
            db.executemany(statement, rows)
        for consumer in ("board", "notify"):
            redelivered(db, consumer, f"{AGAIN[0]}-0", len(AGAIN))


def redelivered(db: sqlite3.Connection, consumer: str, id: str, count: int) -> None:
    """Note that rides from this one on were given out again after the kill."""
    db.execute(
        """
        insert into duly_incidents (
            time_ms, kind, topic, subscription, source, id, position, count, worker, detail
        ) select 0, 'redelivery', 'rides', ?, m.source, m.id, m.position, ?, ?, ''
        from duly_messages m where m.id = ?
        """,
        (consumer, count, KILLED, id),
    )


def bury(folder: Path, topic: Topic[Any], consumer: str, id: str) -> None:
    """Let a consumer handle a topic's messages, and give up on one of them."""
    with duly.App("shop", url(folder)) as app:
        broker, _ = app.backends()
        broker.declare([topic])
        lane = broker.subscribe([topic], consumer, SubscribeOptions(topic.promise))
        for delivery in lane.claim(ORDERS, 1_000_000, 5.0):
            dead = delivery.message.id == id
            receipt = delivery.receipt
            lane.settle([Dead(receipt, "given up on") if dead else Done(receipt)])


def falsify(folder: Path, statement: str) -> None:
    """Change the shop's database."""
    with closing(sqlite3.connect(folder / DATABASE)) as db, db:
        db.execute(statement)


def falsify_book(folder: Path, statement: str) -> None:
    """Change the publisher's book."""
    with closing(sqlite3.connect(folder / BOOK)) as db, db:
        db.execute(statement)


def append(path: Path, line: str) -> None:
    """Another line in a journal."""
    with Journal(path) as journal:
        journal.write(line)


def drop(path: Path, *lines: str) -> None:
    """Take lines out of a journal."""
    left = [line for line in path.read_text().splitlines() if line not in lines]
    path.write_text("".join(f"{line}\n" for line in left))

"""An application that works on orders in each way that Kafka has for it."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections import Counter
from pathlib import Path
from typing import Self

import duly
from duly.worker import Worker
from tests.kafka.copying import read
from tests.kafka.work import ORDERS

RECEIPTS: duly.Topic[str] = duly.Topic("receipts", str, guarantee="exactly-once", partitions=4)
COPIES: duly.Topic[str] = duly.Topic("copies", str, guarantee="at-least-once", partitions=4)


class Shop:
    """At work on orders in each way: told to at-least-once, charged once in a database with a
    receipt by its outbox, and copied from topic to topic. What is stored is read at ``seen_at``.
    """

    def __init__(self, url: str, folder: Path, seen_at: str = "") -> None:
        self._seen_at = seen_at or url
        self.told: list[str] = []
        self._effects = folder / "effects.db"
        shop = duly.App("shop", broker=url, store=f"sqlite:///{self._effects}")
        copier = duly.App("copier", broker=url)
        shop.consumer(ORDERS, name="told", guarantee="at-least-once")(self.tell)
        shop.consumer(ORDERS, name="billing", guarantee="exactly-once", batch=25)(self.charge)
        copier.consumer(ORDERS, name="copy", guarantee="exactly-once", batch=25)(self.copy)
        self._apps = [shop, copier]

    def tell(self, order: duly.Message[str]) -> None:
        self.told.append(order.id)

    @staticmethod
    def charge(order: duly.Message[str], tx: duly.Transaction[sqlite3.Connection]) -> None:
        tx.connection.execute("insert into charges values (?)", (order.id,))
        tx.publish(RECEIPTS, order.id, id=f"{order.id}-{time.monotonic_ns()}", key=order.key)

    @staticmethod
    def copy(order: duly.Message[str], tx: duly.Transaction[None]) -> None:
        tx.publish(COPIES, order.id, id=order.id, key=order.key)

    def __enter__(self) -> Self:
        with self._apps[0].transaction() as tx:
            tx.connection.execute("create table charges (id text)")
        self._workers = [Worker(app) for app in self._apps]
        for worker in self._workers:
            worker.start()
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.drain(30.0)
        for app in self._apps:
            app.close()

    def charged(self) -> list[str]:
        """The orders that were charged."""
        with contextlib.closing(sqlite3.connect(self._effects, timeout=30)) as connection:
            return [row[0] for row in connection.execute("select id from charges")]

    def stored(self, topic: str) -> Counter[str]:
        """How often each order stands there, for readers of what is committed."""
        return Counter(each.body.strip('"') for each in read(self._seen_at, topic))

"""What every row does: the message, the handlers, and where the clock starts and stops."""

from __future__ import annotations

import gc
import os
import sqlite3
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import counting
import msgspec

BATCH = 500
BIG_BATCH = 5000
WARM = 2000  # messages before the clock starts: imports, statement caches, first checkpoint

# Asking for these files does nothing but show in a trace where the measured part lies.
START_MARK = "/duly-benchmark-start"
STOP_MARK = "/duly-benchmark-stop"


class Order(msgspec.Struct):
    """A checkout: 200 bytes of JSON."""

    order_id: str
    customer: str
    cents: int
    currency: str
    items: list[str]
    address: str


def orders(count: int, start: int = 0) -> list[Order]:
    """``count`` different orders, each 200 bytes of JSON."""
    return [
        Order(
            order_id=f"o-{n:010d}",
            customer=f"c-{n % 100_000:06d}",
            cents=1000 + n % 9000,
            currency="EUR",
            items=["apples", "bread", "cheese"],
            address="12 Long Street, 10115 Berlin, third floor, ring twice, thank you so much",
        )
        for n in range(start, start + count)
    ]


def in_batches(values: Sequence[Order], size: int) -> Iterator[Sequence[Order]]:
    for first in range(0, len(values), size):
        yield values[first : first + size]


class HasConnection(Protocol):
    """What a handler needs of `duly.Transaction`; the raw loops bring their own."""

    @property
    def connection(self) -> Any:
        """The database of the effects."""
        ...


CHARGES = "create table if not exists charges (order_id text not null, cents integer not null)"
CHARGE = "insert into charges values (?, ?)"


def ignore(order: Order) -> None:
    """The empty handler."""


def charge(order: Order, tx: HasConnection) -> None:
    """One inserted row a message."""
    tx.connection.execute(CHARGE, (order.order_id, order.cents))


def load(batch: list[Order], tx: HasConnection) -> None:
    """One ``executemany`` a batch."""
    tx.connection.executemany(CHARGE, [(order.order_id, order.cents) for order in batch])


def connect(path: Path) -> sqlite3.Connection:
    """A connection as the raw loops and the handlers' own effects use it."""
    connection = sqlite3.connect(path, isolation_level=None, timeout=30, check_same_thread=False)
    connection.execute("pragma journal_mode = wal")
    connection.execute("pragma synchronous = full")
    return connection


@dataclass
class Sample:
    """One measurement of one row."""

    messages: int
    seconds: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def per_s(self) -> float:
        return self.messages / self.seconds if self.seconds else 0.0


class Stopwatch:
    """Starts and stops once; the sample has the time and what was counted between."""

    def __init__(self, messages: int, *, in_worker: bool = True) -> None:
        self.sample = Sample(messages)
        self._in_worker = in_worker
        self._started = 0.0
        self._meters: dict[str, int] = {}

    def start(self) -> None:
        gc.collect()
        gc.freeze()
        if self._in_worker:
            # In every row that handles messages, as `duly run` does in its workers.
            sys.setswitchinterval(0.0005)
        self._meters = {name: count() for name, count in counting.METERS.items()}
        os.access(START_MARK, os.F_OK)
        self._started = time.perf_counter()

    def stop(self) -> None:
        self.sample.seconds = time.perf_counter() - self._started
        os.access(STOP_MARK, os.F_OK)
        for name, before in self._meters.items():
            self.sample.figures[name] = counting.METERS[name]() - before


@contextmanager
def measured(messages: int) -> Iterator[Sample]:
    """Time the block, as an application that is no worker; it handles ``messages`` messages."""
    watch = Stopwatch(messages, in_worker=False)
    watch.start()
    yield watch.sample
    watch.stop()


def check_charges(path: Path, count: int) -> None:
    """Each order was charged once; a fast row that loses or repeats is no result."""
    with sqlite3.connect(path) as connection:
        found = connection.execute("select count(*), count(distinct order_id) from charges")
        rows, different = found.fetchone()
    connection.close()
    if (rows, different) != (count, count):
        raise AssertionError(f"{rows} charges of {different} orders, {count} were published")


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of the values lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

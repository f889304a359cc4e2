"""Waiting times: idle latency with the idle worker's CPU, and publishing beside a busy lane."""

from __future__ import annotations

import multiprocessing
import resource
import sqlite3
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from own import EXACTLY, LEAST, app_in, create_charges, fill
from workload import BATCH, Order, Sample, charge, measured, orders, quantile

import duly
from duly import events
from duly.worker import Worker

# Apart by more than any batch or wait of the worker, so that each message finds it idle. Never by
# the same: in step with what a worker looks at every few milliseconds, all would wait as long.
APART_S = 0.03
IDLE_S = 10.0
TRIES_BEFORE = 20
# Messages published beforehand, which nobody handles: as many as it takes until the write-ahead log
# is written over from its beginning. While the file still grows, each sync is of its size as well.
BEFORE = 40_000


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def idle_cpu_percent() -> float:
    """What this process uses of a core while nothing happens."""
    before, started = cpu_s(), time.perf_counter()
    time.sleep(IDLE_S)
    return 100 * (cpu_s() - before) / (time.perf_counter() - started)


def latency_figures(latencies_s: list[float]) -> dict[str, float]:
    in_ms = [1000 * latency for latency in latencies_s[TRIES_BEFORE:]]
    return {
        "median ms": median(in_ms),
        "p99 ms": quantile(in_ms, 0.99),
        "longest ms": max(in_ms),
    }


class Arrivals:
    """Notes when the handler of each message started, on the clock of the whole machine."""

    def __init__(self) -> None:
        self.started_s = 0.0
        self.there = threading.Event()

    def handle(self, _order: Order) -> None:
        self.started_s = time.monotonic()
        self.there.set()


def idle_latency(directory: Path, messages: int) -> Sample:
    """From the call of ``publish`` to the start of the handler, in one process."""
    arrivals, latencies, chance = Arrivals(), [], Random(1)
    with app_in(directory) as app:
        app.consumer(LEAST, name="idle", guarantee="at-least-once")(arrivals.handle)
        fill(app, EXACTLY, BEFORE)
        with Worker(app), measured(messages + TRIES_BEFORE) as sample:
            for order in orders(messages + TRIES_BEFORE):
                time.sleep(chance.uniform(APART_S, 2 * APART_S))
                arrivals.there.clear()
                called = time.monotonic()
                app.publish(LEAST, order)
                if not arrivals.there.wait(10):
                    raise TimeoutError("a message did not arrive within 10 s")
                latencies.append(arrivals.started_s - called)
            percent = idle_cpu_percent()
    sample.figures = {**latency_figures(latencies), "idle CPU %": percent}
    return sample


def work_elsewhere(directory: Path, to_parent: Connection) -> None:
    """The worker process of `idle_latency_across`: tells arrivals, then its idle CPU."""

    def handle(_order: Order) -> None:
        to_parent.send(time.monotonic())

    with app_in(directory) as app:
        app.consumer(LEAST, name="idle", guarantee="at-least-once")(handle)
        with Worker(app):
            to_parent.send("ready")
            to_parent.recv()
            to_parent.send(idle_cpu_percent())


def idle_latency_across(directory: Path, messages: int) -> Sample:
    """The same with the worker in another process."""
    ours, theirs = multiprocessing.Pipe()
    spawn = multiprocessing.get_context("spawn")
    child = spawn.Process(target=work_elsewhere, args=(directory, theirs))
    child.start()
    latencies, chance = [], Random(1)
    try:
        told(ours)
        with app_in(directory) as app, measured(messages + TRIES_BEFORE) as sample:
            fill(app, EXACTLY, BEFORE)
            for order in orders(messages + TRIES_BEFORE):
                time.sleep(chance.uniform(APART_S, 2 * APART_S))
                called = time.monotonic()
                app.publish(LEAST, order)
                latencies.append(told(ours) - called)
            ours.send("idle")
            percent = told(ours)
    finally:
        child.join(10)
        child.kill()
    sample.figures = {**latency_figures(latencies), "idle CPU %": percent}
    return sample


def told(by: Connection) -> Any:
    if not by.poll(IDLE_S + 20):
        raise TimeoutError("the other process said nothing")
    return by.recv()


# --- publishing beside a busy lane ----------------------------------------------------------------

BUSY_S = 6.0
HANDLER_S = 0.001  # 50 messages fill a transaction: its length is what its time limit makes it
BETWEEN_S = 0.01


class Transactions:
    """Watches how long each transaction held the file: from its first handler to its commit."""

    def __init__(self) -> None:
        self.lengths_s: list[float] = []
        self.began_s: float | None = None

    def began(self) -> None:
        if self.began_s is None:
            self.began_s = time.monotonic()

    def watch(self, event: events.Event) -> None:
        if isinstance(event, events.Committed) and self.began_s is not None:
            self.lengths_s.append(time.monotonic() - self.began_s)
            self.began_s = None


def keep_busy(app: duly.App, to_publisher: Connection, stop: Any) -> None:
    """An exactly-once lane with a slow handler and work for longer than anybody measures."""
    seen = Transactions()
    app.watchers.append(seen.watch)

    @app.consumer(EXACTLY, name="slow", guarantee="exactly-once", batch=BATCH)
    def slow(order: Order, tx: duly.Transaction[sqlite3.Connection]) -> None:
        seen.began()
        time.sleep(HANDLER_S)
        charge(order, tx)

    with Worker(app):
        while not seen.lengths_s:
            time.sleep(0.01)
        to_publisher.send("busy")
        stop.wait()
    to_publisher.send(seen.lengths_s)


def keep_busy_elsewhere(directory: Path, to_publisher: Connection, stop: Any) -> None:
    with app_in(directory) as app:
        keep_busy(app, to_publisher, stop)


def publish_beside(directory: Path, messages: int, *, across: bool) -> Sample:
    """Single publishes while a lane of the same file is busy, here or in another process."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = multiprocessing.Pipe()
    with app_in(directory) as app:
        fill(app, EXACTLY, int(2 * BUSY_S / HANDLER_S))
        create_charges(directory / "duly.db")
        if across:
            stop: Any = spawn.Event()
            busy: Any = spawn.Process(target=keep_busy_elsewhere, args=(directory, theirs, stop))
        else:
            stop = threading.Event()
            busy = threading.Thread(target=keep_busy, args=(app, theirs, stop), daemon=True)
        busy.start()
        told(ours)
        waits = []
        with measured(messages) as sample:
            until = time.monotonic() + BUSY_S
            for order in orders(messages):
                started = time.monotonic()
                app.publish(LEAST, order)
                waits.append(time.monotonic() - started)
                time.sleep(BETWEEN_S)
                if time.monotonic() > until:
                    break
        sample.messages = len(waits)
        stop.set()
        lengths = told(ours)
        busy.join(10)
    sample.figures = wait_figures(waits, lengths)
    return sample


def wait_figures(waits_s: list[float], lengths_s: list[float]) -> dict[str, float]:
    """The distribution, and the longest wait in transactions of the longest kind."""
    return {
        "p50 ms": 1000 * median(waits_s),
        "p90 ms": 1000 * quantile(waits_s, 0.9),
        "p99 ms": 1000 * quantile(waits_s, 0.99),
        "longest ms": 1000 * max(waits_s),
        "transaction ms": 1000 * median(lengths_s),
        "longest transaction ms": 1000 * max(lengths_s),
        "p99 in transactions": quantile(waits_s, 0.99) / median(lengths_s),
        "longest in longest transactions": max(waits_s) / max(lengths_s),
    }

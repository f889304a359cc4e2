"""A large backlog on PostgreSQL: how fast each tenth of it is handled, and beside a transaction
that is open since before the first message.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import psycopg
from postgres_own import LEAST, app_at, nothing
from workload import BATCH, BIG_BATCH, Sample, Stopwatch, orders

import duly
from duly.worker import Worker

PARTS = 10
POLL_S = 0.005
LONGEST_S = 3_000.0


def consume_backlog(url: str, messages: int, *, held: bool = False) -> Sample:
    """The empty handler over all of it; the row's speed is that of the last tenth."""
    with ExitStack() as stack:
        app = stack.enter_context(app_at(url))
        app.consumer(LEAST, name="empty", guarantee="at-least-once", batch=BATCH)(nothing)
        if held:
            _hold(stack, url)
        began = time.perf_counter()
        _fill(app, messages)
        filled_s = time.perf_counter() - began
        part = messages // PARTS
        watch = Stopwatch(messages - part * (PARTS - 1))
        figures = {"messages": float(messages), "published/s": messages / filled_s}
        with Worker(app) as worker:
            before, since = 0, time.perf_counter()
            for number in range(1, PARTS):
                handled = _until(worker, part * number)
                now = time.perf_counter()
                figures[f"tenth {number}"] = (handled - before) / (now - since)
                before, since = handled, now
            watch.sample.messages = messages - before
            watch.start()
            _until(worker, messages)
            watch.stop()
    watch.sample.figures.update(figures)
    return watch.sample


def _fill(app: duly.App, messages: int) -> None:
    """By two threads: one makes messages while the other's are being stored."""

    def publish(first: int) -> None:
        app.publish_many(LEAST, orders(min(BIG_BATCH, messages - first), first))

    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(publish, range(0, messages, BIG_BATCH)):
            pass


def _hold(stack: ExitStack, url: str) -> None:
    """A transaction that has a snapshot and an id of its own, and does nothing more."""
    connection: psycopg.Connection[Any] = stack.enter_context(psycopg.connect(url))
    connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    connection.execute("select pg_current_xact_id()")


def _until(worker: Worker, count: int) -> int:
    give_up = time.monotonic() + LONGEST_S
    while (handled := worker.counts()["empty"].handled) < count:
        if time.monotonic() > give_up:
            raise TimeoutError(f"only {handled} messages were handled")
        worker.wait(POLL_S)
    return handled

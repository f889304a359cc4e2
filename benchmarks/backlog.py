"""A large backlog: speed at its beginning and its end, what a claim takes, and memory."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from statistics import median

from own import LEAST, app_in, fill
from workload import BATCH, WARM, Sample, Stopwatch, ignore

import duly
from duly.broker import SubscribeOptions
from duly.guarantees import Done, Guarantee
from duly.worker import Worker

PART = 50_000
LONGEST_S = 250.0
CLAIMS = 20


def resident_mb() -> float:
    with Path("/proc/self/statm").open(encoding="ascii") as numbers:
        return int(numbers.read().split()[1]) * 4096 / 2**20


def fill_elsewhere(directory: Path, messages: int) -> None:
    """In a process of its own, so that the worker's memory is the worker's."""
    with app_in(directory) as app:
        fill(app, LEAST, messages)


def consume_backlog(directory: Path, messages: int) -> Sample:
    """The empty handler over the whole backlog; the row's speed is that of the last part."""
    elsewhere = multiprocessing.get_context("spawn").Process(
        target=fill_elsewhere, args=(directory, messages)
    )
    elsewhere.start()
    elsewhere.join()
    if elsewhere.exitcode != 0:
        raise AssertionError("the backlog could not be made")
    with app_in(directory) as app:
        app.consumer(LEAST, name="empty", guarantee="at-least-once", batch=BATCH)(ignore)
        claim_ms = claim_time_ms(app)
        left = messages - CLAIMS * BATCH
        with Worker(app) as worker:
            seen = until_handled(worker, min(PART, left // 2))
            first_s = seen[-1][1] - seen[0][1]
            first = seen[-1][0] - seen[0][0]
            memory_first = resident_mb()
            before = until_handled(worker, max(left - PART, left // 2))[-1][0]
            watch = Stopwatch(left - before)
            watch.start()
            until_handled(worker, left)
            watch.stop()
            memory_last = resident_mb()
    watch.sample.figures = {
        "first messages/s": first / first_s,
        "claim ms": claim_ms,
        "MB after the first part": memory_first,
        "MB after the last part": memory_last,
        "MB grown": memory_last - memory_first,
    }
    return watch.sample


def until_handled(worker: Worker, count: int) -> list[tuple[int, float]]:
    """Wait until so many are handled; the first and the last look, each with its time."""
    give_up = time.monotonic() + LONGEST_S
    looks: list[tuple[int, float]] = []
    while True:
        worker.wait(0.001)
        handled, now = worker.counts()["empty"].handled, time.monotonic()
        if handled >= min(count, WARM) or looks:
            looks[1:] = [(handled, now)]
        if handled >= count:
            return looks
        if now > give_up:
            raise TimeoutError(f"only {handled} messages were handled")


def claim_time_ms(app: duly.App) -> float:
    """The median time of a claim by a subscription that has all of the backlog before it."""
    broker, _ = app.backends()
    options = SubscribeOptions(guarantee=Guarantee.AT_LEAST_ONCE)
    subscription = broker.subscribe([LEAST], "empty", options)
    times = []
    for _ in range(CLAIMS):
        started = time.perf_counter()
        claimed = subscription.claim(BATCH, 8 * 1024 * 1024, 1.0)
        times.append(time.perf_counter() - started)
        subscription.settle([Done(delivery.receipt) for delivery in claimed])
    subscription.close()
    return 1000 * median(times)

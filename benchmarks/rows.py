"""Every row of the results: its name, what it runs, how many messages, and its aims."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import peers
import raw
from workload import BIG_BATCH, Sample, ignore


@dataclass(frozen=True, slots=True)
class Ratio:
    """At least ``least`` times the messages a second of the fastest of the rows ``against``."""

    against: tuple[str, ...]
    least: float


@dataclass(frozen=True, slots=True)
class Below:
    """A figure of the row stays under a limit."""

    figure: str
    limit: float


@dataclass(frozen=True, slots=True)
class Above:
    """A figure of the row reaches a limit."""

    figure: str
    limit: float


Aim = Ratio | Below | Above


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the results. ``needs``: a module without which it is left out."""

    name: str
    section: str
    run: Callable[[Path, int], Sample]
    messages: int
    quick: int
    aims: tuple[Aim, ...] = ()
    needs: str | None = None
    rounds: int | None = None
    full_only: bool = False

    @property
    def there(self) -> bool:
        return self.needs is None or find_spec(self.needs) is not None


PUBLISH = "publish"
CALLERS = "publish, one message a call"
CONSUME = "consume, empty handler"
CHARGED = "consume, one inserted row a message"
LOADED = "consume, batch handler with executemany"

ROWS: list[Row] = [
    Row("raw: publish, batches of 500", PUBLISH, raw.publish, 200_000, 50_000),
    Row(
        "raw: publish with identities, batches of 500",
        PUBLISH,
        partial(raw.publish, how=raw.remember_and_publish_batch),
        200_000,
        50_000,
    ),
    Row("raw: publish, one caller", CALLERS, partial(raw.publish, size=1), 3_000, 1_000),
    Row("raw: empty handler", CONSUME, partial(raw.consume, run=raw.run_empty), 500_000, 100_000),
    Row(
        "raw: empty handler, reading whole messages",
        CONSUME,
        partial(raw.consume, run=raw.run_empty_whole, select=raw.SELECT_WHOLE),
        500_000,
        100_000,
    ),
    Row(
        "raw: one row a message",
        CHARGED,
        partial(raw.consume_and_charge, run=raw.run_charge),
        150_000,
        50_000,
    ),
    Row(
        "raw: one row a message, settled in a second commit",
        CHARGED,
        raw.effects_then_settle,
        150_000,
        50_000,
    ),
    Row(
        "raw: one row a message, one commit a message",
        CHARGED,
        partial(raw.consume_and_charge, run=raw.run_charge, batch=1),
        3_000,
        1_000,
    ),
    Row(
        "raw: executemany, batches of 500",
        LOADED,
        partial(raw.consume_and_charge, run=raw.run_load),
        200_000,
        50_000,
    ),
    Row(
        "raw: executemany, batches of 5000",
        LOADED,
        partial(raw.consume_and_charge, run=raw.run_load, batch=BIG_BATCH),
        200_000,
        50_000,
    ),
    Row("Huey: publish, one caller", CALLERS, peers.huey_publish, 2_000, 500, needs="huey"),
    Row(
        "persist-queue: publish, one caller",
        CALLERS,
        peers.persist_queue_publish,
        2_000,
        500,
        needs="persistqueue",
    ),
    Row(
        "Huey: empty handler",
        CONSUME,
        partial(peers.huey_consume, handle=ignore),
        2_000,
        500,
        needs="huey",
    ),
    Row(
        "persist-queue: empty handler, task_done every 500",
        CONSUME,
        peers.persist_queue_consume,
        20_000,
        5_000,
        needs="persistqueue",
    ),
    Row(
        "persist-queue: empty handler, acknowledged",
        CONSUME,
        peers.persist_ack_consume,
        1_000,
        500,
        needs="persistqueue",
    ),
    Row("Huey: one row a message", CHARGED, peers.huey_charge, 1_000, 500, needs="huey"),
    Row(
        "persist-queue: one row a message, task_done every 500",
        CHARGED,
        peers.persist_queue_charge,
        20_000,
        5_000,
        needs="persistqueue",
    ),
]

"""Every row of the results: its name, what it runs, how many messages, and its aims."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import backlog
import own
import peers
import raw
import waiting
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
    """One line of the results.

    ``run`` is given its place (a directory, or a database's URL) and how many messages.
    ``needs``: a module without which it is left out; ``apart``: it is in an environment of its own,
    since it wants other drivers than duly. ``paced``: its figures count, not its
    speed, which is that of a clock. ``rounds``: fewer than the others where it takes long.
    ``backlog``: ``--backlog`` says how many messages.
    """

    name: str
    section: str
    run: Callable[[Any, int], Sample]
    messages: int
    quick: int
    aims: tuple[Aim, ...] = ()
    needs: str | None = None
    rounds: int | None = None
    paced: bool = False
    count: bool = True
    full_only: bool = False
    backlog: bool = False
    apart: bool = False

    @property
    def python(self) -> str:
        """What runs it."""
        return sys.executable if not self.apart or self.needs is None else python_with(self.needs)

    @property
    def there(self) -> bool:
        if self.apart and self.needs is not None:
            return Path(python_with(self.needs)).exists()
        return self.needs is None or find_spec(self.needs) is not None


def python_with(package: str) -> str:
    """The interpreter of the environment that a peer has to itself (see `apart.py`)."""
    return str(Path(sys.prefix) / "peers" / package / "bin" / "python")


# Of what is far from all others, the order of magnitude is enough.
FEW = 3

PUBLISH = "publish"
CALLERS = "publish, one message a call"
CONSUME = "consume, empty handler"
CHARGED = "consume, one inserted row a message"
LOADED = "consume, batch handler with executemany"

LATENCY = "idle latency, from publish to handler start"
BESIDE = "publishing beside a busy exactly-once lane"
FLAT = "a backlog, empty handler"

RAW_PUBLISH = "raw: publish, batches of 500"
RAW_PUBLISH_ONCE = "raw: publish with identities, batches of 500"
RAW_SINGLE = "raw: publish, one caller"
RAW_EMPTY = "raw: empty handler"
RAW_CHARGE = "raw: one row a message"
RAW_LOAD = "raw: executemany, batches of 500"
RAW_LOAD_BIG = "raw: executemany, batches of 5000"
SINGLE = "duly: publish, one caller"
AT_LEAST = "duly: at-least-once, one row a message, settled in a second commit"
SMALL_BACKLOG = "duly: the last of a backlog of 50 thousand"
LARGE_BACKLOG = "duly: the last 50 thousand of a backlog of 5 million"


def beside(name: str, least: float) -> tuple[Ratio, ...]:
    return (Ratio((name,), least),)


OWN: list[Row] = [
    Row(
        "duly: publish_many, batches of 500",
        PUBLISH,
        own.publish,
        200_000,
        50_000,
        beside(RAW_PUBLISH, 0.8),
    ),
    Row(
        "duly: publish_many, batches of 500, exactly-once topic",
        PUBLISH,
        partial(own.publish, topic=own.EXACTLY),
        200_000,
        50_000,
        beside(RAW_PUBLISH_ONCE, 0.8),
    ),
    Row(SINGLE, CALLERS, own.publish_singly, 3_000, 1_000),
    Row(
        "duly: publish, one caller, exactly-once topic",
        CALLERS,
        partial(own.publish_singly, topic=own.EXACTLY),
        3_000,
        1_000,
    ),
    Row(
        "duly: publish, 50 threads",
        CALLERS,
        own.publish_from_threads,
        30_000,
        10_000,
        (Ratio((SINGLE, RAW_SINGLE), 4),),
    ),
    Row(
        "duly: apublish, 50 tasks",
        CALLERS,
        own.publish_from_tasks,
        50_000,
        20_000,
        (Ratio((SINGLE, RAW_SINGLE), 7),),
    ),
    *(
        Row(
            f"duly: empty handler, {guarantee}",
            CONSUME,
            partial(own.consume_empty, guarantee=guarantee),
            500_000,
            300_000,
            beside(RAW_EMPTY, 0.6),
        )
        for guarantee in ("at-most-once", "at-least-once", "exactly-once")
    ),
    Row(
        "duly: empty handler, at-least-once, deleting what is done (the default)",
        CONSUME,
        partial(own.consume_empty, guarantee="at-least-once", topic=own.DELETED),
        500_000,
        300_000,
    ),
    Row(AT_LEAST, CHARGED, own.consume_at_least_once, 300_000, 100_000),
    Row(
        "duly: exactly-once by claim, one row a message",
        CHARGED,
        own.consume_and_charge,
        300_000,
        100_000,
        (Ratio((RAW_CHARGE,), 0.8), Ratio((AT_LEAST,), 0.95)),
    ),
    Row(
        "duly: exactly-once by inbox, one row a message",
        CHARGED,
        partial(own.consume_and_charge, store="effects.db"),
        150_000,
        50_000,
        beside(AT_LEAST, 0.65),
    ),
    Row(
        "duly: exactly-once by claim, one commit a message",
        CHARGED,
        partial(own.consume_and_charge, batch=1),
        3_000,
        1_000,
        rounds=FEW,
    ),
    Row(
        "duly: exactly-once by inbox, one commit a message",
        CHARGED,
        partial(own.consume_and_charge, batch=1, store="effects.db"),
        2_000,
        1_000,
        rounds=FEW,
    ),
    Row(
        "duly: at-least-once, one commit of effects and one of settling a message",
        CHARGED,
        partial(own.consume_at_least_once, batch=1),
        2_000,
        1_000,
        rounds=FEW,
    ),
    Row(
        "duly: exactly-once, executemany, batches of 500",
        LOADED,
        own.consume_and_load,
        300_000,
        200_000,
        beside(RAW_LOAD, 0.8),
    ),
    Row(
        "duly: exactly-once, executemany, batches of 5000",
        LOADED,
        partial(own.consume_and_load, batch=BIG_BATCH),
        300_000,
        200_000,
        beside(RAW_LOAD_BIG, 0.8),
    ),
    Row(
        "duly: one process",
        LATENCY,
        waiting.idle_latency,
        200,
        100,
        (Below("median ms", 2), Below("idle CPU %", 2)),
        rounds=2,
        paced=True,
    ),
    Row(
        "duly: two processes",
        LATENCY,
        waiting.idle_latency_across,
        200,
        100,
        (Below("median ms", 10), Below("idle CPU %", 2)),
        rounds=2,
        paced=True,
    ),
    Row(
        "duly: publisher and worker in one process",
        BESIDE,
        partial(waiting.publish_beside, across=False),
        1_000,
        1_000,
        (Below("p99 in transactions", 2), Below("longest in longest transactions", 2)),
        rounds=2,
        paced=True,
    ),
    Row(
        "duly: publisher and worker in two processes",
        BESIDE,
        partial(waiting.publish_beside, across=True),
        1_000,
        1_000,
        (Below("p99 in transactions", 2), Below("longest in longest transactions", 2)),
        rounds=2,
        paced=True,
    ),
    Row(SMALL_BACKLOG, FLAT, backlog.consume_backlog, 50_000, 50_000, rounds=FEW),
    Row(
        LARGE_BACKLOG,
        FLAT,
        backlog.consume_backlog,
        5_000_000,
        200_000,
        (Ratio((SMALL_BACKLOG,), 0.8), Below("MB grown", 8)),
        rounds=FEW,
        count=False,
        full_only=True,
    ),
]

BESIDE_DULY: list[Row] = [
    Row(RAW_PUBLISH, PUBLISH, raw.publish, 200_000, 50_000),
    Row(
        RAW_PUBLISH_ONCE,
        PUBLISH,
        partial(raw.publish, how=raw.remember_and_publish_batch),
        200_000,
        50_000,
    ),
    Row(RAW_SINGLE, CALLERS, partial(raw.publish, size=1), 3_000, 1_000),
    Row(RAW_EMPTY, CONSUME, partial(raw.consume, run=raw.run_empty), 500_000, 100_000),
    Row(
        "raw: empty handler, reading whole messages",
        CONSUME,
        partial(raw.consume, run=raw.run_empty_whole, select=raw.SELECT_WHOLE),
        500_000,
        100_000,
    ),
    Row(
        RAW_CHARGE,
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
        rounds=FEW,
    ),
    Row(
        RAW_LOAD,
        LOADED,
        partial(raw.consume_and_charge, run=raw.run_load),
        200_000,
        50_000,
    ),
    Row(
        RAW_LOAD_BIG,
        LOADED,
        partial(raw.consume_and_charge, run=raw.run_load, batch=BIG_BATCH),
        200_000,
        50_000,
    ),
    Row(
        "Huey: publish, one caller",
        CALLERS,
        peers.huey_publish,
        2_000,
        500,
        needs="huey",
        rounds=FEW,
    ),
    Row(
        "persist-queue: publish, one caller",
        CALLERS,
        peers.persist_queue_publish,
        2_000,
        500,
        needs="persistqueue",
        rounds=FEW,
    ),
    Row(
        "Huey: empty handler",
        CONSUME,
        partial(peers.huey_consume, handle=ignore),
        2_000,
        500,
        needs="huey",
        rounds=FEW,
    ),
    Row(
        "persist-queue: empty handler, task_done every 500",
        CONSUME,
        peers.persist_queue_consume,
        20_000,
        5_000,
        needs="persistqueue",
        rounds=FEW,
    ),
    Row(
        "persist-queue: empty handler, acknowledged",
        CONSUME,
        peers.persist_ack_consume,
        1_000,
        500,
        needs="persistqueue",
        rounds=FEW,
    ),
    Row(
        "Huey: one row a message", CHARGED, peers.huey_charge, 1_000, 500, needs="huey", rounds=FEW
    ),
    Row(
        "persist-queue: one row a message, task_done every 500",
        CHARGED,
        peers.persist_queue_charge,
        20_000,
        5_000,
        needs="persistqueue",
        rounds=FEW,
    ),
]

SECTIONS = (PUBLISH, CALLERS, CONSUME, CHARGED, LOADED, LATENCY, BESIDE, FLAT)
# Within a section: duly, then the raw loops, then the peers.
ROWS = sorted([*OWN, *BESIDE_DULY], key=lambda row: SECTIONS.index(row.section))

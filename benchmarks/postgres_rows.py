"""Every row of the results on PostgreSQL; see `rows.py` for what a row says."""

from __future__ import annotations

from functools import partial

import postgres_backlog as backlog
import postgres_own as own
import postgres_peers as peers
import postgres_raw as raw
from rows import Ratio, Row, beside

PUBLISH = "publish, batches of 500"
CALLERS = "publish, one message a call"
CONSUME = "consume, empty handler"
CHARGED = "consume, one inserted row a message"
ACHARGED = "consume, one inserted row a message, async def"
LOADED = "consume, batch handler with one statement"
WAITING = "consume, async handlers that wait 10 ms, 500 at a time"
INBOX = "effects here, the broker in memory: exactly-once by inbox"
FAR = "the same with the server 1 ms away"
FLAT = "a backlog, empty handler"

RAW_PUBLISH = "raw: publish, executemany"
RAW_PUBLISH_ONCE = "raw: publish with identities, executemany"
RAW_SINGLE = "raw: publish, one caller"
RAW_EMPTY = "raw: empty handler"
RAW_CHARGE = "raw: one row a message"
RAW_ACHARGE = "raw: one row a message, async"
RAW_LOAD = "raw: one statement a batch"
RAW_WAIT = "raw: a batch waits side by side"
RAW_INBOX = "raw: an inbox by hand, one statement a batch"
SINGLE = "duly: publish, one caller"
LEAST = "duly: at-least-once, effects in a commit of their own"
ALEAST = "duly: at-least-once, async def, effects in a commit of their own"
SMALL = "duly: a small backlog"

DULY: list[Row] = [
    Row(
        "duly: publish_many",
        PUBLISH,
        own.publish,
        100_000,
        20_000,
        beside(RAW_PUBLISH, 0.8),
    ),
    Row(
        "duly: publish_many, exactly-once topic",
        PUBLISH,
        partial(own.publish, topic=own.EXACTLY),
        100_000,
        20_000,
        beside(RAW_PUBLISH_ONCE, 0.8),
    ),
    Row(SINGLE, CALLERS, own.publish_singly, 1_500, 500, beside(RAW_SINGLE, 0.8)),
    Row(
        "duly: publish, one caller, exactly-once topic",
        CALLERS,
        partial(own.publish_singly, topic=own.EXACTLY),
        1_500,
        500,
    ),
    Row("duly: publish, 50 threads", CALLERS, own.publish_from_threads, 10_000, 5_000),
    Row("duly: apublish, 50 tasks", CALLERS, own.publish_from_tasks, 20_000, 10_000),
    *(
        Row(
            f"duly: empty handler, {guarantee}",
            CONSUME,
            partial(own.consume_empty, guarantee=guarantee),
            150_000,
            50_000,
            beside(RAW_EMPTY, 0.8),
        )
        for guarantee in ("at-most-once", "at-least-once", "exactly-once")
    ),
    Row(LEAST, CHARGED, own.consume_at_least_once, 50_000, 10_000),
    Row(
        "duly: exactly-once by claim",
        CHARGED,
        own.consume_and_charge,
        50_000,
        10_000,
        (Ratio((RAW_CHARGE,), 0.8), Ratio((LEAST,), 0.95)),
    ),
    Row(
        "duly: exactly-once by claim, one commit a message",
        CHARGED,
        partial(own.consume_and_charge, batch=1),
        1_000,
        500,
    ),
    Row(
        "duly: at-least-once, two commits a message",
        CHARGED,
        partial(own.consume_at_least_once, batch=1),
        1_000,
        500,
    ),
    Row(ALEAST, ACHARGED, own.aconsume_at_least_once, 30_000, 10_000),
    Row(
        "duly: exactly-once by claim, async def",
        ACHARGED,
        own.aconsume_and_charge,
        30_000,
        10_000,
        (Ratio((RAW_ACHARGE,), 0.8), Ratio((ALEAST,), 0.95)),
    ),
    Row(
        "duly: exactly-once by claim, one statement a batch",
        LOADED,
        own.consume_and_load,
        100_000,
        20_000,
        beside(RAW_LOAD, 0.8),
    ),
    Row("duly: at-least-once, concurrency=500", WAITING, own.consume_waiting, 50_000, 10_000),
    Row(
        "duly: at-least-once, concurrency=500, batch=250",
        WAITING,
        partial(own.consume_waiting, batch=250),
        50_000,
        10_000,
        beside(RAW_WAIT, 0.8),
    ),
    *(
        Row(
            f"duly: {name}{', 1 ms away' if delay_s else ''}",
            FAR if delay_s else INBOX,
            partial(own.by_inbox, declare=declare, delay_s=delay_s),
            2_500 if delay_s and not quick else 30_000,
            1_000 if delay_s and not quick else 10_000,
        )
        for delay_s in (0.0, 0.0005)
        for name, declare, quick in (
            ("one row a message", own.one_by_one(tx_s=10.0), False),
            ("one row a message, in a pipeline", own.one_by_one(pipeline=True, tx_s=10.0), True),
            ("async def", own.awaited(tx_s=10.0), False),
            ("async def, in a pipeline", own.awaited(pipeline=True, tx_s=10.0), True),
            ("batch handler", own.together, True),
        )
    ),
    Row(SMALL, FLAT, backlog.consume_backlog, 100_000, 50_000, rounds=3),
    Row(
        "duly: a large backlog",
        FLAT,
        backlog.consume_backlog,
        1_000_000,
        100_000,
        beside(SMALL, 0.8),
        rounds=1,
        count=False,
        full_only=True,
        backlog=True,
    ),
    Row(
        "duly: a large backlog, a transaction open from the start",
        FLAT,
        partial(backlog.consume_backlog, held=True),
        1_000_000,
        100_000,
        beside(SMALL, 0.8),
        rounds=1,
        count=False,
        full_only=True,
        backlog=True,
    ),
]

RAW: list[Row] = [
    Row(RAW_PUBLISH, PUBLISH, raw.publish, 100_000, 20_000),
    Row(
        "raw: publish, one statement with arrays",
        PUBLISH,
        partial(raw.publish, how=raw.publish_arrays),
        100_000,
        20_000,
    ),
    Row(
        RAW_PUBLISH_ONCE,
        PUBLISH,
        partial(raw.publish, how=raw.remember_and_publish),
        50_000,
        20_000,
    ),
    Row(RAW_SINGLE, CALLERS, raw.publish_singly, 1_500, 500),
    Row(RAW_EMPTY, CONSUME, raw.consume, 150_000, 50_000),
    Row(RAW_CHARGE, CHARGED, partial(raw.consume, run=raw.run_charge), 50_000, 10_000),
    Row(
        "raw: one row a message, settled in a second commit",
        CHARGED,
        raw.consume_then_settle,
        50_000,
        10_000,
    ),
    Row(
        "raw: one row a message, one commit a message",
        CHARGED,
        partial(raw.consume, run=raw.run_charge, size=1),
        1_000,
        500,
    ),
    Row(RAW_ACHARGE, ACHARGED, partial(raw.aconsume, run=raw.arun_charge), 30_000, 10_000),
    Row(RAW_LOAD, LOADED, partial(raw.consume, run=raw.run_load), 100_000, 20_000),
    Row(RAW_WAIT, WAITING, partial(raw.aconsume, run=raw.arun_wait), 50_000, 10_000),
    Row(RAW_INBOX, INBOX, raw.inbox, 30_000, 10_000),
]

PEERS: list[Row] = [
    *(
        Row(f"pgqueuer: {name}", section, run, messages, quick, needs="pgqueuer")
        for name, section, run, messages, quick in (
            ("enqueue, lists of 500", PUBLISH, peers.pgqueuer_publish, 20_000, 5_000),
            (
                "enqueue, one caller",
                CALLERS,
                partial(peers.pgqueuer_publish, size=1),
                1_000,
                300,
            ),
            ("empty handler", CONSUME, peers.pgqueuer_consume, 5_000, 2_000),
            ("one row and a dedup row", CHARGED, peers.pgqueuer_charge, 3_000, 1_000),
            (
                "async handlers",
                WAITING,
                partial(peers.pgqueuer_consume, handle=peers.pause),
                5_000,
                2_000,
            ),
        )
    ),
    *(
        Row(f"procrastinate: {name}", section, run, messages, quick, needs="procrastinate")
        for name, section, run, messages, quick in (
            ("batch_defer, 500", PUBLISH, peers.procrastinate_publish, 20_000, 5_000),
            (
                "defer, one caller",
                CALLERS,
                partial(peers.procrastinate_publish, size=1),
                1_000,
                300,
            ),
            ("empty handler", CONSUME, peers.procrastinate_consume, 1_500, 500),
            ("one row and a dedup row", CHARGED, peers.procrastinate_charge, 1_000, 500),
            (
                "async handlers",
                WAITING,
                partial(peers.procrastinate_consume, handle=peers.pause),
                1_500,
                500,
            ),
        )
    ),
]

SECTIONS = (PUBLISH, CALLERS, CONSUME, CHARGED, ACHARGED, LOADED, WAITING, INBOX, FAR, FLAT)
# Within a section: duly, then the raw loops, then the peers.
ROWS = sorted([*DULY, *RAW, *PEERS], key=lambda row: SECTIONS.index(row.section))

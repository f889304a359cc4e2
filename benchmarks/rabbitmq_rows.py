"""Every row of the results on RabbitMQ; see `rows.py` for what a row says."""

from __future__ import annotations

from functools import partial

import rabbitmq_own as own
import rabbitmq_peers as peers
import rabbitmq_raw as raw
from rows import Ratio, Row, beside

PUBLISH = "publish, batches of 500, confirmed"
CALLERS = "publish, one message a call, confirmed"
CONSUME = "consume, empty handler"
CHARGED = "consume, one inserted row a message"
LOADED = "consume, batch handler with one statement"

RAW_PUBLISH = "raw: py-amqp, publish in a pipeline"
RAW_SINGLE = "raw: py-amqp, publish, one caller"
RAW_EMPTY = "raw: py-amqp, empty handler, one acknowledgement a batch"
RAW_CHARGE = "raw: py-amqp and psycopg, one row a message, by an inbox by hand"
RAW_LOAD = "raw: py-amqp and psycopg, one statement a batch, by an inbox by hand"
LEAST = "duly: at-least-once, effects in a commit of their own"
LEAST_LOAD = "duly: at-least-once, one statement a batch"

DULY: list[Row] = [
    Row("duly: publish_many", PUBLISH, own.publish, 40_000, 10_000, beside(RAW_PUBLISH, 0.8)),
    Row(
        "duly: publish, one caller",
        CALLERS,
        partial(own.publish, size=1),
        1_000,
        300,
        beside(RAW_SINGLE, 0.8),
    ),
    Row(
        "duly: empty handler, at-least-once",
        CONSUME,
        own.consume_empty,
        60_000,
        20_000,
        beside(RAW_EMPTY, 0.8),
    ),
    Row(LEAST, CHARGED, own.consume_at_least, 20_000, 5_000),
    Row(
        "duly: exactly-once by inbox",
        CHARGED,
        own.consume_exactly,
        20_000,
        5_000,
        (Ratio((RAW_CHARGE,), 0.8), Ratio((LEAST,), 0.8)),
    ),
    Row(LEAST_LOAD, LOADED, partial(own.consume_at_least, together=True), 40_000, 10_000),
    Row(
        "duly: exactly-once by inbox, one statement a batch",
        LOADED,
        partial(own.consume_exactly, together=True),
        40_000,
        10_000,
        (Ratio((RAW_LOAD,), 0.8), Ratio((LEAST_LOAD,), 0.8)),
    ),
]

RAW: list[Row] = [
    Row(RAW_PUBLISH, PUBLISH, raw.publish, 40_000, 10_000),
    Row(RAW_SINGLE, CALLERS, partial(raw.publish, size=1), 1_000, 300),
    Row(RAW_EMPTY, CONSUME, raw.consume_empty, 60_000, 20_000),
    Row(
        RAW_CHARGE,
        CHARGED,
        partial(raw.consume_and_charge, by_inbox=True),
        20_000,
        5_000,
    ),
    Row(
        "raw: py-amqp and psycopg, one row a message, without an inbox",
        CHARGED,
        partial(raw.consume_and_charge, by_inbox=False),
        20_000,
        5_000,
    ),
    Row(
        RAW_LOAD,
        LOADED,
        partial(raw.consume_and_charge, by_inbox=True, together=True),
        40_000,
        10_000,
    ),
]

PEERS: list[Row] = [
    Row(f"{name}: {what}", section, run, messages, quick, needs=name.lower())
    for name, what, section, run, messages, quick in (
        ("FastStream", "publish, 500 tasks", PUBLISH, peers.faststream_publish, 10_000, 2_000),
        (
            "FastStream",
            "publish, one caller",
            CALLERS,
            partial(peers.faststream_publish, size=1),
            1_000,
            300,
        ),
        ("Dramatiq", "send, one caller", CALLERS, peers.dramatiq_publish, 1_000, 300),
        ("Celery", "delay, one caller", CALLERS, peers.celery_publish, 1_000, 300),
        ("FastStream", "empty handler", CONSUME, peers.faststream_consume, 10_000, 2_000),
        ("Dramatiq", "empty handler, 8 threads", CONSUME, peers.dramatiq_consume, 5_000, 2_000),
        ("Celery", "empty handler, 8 threads", CONSUME, peers.celery_consume, 5_000, 2_000),
        ("FastStream", "a row and a dedup row", CHARGED, peers.faststream_charge, 4_000, 1_000),
        ("Dramatiq", "a row and a dedup row", CHARGED, peers.dramatiq_charge, 3_000, 1_000),
        ("Celery", "a row and a dedup row", CHARGED, peers.celery_charge, 3_000, 1_000),
    )
]

SECTIONS = (PUBLISH, CALLERS, CONSUME, CHARGED, LOADED)
# Within a section: duly, then the raw loops, then the peers.
ROWS = sorted([*DULY, *RAW, *PEERS], key=lambda row: SECTIONS.index(row.section))

"""Every row of the results on Kafka; see `rows.py` for what a row says."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import kafka_copying as copying
import kafka_own as own
import kafka_peers as peers
import kafka_raw as raw
from rows import Ratio, Row, beside
from workload import Sample

PUBLISH = "publish, batches of 500, confirmed"
CALLERS = "publish, one message a call, confirmed"
CONSUME = "consume, empty handler"
CHARGED = "consume, one inserted row a message"
LOADED = "consume, batch handler with one statement"
SLOW = "consume, a statement of 2 ms and a row a message, one partition"
COPIED = "Kafka to Kafka, 1 KB, by each guarantee"
CURVE = "Kafka to Kafka, 1 KB, exactly-once by the length of its transactions"

RAW_PUBLISH = "raw: confluent-kafka, publish in batches"
RAW_SINGLE = "raw: confluent-kafka, publish, one caller"
RAW_EMPTY = "raw: confluent-kafka, empty handler, one commit a batch"
RAW_NAMED = "raw: the same, and looks that each record has an id"
RAW_CHARGE = "raw: confluent-kafka and psycopg, one row a message, then the position"
RAW_CURSOR = "raw: confluent-kafka and psycopg, one row a message, a cursor by hand"
RAW_LOAD = "raw: confluent-kafka and psycopg, one statement a batch, a cursor by hand"
LEAST = "duly: at-least-once, effects in a commit of their own"
ONE_LANE = "duly: exactly-once by cursor, one lane"
LEAST_LOAD = "duly: at-least-once, one statement a batch"

DULY: list[Row] = [
    Row("duly: publish_many", PUBLISH, own.publish, 60_000, 20_000, beside(RAW_PUBLISH, 0.7)),
    Row(
        "duly: publish, one caller",
        CALLERS,
        partial(own.publish, size=1),
        1_000,
        300,
        beside(RAW_SINGLE, 0.7),
    ),
    Row(
        "duly: empty handler, at-least-once",
        CONSUME,
        own.consume_empty,
        100_000,
        50_000,
        (Ratio((RAW_EMPTY,), 0.7), Ratio((RAW_NAMED,), 0.7)),
    ),
    Row(
        "duly: empty handler, at-most-once",
        CONSUME,
        partial(own.consume_empty, guarantee="at-most-once"),
        100_000,
        50_000,
    ),
    Row(LEAST, CHARGED, own.consume_at_least, 20_000, 5_000, beside(RAW_CHARGE, 0.7)),
    Row(
        "duly: exactly-once by cursor",
        CHARGED,
        own.consume_exactly,
        20_000,
        5_000,
        (Ratio((RAW_CURSOR,), 0.7), Ratio((LEAST,), 0.95)),
    ),
    Row(LEAST_LOAD, LOADED, partial(own.consume_at_least, together=True), 40_000, 20_000),
    Row(
        "duly: exactly-once by cursor, one statement a batch",
        LOADED,
        partial(own.consume_exactly, together=True),
        40_000,
        20_000,
        (Ratio((RAW_LOAD,), 0.7), Ratio((LEAST_LOAD,), 0.95)),
    ),
    Row(ONE_LANE, SLOW, partial(own.consume_slowly, key_lanes=1), 1_000, 300),
    Row(
        "duly: exactly-once by cursor, 8 lanes of keys",
        SLOW,
        partial(own.consume_slowly, key_lanes=8),
        4_000,
        1_000,
        beside(ONE_LANE, 4.0),
    ),
]

RAW: list[Row] = [
    Row(RAW_PUBLISH, PUBLISH, raw.publish, 60_000, 20_000),
    Row(RAW_SINGLE, CALLERS, partial(raw.publish, size=1), 1_000, 300),
    Row(RAW_EMPTY, CONSUME, raw.consume_empty, 100_000, 50_000),
    Row(RAW_NAMED, CONSUME, partial(raw.consume_empty, named=True), 100_000, 50_000),
    Row(RAW_CHARGE, CHARGED, partial(raw.consume_and_charge, by_cursor=False), 20_000, 5_000),
    Row(RAW_CURSOR, CHARGED, partial(raw.consume_and_charge, by_cursor=True), 20_000, 5_000),
    Row(
        RAW_LOAD,
        LOADED,
        partial(raw.consume_and_charge, by_cursor=True, together=True),
        40_000,
        20_000,
    ),
]


def _peer(
    name: str, section: str, run: Callable[[str, int], Sample], messages: int, needs: str
) -> Row:
    """Of a peer what it does is not counted, and two rounds are enough."""
    apart = needs == "quixstreams"
    return Row(
        name, section, run, messages, min(messages, 2000), needs=needs, rounds=2, count=False,
        apart=apart,
    )  # fmt: skip


def _faststream(driver: str, needs: str) -> list[Row]:
    name = f"FastStream by {driver}"
    consume = partial(peers.faststream_consume, driver=driver)
    publish = partial(peers.faststream_publish, driver=driver)
    singly, together = partial(consume, by_batches=False), partial(consume, by_batches=True)
    charge = partial(peers.faststream_charge, driver=driver)
    return [
        _peer(f"{name}: publish_batch", PUBLISH, publish, 20_000, needs),
        _peer(f"{name}: publish, one caller", CALLERS, partial(publish, size=1), 500, needs),
        _peer(f"{name}: empty handler", CONSUME, singly, 3_000, needs),
        _peer(f"{name}: empty handler, by batches", CONSUME, together, 20_000, needs),
        _peer(f"{name}: a row and a dedup row", CHARGED, charge, 2_000, needs),
    ]


PEERS: list[Row] = [
    *_faststream("confluent", "faststream"),
    *_faststream("aiokafka", "aiokafka"),
    _peer("Quix Streams: empty handler", CONSUME, peers.quix_consume, 10_000, "quixstreams"),
    _peer("Quix Streams: a row and a dedup row", CHARGED, peers.quix_charge, 2_000, "quixstreams"),
]

COPY_LEAST = "duly: at-least-once, batches of 500"
RAW_COPY_LEAST = "raw: confluent-kafka, at-least-once, batches of 500"
RAW_COPY = "raw: confluent-kafka, transactions of 100 ms"
RAW_COPY_NEW = f"{RAW_COPY}, each copy an event of its own"


def _exactly(tx_s: float) -> Row:
    is_aim = tx_s == 0.1
    return Row(
        f"duly: exactly-once, transactions of {tx_s * 1000:.0f} ms",
        COPIED if is_aim else CURVE,
        partial(copying.exactly_once, tx_s=tx_s),
        40_000,
        20_000,
        (Ratio((COPY_LEAST,), 0.9), *beside(RAW_COPY, 0.7), *beside(RAW_COPY_NEW, 0.7))
        if is_aim
        else (),
    )


COPIES: list[Row] = [
    Row("duly: at-most-once", COPIED, copying.at_most_once, 40_000, 20_000),
    Row(COPY_LEAST, COPIED, copying.at_least_once, 40_000, 20_000, beside(RAW_COPY_LEAST, 0.7)),
    *(_exactly(tx_s) for tx_s in (0.1, 0.01, 0.03, 0.3, 1.0)),
    Row(RAW_COPY_LEAST, COPIED, copying.raw_at_least_once, 40_000, 20_000),
    Row(RAW_COPY, COPIED, partial(copying.raw_exactly_once, tx_s=0.1), 40_000, 20_000),
    Row(
        RAW_COPY_NEW,
        COPIED,
        partial(copying.raw_exactly_once, tx_s=0.1, headers_for=copying.as_new),
        40_000,
        20_000,
    ),
]

SECTIONS = (PUBLISH, CALLERS, CONSUME, CHARGED, LOADED, SLOW, COPIED, CURVE)
# Within a section: duly, then the raw loops, then the peers.
ROWS = sorted([*DULY, *RAW, *PEERS, *COPIES], key=lambda row: SECTIONS.index(row.section))

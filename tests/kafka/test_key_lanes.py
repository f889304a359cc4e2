"""Exactly-once by lanes of keys within a partition: transactions side by side, each with a cursor
of its own, and every order charged once.
"""

from __future__ import annotations

import contextlib
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from psycopg import sql

import duly
from duly.broker import Span, SubscribeOptions
from duly.brokers.kafka import KafkaBroker
from duly.brokers.kafka.address import address_of
from duly.brokers.kafka.reader import Reader
from duly.contract import Run, contract_on, render
from duly.errors import ConfigurationError, ContractRefused
from duly.guarantees import Guarantee
from duly.worker import Worker
from tests.kafka.charging import CREATE, KEYS, ORDERS, shop
from tests.kafka.work import broker_at, namespace_of, stranger
from tests.servers.postgres import Schema
from tests.waiting import eventually

ROOT = Path(__file__).parents[2]
SILENT = "&session.timeout.ms=2000&heartbeat.interval.ms=400"
EXACTLY = Guarantee.EXACTLY_ONCE


@pytest.fixture
def store(pg_schema: Schema) -> str:
    with closing(pg_schema.connect()) as own:
        own.execute(CREATE)
        own.commit()
    return f"{pg_schema.url}{'&' if '?' in pg_schema.url else '?'}schema={pg_schema.duly}"


def charges(schema: Schema) -> list[tuple[int, str]]:
    """What was charged, with its key, in the order of the inserts."""
    with closing(schema.connect()) as own:
        return [*own.execute("select id, key from charges order by at").fetchall()]


def cursors(schema: Schema) -> list[str]:
    """The logs that have one, without the name of their partition's."""
    logs = sql.SQL("select log from {}.log_cursors").format(sql.Identifier(schema.duly))
    with closing(schema.connect()) as own:
        rows = own.execute(logs).fetchall()
    return sorted(log.partition("#")[2] for (log,) in rows)


def publish(app: duly.App, numbers: range) -> None:
    app.publish_many(ORDERS, list(numbers), keys=[f"k{number % KEYS}" for number in numbers])


def in_order(charged: list[tuple[int, str]]) -> bool:
    by_key: dict[str, list[int]] = defaultdict(list)
    for number, key in charged:
        by_key[key].append(number)
    return all(numbers == sorted(numbers) for numbers in by_key.values())


def told(app: duly.App) -> str:
    broker, store = app.backends()
    found = contract_on(broker, store, app.topics, app.consumers, Run(), ())
    return " ".join(render(found).split())


@pytest.mark.parametrize("key_lanes", [6, 1])
def test_transactions_of_one_partition_run_side_by_side(
    kafka_url: str, store: str, pg_schema: Schema, key_lanes: int
):
    """Three at a time meet; of a partition that is not cut no two ever do."""
    app = duly.App("shop", broker=kafka_url, store=store)
    meeting, met, alone = threading.Barrier(3), threading.Event(), threading.Event()

    @app.consumer(ORDERS, name="billing", guarantee="exactly-once", lanes=3, key_lanes=key_lanes)
    def charge(order: duly.Message[int], tx: duly.Transaction[Any]) -> None:
        try:
            if not (met.is_set() or alone.is_set()):
                meeting.wait(3.0)
                met.set()
        except threading.BrokenBarrierError:
            alone.set()
        tx.connection.execute(
            "insert into charges (id, key) values (%s, %s)", (order.payload, order.key)
        )

    with app:
        publish(app, range(100))
        with Worker(app):
            eventually(lambda: len(charges(pg_schema)) >= 100, "all are charged", timeout_s=60)
    assert met.is_set() is (key_lanes > 1)
    charged = charges(pg_schema)
    assert sorted(number for number, _ in charged) == [*range(100)]
    assert in_order(charged)
    assert cursors(pg_schema) == ([f"{n}/6" for n in range(6)] if key_lanes > 1 else [""])


@contextmanager
def worker(broker: str, store: str, log: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.kafka.charging", broker + SILENT, store, "3", "8"]
    with (
        log.open("a") as err,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=err, text=True, cwd=ROOT
        ) as process,
    ):
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "works\n", log.read_text()
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


@pytest.mark.slow
def test_workers_are_killed_and_every_order_is_charged_once(
    kafka_url: str, store: str, pg_schema: Schema, tmp_path: Path
):
    """Positions stand before what one lane has left, and others have gone on."""
    count, log = 1500, tmp_path / "log"
    with shop(kafka_url, store, key_lanes=8) as app:
        publish(app, range(count))
    with contextlib.ExitStack() as stack:
        here, beside = (stack.enter_context(worker(kafka_url, store, log)) for _ in range(2))
        for share in (0.1, 0.3, 0.5, 0.7, 1.0):
            eventually(
                lambda s=share: len(charges(pg_schema)) >= count * s,  # type: ignore[misc]
                f"{share:.0%} are charged", log.read_text, 90,
            )  # fmt: skip
            if share < 1:
                here.kill()
                here, beside = beside, stack.enter_context(worker(kafka_url, store, log))
    charged = charges(pg_schema)
    assert sorted(number for number, _ in charged) == [*range(count)]
    assert in_order(charged)
    assert cursors(pg_schema) == [f"{n}/8" for n in range(8)]


def test_what_fails_holds_up_its_lane_and_no_other(kafka_url: str, tmp_path: Path):
    """In order by key it is tried again in its place."""
    app = duly.App("shop", broker=kafka_url, store=f"sqlite:///{tmp_path}/effects.db")
    mended, seen = threading.Event(), list[int]()

    @app.consumer(
        ORDERS, name="billing", guarantee="exactly-once", key_lanes=4, order_by_key=True,
        retry=duly.RetryPolicy(attempts=1000, first_s=0.1, factor=1.0, jitter=0.0),
    )  # fmt: skip
    def charge(order: int, tx: duly.Transaction[sqlite3.Connection]) -> None:
        if order == 0 and not mended.is_set():
            raise ValueError("not yet")
        tx.after_commit(lambda: seen.append(order))

    with app:
        publish(app, range(80))
        with Worker(app):
            eventually(lambda: len(seen) >= 40, "others go on")
            held = {*range(80)} - {*seen}
            assert {0, KEYS, 2 * KEYS, 3 * KEYS} <= held, "what is of its key waits"
            mended.set()
            eventually(lambda: len(seen) >= 80, "all are charged")
        assert sorted(seen) == [*range(80)]
        assert "a retry holds up everything behind it in its lane of keys" in told(app)


@pytest.mark.parametrize(("began", "now"), [(4, 3), (4, 1), (1, 4)])
def test_the_number_stays_as_it_began(kafka_url: str, began: int, now: int):
    """In another lane what took effect would do so once more."""
    with broker_at(kafka_url, ORDERS) as broker:
        broker.subscribe([ORDERS], "billing", SubscribeOptions(EXACTLY, key_lanes=began)).close()
    with broker_at(kafka_url, ORDERS) as broker:
        with pytest.raises(ConfigurationError, match=rf"key_lanes={began}.*key_lanes={now}"):
            broker.subscribe([ORDERS], "billing", SubscribeOptions(EXACTLY, key_lanes=now))
        broker.subscribe([ORDERS], "billing", SubscribeOptions(EXACTLY, key_lanes=began)).close()
        broker.subscribe([ORDERS], "mail", SubscribeOptions(EXACTLY, key_lanes=now)).close()


def test_what_began_before_there_were_any_has_one(kafka_url: str):
    """Nothing is recorded of it but that it was worked."""
    with broker_at(kafka_url, ORDERS) as broker:
        records = KafkaBroker._recorded(broker)
        records.fix({"subscription/billing": "exactly-once", "effects/billing": "store"})
        with pytest.raises(ConfigurationError, match="began with key_lanes=1"):
            broker.subscribe([ORDERS], "billing", SubscribeOptions(EXACTLY, key_lanes=2))
        broker.subscribe([ORDERS], "billing", SubscribeOptions(EXACTLY)).close()


def test_the_contract_says_what_runs_side_by_side(kafka_url: str, store: str, tmp_path: Path):
    def told_with(store: str, **options: Any) -> str:
        with shop(kafka_url, store, **options) as app:
            return told(app)

    text = told_with(store, lanes=4, key_lanes=8)
    assert "up to 4 transactions of one partition side by side, each with keys of its own" in text
    assert "key_lanes=8 is fixed once the consumer has begun" in text
    assert "key_lanes=8 gains nothing yet: lanes=1" in told_with(store, key_lanes=8)
    assert "one partition run one after the other; key_lanes lets them" in told_with(store, lanes=4)
    assert "one partition" not in told_with(store)
    beside = told_with(f"sqlite:///{tmp_path}/effects.db", lanes=4, key_lanes=8)
    assert "lanes=4 take turns: SQLite has one writer" in beside
    assert "key_lanes=8 is fixed" in beside
    assert "of one partition side by side" not in beside


def test_where_kafka_itself_is_the_store_it_changes_nothing(kafka_url: str):
    """A transaction moves the one position that a partition has."""
    app = duly.App("copier", broker=kafka_url)
    copies: duly.Topic[int] = duly.Topic("copies", int, guarantee="at-least-once", partitions=1)
    seen: list[int] = []

    @app.consumer(ORDERS, name="copy", guarantee="exactly-once", lanes=2, key_lanes=4)
    def copy(order: int, tx: duly.Transaction[None]) -> None:
        tx.publish(copies, order)

    @app.consumer(copies, name="look", guarantee="at-least-once")
    def look(order: int) -> None:
        seen.append(order)

    with app:
        assert "key_lanes=4 changes nothing" in told(app)
        publish(app, range(60))
        with Worker(app):
            eventually(lambda: len(seen) >= 60, "all are copied")
    assert seen == [*range(60)]


def test_nor_does_it_cost_anything_there(kafka_url: str):
    """Its lanes are given many messages at a time, as ever."""
    with broker_at(kafka_url, ORDERS) as broker:
        broker.own_store()
        options = SubscribeOptions(EXACTLY, bodies_only=True, key_lanes=4)
        lane = broker.subscribe([ORDERS], "copy", options)
        broker.publish([ORDERS.message(number, source="s") for number in range(50)])
        claimed: list[Any] = []

        def come() -> bool:
            claimed.append(lane.claim(50, 1 << 30, 1.0))
            return bool(claimed[-1])

        eventually(come, "they come")
        assert isinstance(claimed[-1], Span)


def test_another_number_does_not_stay_the_last_that_is_recorded(kafka_url: str):
    """Who wrote it died before the first was written again; compaction keeps the last."""
    with broker_at(kafka_url, ORDERS) as broker:
        broker.subscribe([ORDERS], "billing", SubscribeOptions(EXACTLY, key_lanes=4)).close()
    topic = f"{namespace_of(kafka_url)}.duly.records"
    with stranger(kafka_url) as producer:
        producer.produce(topic, b"8", key=b"lanes/billing", partition=0)
    with broker_at(kafka_url, ORDERS) as broker:
        broker.subscribe([ORDERS], "billing", SubscribeOptions(EXACTLY, key_lanes=4)).close()
    with closing(Reader(address_of(kafka_url, "kafka://..."), topic)) as reader:
        texts = [each.value() for each in reader.read() if each.key() == b"lanes/billing"]
    assert texts == [b"4", b"8", b"4"]


@pytest.mark.parametrize("before", ["at-least-once", "transactions"])
def test_what_else_it_was_worked_as_is_told_first(kafka_url: str, before: str):
    """And nothing is recorded of the lanes of one that is refused."""
    with broker_at(kafka_url, ORDERS) as broker:
        if before == "transactions":
            broker.own_store()
        guarantee = EXACTLY if before == "transactions" else Guarantee.AT_LEAST_ONCE
        broker.subscribe([ORDERS], "billing", SubscribeOptions(guarantee)).close()
    with broker_at(kafka_url, ORDERS) as broker:
        with pytest.raises(ConfigurationError, match=f"{before}.*new name"):
            broker.subscribe([ORDERS], "billing", SubscribeOptions(EXACTLY, key_lanes=4))
        found = KafkaBroker._recorded(broker).found(["lanes/billing"])
        assert found == ({"lanes/billing": "1"} if before == "transactions" else {})


def test_without_transactions_it_is_refused(kafka_url: str):
    app = duly.App("shop", broker=kafka_url)

    @app.consumer(ORDERS, name="note", guarantee="at-least-once", key_lanes=4)
    def note(order: int) -> None: ...

    with app, pytest.raises(ContractRefused, match=r"(?s)key_lanes=4 .*leave key_lanes out"):
        told(app)
    for number, why in ((0, "give a whole number from 1 on"), (1000, "give 128 at most")):
        with pytest.raises(ConfigurationError, match=f"key_lanes={number}: {why}"):
            app.consumer(ORDERS, name="none", guarantee="exactly-once", key_lanes=number)

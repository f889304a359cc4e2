"""Workers and the node are killed over and over, and what they published is on Kafka once.

Orders are charged in a database beside it, and their receipts go by its outbox: whoever reads what
is committed, with no inbox to drop anything, sees each receipt once.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

import duly
from tests.kafka.test_relay import read
from tests.servers.kafka import KafkaNode, in_namespace
from tests.waiting import eventually

SHOP = """
import os
import threading
from typing import Any
import duly

app = duly.App("shop", broker=os.environ["SHOP_BROKER"], store=os.environ["SHOP_STORE"])
orders = duly.Topic("orders", int, guarantee="at-least-once", partitions=4)
receipts = duly.Topic("receipts", int, guarantee="exactly-once", partitions=4)
work = threading.Event()


@app.consumer(orders, name="billing", guarantee="exactly-once", batch=20)
def charge(order: int, tx: duly.Transaction[Any]) -> None:
    work.wait(0.03)
    tx.connection.execute("insert into charges (id) values (?)", (order,))
    tx.publish(receipts, order, id=str(order), key=str(order % 6))
"""
ORDERS = 1500
STRIKES_S = 60.0


@contextlib.contextmanager
def running(folder: Path, environment: dict[str, str]) -> Iterator[Path]:
    """``duly run`` with two workers; its log."""
    log = folder / "log"
    with log.open("w") as out:
        supervisor = subprocess.Popen(
            [
                *(sys.executable, "-m", "duly", "run", "shop:app"),
                *("--processes", "2", "--log-format", "human"),
            ],
            cwd=folder,
            env=environment,
            stdout=out,
            stderr=out,
        )
    try:
        yield log
    finally:
        supervisor.send_signal(signal.SIGTERM)
        status = supervisor.wait(60)
    assert status == 0, log.read_text()[-5000:]


def strike(log: Path, node: KafkaNode, chance: Random, over: Callable[[], bool]) -> Counter[str]:
    """Kill a worker every second or so, and the node now and then, until it is over."""
    struck: Counter[str] = Counter()
    nobody = threading.Event()
    until = time.monotonic() + STRIKES_S
    for number in itertools.count():
        nobody.wait(chance.uniform(0.4, 2.0))
        if over() or time.monotonic() > until:
            return struck
        if number % 6 == 3:
            node.kill()
            node.start()
            struck["node"] += 1
            continue
        pids = re.findall(r"worker.*?pid (\d+)", log.read_text())
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(chance.choice(pids[-2:])), signal.SIGKILL)
            struck["worker"] += 1
    raise AssertionError("it counts for ever")


HASTY = "&session.timeout.ms=2000&heartbeat.interval.ms=500"


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "dealing",
    [HASTY, f"{HASTY}&partition.assignment.strategy=range", "&group.protocol=consumer"],
    ids=["cooperative", "eager", "kip-848"],
)
def test_receipts_are_on_kafka_once(
    tmp_path: Path, quick_node: KafkaNode, monkeypatch: pytest.MonkeyPatch, dealing: str
):
    seed = int(os.environ.get("DULY_STORM_SEED") or random.randrange(1 << 32))
    print(f"replay: DULY_STORM_SEED={seed}")  # noqa: T201 - shown where the test fails
    url = in_namespace(f"storm{random.randrange(1 << 32)}", quick_node.url)
    environment = {
        **os.environ,
        "SHOP_BROKER": f"{url}{dealing}",
        "SHOP_STORE": f"sqlite:///{tmp_path}/effects.db",
    }

    def ids() -> list[int]:
        """The orders that were charged."""
        with contextlib.closing(sqlite3.connect(tmp_path / "effects.db", timeout=30)) as connection:
            return [row[0] for row in connection.execute("select id from charges")]

    (tmp_path / "shop.py").write_text(SHOP)
    for name in ("SHOP_BROKER", "SHOP_STORE"):
        monkeypatch.setenv(name, environment[name])
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(SHOP, scope)
    app, orders = scope["app"], scope["orders"]
    assert isinstance(app, duly.App)
    assert isinstance(orders, duly.Topic)
    numbers = list(range(ORDERS))
    with app:
        with app.transaction() as tx:
            tx.connection.execute("create table charges (id integer)")
        app.publish_many(orders, numbers, keys=[str(number % 6) for number in numbers])
    with running(tmp_path, environment) as log:
        eventually(lambda: len(ids()) > 20, "some are charged", log.read_text, 60.0)
        struck = strike(log, quick_node, Random(seed), lambda: len(ids()) >= ORDERS)
        eventually(
            lambda: len(ids()) >= ORDERS, "all are charged", lambda: log.read_text()[-3000:], 180.0
        )
        eventually(
            lambda: sum(map(len, read(url, topic="receipts"))) >= ORDERS,
            "all receipts are there",
            lambda: log.read_text()[-3000:],
            60.0,
        )
    assert sorted(ids()) == numbers
    partitions = read(url, topic="receipts")
    times = Counter(number for each in partitions for number in each)
    assert {number: n for number, n in times.items() if n != 1} == {}, struck
    assert sorted(times) == numbers
    for each in partitions:
        for key in range(6):
            of_key = [number for number in each if number % 6 == key]
            assert of_key == sorted(of_key)
    assert struck["worker"] >= 5 <= 5 * struck["node"], struck

"""Real workers and a real server, killed while they work; judged by what stands in the end."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

import duly
from duly.broker import SubscribeOptions
from duly.brokers.sqlite import SQLiteBroker
from duly.guarantees import Guarantee
from tests.servers.postgres import PostgresServer, children_of
from tests.waiting import eventually

SHOP = """
import os

import psycopg

import duly

orders = duly.Topic("orders", int, guarantee="exactly-once")
app = duly.App("shop", broker=os.environ["BROKER"], store=os.environ["STORE"])
QUICK = duly.RetryPolicy(attempts=3, first_s=0.05, longest_s=0.2)
TWO = ("insert into {}_one values (%s)", "insert into {}_two values (%s)")


def declare(name, **options):
    receipts = duly.Topic(
        f"receipts-{name}", int, guarantee="exactly-once", retention_s=86400.0
    )
    app.declare(receipts)
    one, two = (text.format(name) for text in TWO)

    def charge(order: int, tx: duly.Transaction[psycopg.Connection]) -> None:
        tx.connection.execute(one, (order,))
        tx.publish(receipts, order, id=str(order))
        tx.connection.execute(two, (order,))

    async def acharge(order: int, tx: duly.Transaction[psycopg.AsyncConnection]) -> None:
        await tx.connection.execute(one, (order,))
        tx.publish(receipts, order, id=str(order))
        await tx.connection.execute(two, (order,))

    decorate = app.consumer(orders, name=name, guarantee="exactly-once", retry=QUICK,
                            batch=10, lease_s=2.0, **options)
    decorate(acharge if name == "loops" else charge)


declare("blocks", lanes=2)
declare("loops")
declare("pipes", pipeline=True)
"""
NAMES = ("blocks", "loops", "pipes")
COUNT = 3000


@pytest.fixture
def shop(tmp_path: Path, pg_server: PostgresServer) -> Iterator[subprocess.Popen[bytes]]:
    """``duly run`` with three processes."""
    (tmp_path / "shop.py").write_text(SHOP)
    with psycopg.connect(pg_server.url) as connection:
        for name in NAMES:
            for table in ("one", "two"):
                connection.execute(f"create table {name}_{table} (n int)".encode())
    log = (tmp_path / "log").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "duly", "run", "shop:app", "--processes", "3", "--drain-s", "20"],
        cwd=tmp_path,
        env={
            **os.environ,
            "BROKER": f"sqlite:///{tmp_path}/shop.db",
            "STORE": pg_server.url,
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        stdout=log,
        stderr=log,
    )
    yield process
    if process.poll() is None:
        process.kill()
        process.wait(20)
    log.close()


def kill(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_effects_and_outputs_are_once_after_kills_of_workers_and_server(
    shop: subprocess.Popen[bytes], tmp_path: Path, pg_server: PostgresServer, seed: int
):
    dice = random.Random(seed)
    orders = duly.Topic("orders", int, guarantee="exactly-once")
    app = duly.App("shop", broker=f"sqlite:///{tmp_path}/shop.db")
    log = lambda: (tmp_path / "log").read_text(errors="replace")[-3000:]  # noqa: E731
    eventually(lambda: len(children_of(shop.pid)) == 3, "three workers", log)
    killed = 0
    for start in range(0, COUNT, 50):
        ids = range(start, start + 50)
        app.publish_many(orders, ids, ids=[str(n) for n in ids])
        if start % 300 == 100:
            # On a quick machine publishing is over before three are started again.
            eventually(lambda: bool(children_of(shop.pid)), "a worker to kill", log)
            killed += sum(map(kill, dice.sample(children_of(shop.pid), 1)))
        if start == COUNT // 2:
            pg_server.kill()
            pg_server.start()
    eventually(
        lambda: (
            _rows(pg_server, "loops_two") >= COUNT
            and _rows(pg_server, "blocks_two") >= COUNT
            and _rows(pg_server, "pipes_two") >= COUNT
            and _rows(pg_server, "duly.outbox") == 0
        ),
        "all has taken effect and every output is sent",
        lambda: f"seed {seed}\n{log()}",
        timeout_s=90,
    )
    shop.send_signal(signal.SIGTERM)
    assert shop.wait(40) == 0, log()
    app.close()
    assert killed > 5, "else it shows nothing"
    _judge(pg_server, tmp_path)


def _judge(server: PostgresServer, folder: Path) -> None:
    expected = list(range(COUNT))
    with psycopg.connect(server.url) as connection:
        for name in NAMES:
            for table in ("one", "two"):
                found = connection.execute(f"select n from {name}_{table} order by n".encode())
                assert [n for (n,) in found] == expected, f"{name}_{table}"
        [(idle,)] = connection.execute(
            "select count(*) from pg_stat_activity where state like 'idle in transaction%'"
        ).fetchall()
        assert idle == 0, "a dead worker's transaction is still open"
    broker = SQLiteBroker(folder / "shop.db")
    for name in NAMES:
        topic = duly.Topic(f"receipts-{name}", int, guarantee="exactly-once", retention_s=86400.0)
        broker.declare([topic])
        lane = broker.subscribe(
            [topic], f"reader-{name}", SubscribeOptions(Guarantee.AT_LEAST_ONCE)
        )
        sent: Counter[int] = Counter()
        while deliveries := lane.claim(500, 1 << 30, 0.0):
            sent.update(int(delivery.message.body) for delivery in deliveries)
        assert sent == Counter(expected), f"the receipts of {name}"
        lane.close()
    assert not broker.dead_letters()
    broker.close()


def _rows(server: PostgresServer, table: str) -> int:
    with psycopg.connect(server.url) as connection:
        [(count,)] = connection.execute(f"select count(*) from {table}".encode()).fetchall()
    return int(count)

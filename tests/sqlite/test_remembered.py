"""What a store remembers is settled without a sync: lost power may take it back, no death may."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import duly
from duly.broker import Receipt
from duly.brokers.sqlite import SQLiteBroker
from duly.guarantees import Dead, Done, Guarantee, Release, Retry
from duly.worker import Worker
from tests.sqlite.brokers import BIG, PLAIN, bodies, claim, done, opened, options, publish
from tests.sqlite.programs import running
from tests.waiting import eventually

EXACTLY = Guarantee.EXACTLY_ONCE


@pytest.mark.parametrize("remembered", [True, False])
def test_only_what_is_done_and_remembered_is_not_synced(db_path: Path, remembered: bool):
    broker = opened(db_path)
    publish(broker, PLAIN, range(10))
    lane = broker.subscribe([PLAIN], "s", options(guarantee=EXACTLY, remembered=remembered))

    def syncs(settle: Callable[[], Sequence[Receipt]]) -> bool:
        before = broker.file.stats.fsyncs
        assert settle() == []
        return broker.file.stats.fsyncs > before

    one, two, three, four, five, six = (each.receipt for each in claim(lane, 6))
    assert syncs(lambda: lane.settle([Done(one)])) is not remembered
    assert syncs(lambda: lane.settle([Retry(two, 60.0, "no")]))
    assert syncs(lambda: lane.settle([Dead(three, "no")]))
    assert syncs(lambda: lane.settle([Release(four)]))
    assert syncs(lambda: lane.settle([Done(five), Retry(six, 60.0, "no")]))
    ahead = lane.ahead(2, BIG)
    assert ahead is not None
    rest = claim(lane, 2)
    assert syncs(lambda: lane.settle_and_claim(done(rest), ahead)) is not remembered
    broker.close()


SETTLER = """
import sys
from duly.guarantees import Guarantee
from tests.sqlite.brokers import *
broker = opened(sys.argv[1])
lane = broker.subscribe([PLAIN], "s", options(guarantee=Guarantee.EXACTLY_ONCE, remembered=True))
lane.settle(done(lane.claim(5, 1 << 30, 20)))
print("settled")
input()
"""


def test_it_outlives_its_process(db_path: Path):
    broker = opened(db_path)
    publish(broker, PLAIN, range(6))
    with running(SETTLER, db_path) as settler:
        settler.expect("settled")
        settler.kill()
    lane = broker.subscribe([PLAIN], "s", options(guarantee=EXACTLY))
    assert bodies(claim(lane, 10)) == ["5"]
    broker.close()


def charges(folder: Path) -> list[int]:
    with sqlite3.connect(folder / "effects.db") as connection:
        return [row[0] for row in connection.execute("select id from charges order by id")]


def test_what_the_power_took_back_takes_effect_once(tmp_path: Path):
    """The broker's file is as it was before anything was settled, the store's is not."""
    orders: duly.Topic[int] = duly.Topic("orders", int, guarantee="exactly-once")

    def shop() -> duly.App:
        app = duly.App(
            "shop", broker=f"sqlite:///{tmp_path}/duly.db", store=f"sqlite:///{tmp_path}/effects.db"
        )

        @app.consumer(orders, name="billing", guarantee="exactly-once")
        def charge(order: int, tx: duly.Transaction[sqlite3.Connection]) -> None:
            tx.connection.execute("create table if not exists charges (id integer)")
            tx.connection.execute("insert into charges values (?)", (order,))

        return app

    with shop() as app:
        app.publish_many(orders, [*range(50)])
    shutil.copy(tmp_path / "duly.db", tmp_path / "before")
    with shop() as app, Worker(app) as worker:
        eventually(lambda: worker.counts()["billing"].handled == 50, "all are charged")
    for path in [tmp_path / "duly.db", *tmp_path.glob("duly.db-[sw]*")]:
        path.unlink()
    shutil.copy(tmp_path / "before", tmp_path / "duly.db")
    with shop() as app, Worker(app) as worker:
        eventually(lambda: worker.counts()["billing"].repeats == 50, "all came again")
    assert charges(tmp_path) == [*range(50)]


def test_a_worker_by_inbox_settles_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[Any] = []
    subscribe = SQLiteBroker.subscribe

    def watched(self: SQLiteBroker, topics: Any, subscription: str, options: Any) -> Any:
        seen.append((subscription, options.remembered))
        return subscribe(self, topics, subscription, options)

    monkeypatch.setattr(SQLiteBroker, "subscribe", watched)
    for store in (f"sqlite:///{tmp_path}/effects.db", None):
        app = duly.App("shop", broker=f"sqlite:///{tmp_path}/duly.db", store=store)
        orders = duly.Topic("orders", int, guarantee="exactly-once")

        @app.consumer(orders, name="billing", guarantee="exactly-once")
        def charge(order: int, tx: duly.Transaction[sqlite3.Connection]) -> None: ...

        @app.consumer(orders, name="mail", guarantee="at-least-once")
        def mail(order: duly.Message[int]) -> None: ...

        with app, Worker(app):
            pass
    assert sorted(seen) == [
        *(("billing", False), ("billing", True)),
        *(("mail", False), ("mail", False)),
    ]

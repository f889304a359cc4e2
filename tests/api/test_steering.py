"""Pausing, rewinding and removing a consumer of an app at work, and what is refused."""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

import duly
from duly.brokers.memory import MemoryLog
from duly.inspection import Inspection
from duly.inspection.steering import Steering
from duly.operating.steering import Steerer
from duly.worker import Worker
from tests.waiting import eventually

orders = duly.Topic("orders", dict, guarantee="exactly-once", retention_s=3600)
lines = duly.Topic("lines", dict, guarantee="at-least-once", retention_s=3600)


@contextmanager
def working(app: duly.App) -> Iterator[None]:
    worker = Worker(app)
    worker.start()
    try:
        yield
    finally:
        worker.drain()


def drained(app: duly.App) -> bool:
    broker, _ = app.backends()
    assert isinstance(broker, Inspection)
    return all(state.is_drained for state in broker.subscriptions())


class Shop:
    """An app whose consumer counts in the store how often each order took effect."""

    def __init__(self, folder: Path, store: str | None) -> None:
        self.path = folder / (store or "shop.db")
        self.app = duly.App(
            "shop",
            broker=f"sqlite:///{folder}/shop.db",
            store=None if store is None else f"sqlite:///{folder}/{store}",
        )
        self.inside = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()

        @self.app.consumer(orders, name="billing", guarantee="exactly-once", batch=10)
        def charge(order: dict[str, Any], tx: duly.Transaction[sqlite3.Connection]) -> None:
            tx.connection.execute("create table if not exists charges (n)")
            tx.connection.execute("insert into charges values (?)", (order["n"],))
            self.inside.set()
            self.go_on.wait(30)

        @self.app.consumer(lines, name="mail", guarantee="at-least-once")
        def mail(line: dict[str, Any]) -> None: ...

    def charges(self) -> list[int]:
        with closing(sqlite3.connect(self.path)) as connection:
            return sorted(n for (n,) in connection.execute("select n from charges"))


@pytest.fixture(params=[None, "effects.db"], ids=["by claim", "by inbox"])
def shop(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shop]:
    here = Shop(tmp_path, request.param)
    with here.app:
        yield here


def test_a_new_epoch_takes_effect_again_exactly_once(shop: Shop):
    app = shop.app
    app.publish_many(orders, [{"n": n} for n in range(25)])
    with working(app):
        eventually(lambda: drained(app), "the first life")
        app.pause("billing")
        assert app.rewind("billing", None, new_epoch="march") == 25
        assert app.rewind("billing", None, new_epoch="march") == 0
        app.resume("billing")
        eventually(lambda: len(shop.charges()) == 50 and drained(app), "the second life")
    assert shop.charges() == sorted([*range(25)] * 2)


def test_exactly_once_without_an_epoch_is_refused(shop: Shop):
    shop.app.publish(orders, {"n": 1})
    with working(shop.app):
        eventually(lambda: drained(shop.app), "it is handled")
    with pytest.raises(duly.ConfigurationError, match="--new-epoch NAME"):
        shop.app.rewind("billing", None)
    with pytest.raises(duly.ConfigurationError, match="printable"):
        shop.app.rewind("billing", None, new_epoch="\x1b[31m")
    with pytest.raises(duly.ConfigurationError, match="at-least-once: a new epoch"):
        shop.app.rewind("mail", None, new_epoch="x")
    assert shop.charges() == [1]


def test_where_effects_live_elsewhere_nobody_may_be_at_work(tmp_path: Path):
    shop = Shop(tmp_path, "effects.db")
    with shop.app as app:
        app.publish(orders, {"n": 1})
        with working(app):
            eventually(lambda: drained(app), "it is handled")
        with pytest.raises(duly.ConfigurationError, match="pause it"):
            app.rewind("billing", None, new_epoch="x")


@pytest.mark.parametrize("dies_at", ["tidy", "forget", "finish"])
def test_interrupted_and_done_again_it_is_one_new_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_at: str
):
    shop = Shop(tmp_path, "effects.db")
    app = shop.app
    with app:
        app.publish_many(orders, [{"n": n} for n in range(5)])
        with working(app):
            eventually(lambda: drained(app), "the first life")
        app.pause("billing")
        broker, store = app.backends()
        victim = store if dies_at == "forget" else broker
        with monkeypatch.context() as patch:
            patch.setattr(type(victim), dies_at, _die)
            with pytest.raises(KeyboardInterrupt):
                app.rewind("billing", None, new_epoch="april")
        with pytest.raises(duly.ConfigurationError, match="not finished"):
            app.resume("billing")
    with app:
        app.rewind("billing", None, new_epoch="april")
        app.resume("billing")
        with working(app):
            eventually(lambda: len(shop.charges()) == 10 and drained(app), "the second life")
    assert shop.charges() == sorted([*range(5)] * 2)


def _die(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_pause_and_its_end_are_in_the_workers_log(tmp_path: Path, caplog: Any):
    shop = Shop(tmp_path, None)
    with shop.app as app, caplog.at_level(logging.INFO, "duly.worker"), working(app):
        app.pause("mail")
        eventually(lambda: "consumer mail is paused" in caplog.text, "it says so")
        app.publish(lines, {})
        app.resume("mail")
        eventually(lambda: "consumer mail goes on" in caplog.text, "it says so")
        eventually(lambda: drained(app), "it goes on")


def test_a_worker_whose_subscription_is_removed_says_so_and_runs_nothing(
    tmp_path: Path, caplog: Any
):
    shop = Shop(tmp_path, None)
    with shop.app as app, caplog.at_level(logging.WARNING, "duly.worker"):
        with working(app):
            app.drop("billing")
            eventually(lambda: "was removed (duly drop)" in caplog.text, "it says so")
            app.publish(orders, {"n": 1})
            app.publish(lines, {})
            eventually(lambda: drained(app), "the others go on")
        assert not shop.inside.is_set()
        assert app.drop("billing") is False


def test_a_transaction_under_way_waits_out_the_rewind_or_is_part_of_what_was_before(
    tmp_path: Path,
):
    """On one file it holds the turn: the rewind comes after its commit, and takes it back."""
    shop = Shop(tmp_path, None)
    app = shop.app
    with app:
        shop.go_on.clear()
        app.publish(orders, {"n": 1})
        with working(app):
            assert shop.inside.wait(30)
            rewinding = threading.Thread(target=app.rewind, args=("billing", None), kwargs=EPOCH)
            rewinding.start()
            shop.go_on.set()
            rewinding.join(30)
            eventually(lambda: drained(app), "all lives")
    assert shop.charges() in ([1], [1, 1])


EPOCH = {"new_epoch": "may"}


def test_a_broker_that_cannot_says_so():
    app = duly.App("shop", broker=MemoryLog())
    with pytest.raises(duly.ConfigurationError, match="cannot pause"):
        app.pause("x")


def test_a_subscription_of_nobody_here(shop: Shop):
    broker, _ = shop.app.backends()
    assert isinstance(broker, Steering)
    steerer = Steerer.of(shop.app.backends(), shop.app.consumers)
    for call in (steerer.pause, steerer.check, lambda name: steerer.plan(name, None)):
        with pytest.raises(duly.ConfigurationError, match="no subscription"):
            call("'; drop table duly_messages; --")


def test_what_a_removal_is_said_to_come_to_is_what_comes(shop: Shop):
    app = shop.app
    app.publish_many(orders, [{"n": n} for n in range(5)])
    with working(app):
        eventually(lambda: drained(app), "it is handled")
    said = Steerer.of(app.backends(), app.consumers).check("billing")
    app.drop("billing")

    def suppressed() -> int:
        broker, _ = app.backends()
        assert isinstance(broker, Inspection)
        return broker.incident_counts().get(("billing", "repeat-suppressed"), 0)

    with working(app):
        eventually(lambda: len(shop.charges()) + suppressed() == 10, "it has seen all again")
    assert ("takes effect again" in said) == (len(shop.charges()) == 10)
    assert ("is dropped as a repeat" in said) == (suppressed() == 5)

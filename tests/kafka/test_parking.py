"""On Kafka a retry by cursor waits in the store: its partition goes on, it takes effect once."""

from __future__ import annotations

import re
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import duly
from duly.cli.status import look
from duly.contract import Run, contract_on, render
from duly.store import parked_of
from duly.worker import Worker
from tests.kafka.parking import ORDERS, shop_at
from tests.servers.postgres import Schema
from tests.waiting import eventually

ROOT = Path(__file__).parents[2]
SILENT = "&session.timeout.ms=2000&heartbeat.interval.ms=400"


@dataclass
class Place:
    """A namespace on Kafka, a store beside it, and a folder that tells handlers how to be."""

    folder: Path
    broker: str
    store: str
    schema: Schema | None

    def app(self, **options: Any) -> duly.App:
        return shop_at(self.folder, self.broker, self.store, **options)

    def say(self, name: str, *, there: bool = True) -> None:
        path = self.folder / name
        path.touch() if there else path.unlink()

    def charged(self) -> list[str]:
        with self._own() as own:
            return [row[0] for row in own.execute("select name from charges").fetchall()]

    @contextmanager
    def _own(self) -> Iterator[Any]:
        own: Any
        if self.schema is not None:
            own = self.schema.connect()
        else:
            own = sqlite3.connect(self.folder / "effects.db", timeout=30)
        with closing(own):
            yield own

    def prepare(self) -> None:
        with self._own() as own:
            own.execute("create table charges (name text)")
            own.commit()

    def ran(self) -> list[tuple[str, str]]:
        path = self.folder / "ran"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(pid, order) for pid, _, order in (line.partition(" ") for line in lines)]

    def started(self, name: str) -> int:
        return sum(order == name for _, order in self.ran())

    @contextmanager
    def worker(self) -> Iterator[subprocess.Popen[str]]:
        command = [sys.executable, "-m", "tests.kafka.parking"]
        with (
            (self.folder / "log").open("a") as log,
            subprocess.Popen(
                [*command, str(self.folder), self.broker + SILENT, self.store],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
            ) as process,
        ):
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == "works\n"
                yield process
            finally:
                process.send_signal(signal.SIGTERM)
                assert process.wait(60) in (0, -signal.SIGKILL)


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path, kafka_url: str) -> Place:
    schema: Schema | None = None
    store = f"sqlite:///{tmp_path}/effects.db"
    if request.param == "postgres":
        schema = request.getfixturevalue("pg_schema")
        assert schema is not None
        store = f"{schema.url}{'&' if '?' in schema.url else '?'}schema={schema.duly}"
    found = Place(tmp_path, kafka_url, store, schema)
    found.prepare()
    return found


def parked(app: duly.App) -> int:
    """How many wait, or are taken."""
    found = parked_of(app.backends()[1])
    assert found is not None
    return sum(each.parked + each.in_flight for each in found.waiting())


def test_the_partition_goes_on_behind_a_retry(place: Place):
    orders = [f"o-{number}" for number in range(50)]
    with place.app() as app:
        app.publish_many(ORDERS, [*orders[:25], "bad", *orders[25:]])
        with Worker(app):
            eventually(lambda: len(place.charged()) == 50, "all others are charged")
            assert place.charged() == orders, "in the order of the partition"
            eventually(lambda: place.started("bad") > 3, "it is tried again")
            [row] = look(app).consumers
            assert (row["backlog"], row["parked"]) == (0, 1)
            assert row["parked_since_ms"] is not None
            place.say("fixed")
            eventually(lambda: len(place.charged()) == 51, "it is charged")
        assert parked(app) == 0
        assert Counter(place.charged())["bad"] == 1


def test_it_is_the_stores_across_restarts(place: Place):
    """Neither a new worker nor the group's positions know of it any more."""
    with place.app() as app:
        app.publish_many(ORDERS, ["bad", "a"])
        with Worker(app):
            eventually(lambda: place.charged() == ["a"] and parked(app), "it is parked")
    place.say("fixed")
    with place.app() as app, Worker(app):
        eventually(lambda: sorted(place.charged()) == ["a", "bad"], "it is charged")
        eventually(lambda: not parked(app), "it is gone")


def test_a_killed_worker_leaves_it_to_another(place: Place):
    with place.app() as app:
        app.publish_many(ORDERS, ["bad killer", "a", "b"])
        with place.worker():
            eventually(lambda: len(place.charged()) == 2 and parked(app), "it is parked")
            place.say("deadly")
            before = place.started("bad killer")
            eventually(lambda: place.started("bad killer") > before, "it kills its worker")
        with place.worker() as second:
            # The first took it alone with nothing else, but nobody asked for one: not charged.
            eventually(lambda: place.started("bad killer") > before + 1, "and another, alone")
            assert second.wait(30) == -signal.SIGKILL
        place.say("deadly", there=False)
        place.say("fixed")
        with place.worker():
            eventually(lambda: len(place.charged()) == 3, "a third charges it")
            eventually(lambda: not parked(app), "it is gone")
    assert Counter(place.charged()) == {"bad killer": 1, "a": 1, "b": 1}


@pytest.mark.slow
def test_two_workers_compete_and_each_takes_effect_once(place: Place):
    orders = [f"bad-{number}" for number in range(120)]
    with place.app() as app:
        app.publish_many(ORDERS, orders)
        with place.worker(), place.worker():
            eventually(lambda: parked(app) == 120, "all of them wait", timeout_s=60)
            # Of the one partition: what waits is anybody's.
            eventually(lambda: len({pid for pid, _ in place.ran()}) == 2, "both try", timeout_s=60)
            place.say("fixed")
            eventually(lambda: len(place.charged()) >= 120, "all are charged", timeout_s=60)
            eventually(lambda: parked(app) == 0, "none waits")
    assert Counter(place.charged()) == dict.fromkeys(orders, 1)


def test_attempts_used_up_are_a_dead_letter_that_can_be_replayed(place: Place):
    policy = duly.RetryPolicy(attempts=3, first_s=0.1, factor=1.0, longest_s=0.1)
    with place.app(retry=policy) as app:
        app.publish_many(ORDERS, ["bad", "a"])
        with Worker(app):
            eventually(lambda: len(app.dead_letters()) == 1, "it is dead")
            [letter] = app.dead_letters("billing")
            assert (letter.message.body, letter.attempts) == (b"bad", 3)
            assert parked(app) == 0
            place.say("fixed")
            assert app.replay([letter]) == 1
            eventually(lambda: sorted(place.charged()) == ["a", "bad"], "replayed, it is charged")
        assert list(app.dead_letters()) == []


def test_the_contract_says_where_a_retry_waits(place: Place):
    def told(**options: Any) -> str:
        with place.app(**options) as app:
            broker, store = app.backends()
            found = contract_on(broker, store, app.topics, app.consumers, Run(), ())
            return re.sub(r"\s+", " ", render(found))

    name = "PostgreSQL" if place.schema else "SQLite"
    assert f"a retry waits in {name}, parked there" in told()
    held = "a retry holds up everything behind it in its partition"
    assert held not in told()
    assert held in told(order_by_key=True)

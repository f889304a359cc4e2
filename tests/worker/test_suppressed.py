"""Repeats that admission finds: settled, and in the incidents where the broker can keep them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import duly
from duly import App, Topic
from duly.brokers.memory import MemoryLog
from duly.brokers.sqlite import SQLiteBroker
from duly.dependencies import Resolver
from duly.errors import BrokerUnavailable, CommitUnknown
from duly.guarantees import Admission
from duly.stores.memory import MemoryStore
from duly.stores.sqlite import SQLiteStore
from duly.worker.lane import Lane
from duly.worker.process import subscribe_options
from duly.worker.steps import Surroundings
from tests.contract.broken.coats import Coat

orders: Topic[str] = Topic("orders", str, guarantee="at-least-once")


class Bench:
    """One exactly-once consumer whose store is elsewhere, driven by hand."""

    def __init__(
        self, broker: Any, store: Any, admission: Admission, coat: Callable[[Any], Any]
    ) -> None:
        self.broker, self.store, self.ran = broker, store, list[str]()
        app = App("bench", broker=broker, store=store)

        @app.consumer(orders, name="billing", guarantee="exactly-once")
        def charge(order: str, tx: duly.Transaction[Any]) -> None:
            self.ran.append(order)

        [self.consumer] = app.consumers
        self.call = Resolver().bind(self.consumer.handler)
        self.admission = admission
        broker.declare([orders])
        store.declare([orders])
        self.join(coat)

    def join(self, coat: Callable[[Any], Any]) -> None:
        """Another worker takes over."""
        options = subscribe_options(self.consumer)
        self.subscription = self.broker.subscribe([orders], "billing", options)
        around = Surroundings("bench", roll=lambda: 0.0, wait_s=0.0)
        self.lane = Lane(
            self.consumer,
            coat(self.subscription),
            self.call,
            around,
            store=self.store,
            admission=self.admission,
        )

    def publish(self, *ids: str) -> None:
        self.broker.publish([orders.message(i, source="bench", id=i) for i in ids])

    def drain(self) -> None:
        for _ in range(100):
            self.lane.step()
        [state] = self.broker.subscriptions()
        assert not state.backlog

    def suppressed(self) -> int:
        counts: Mapping[tuple[str, str], int] = self.broker.incident_counts()
        return counts.get(("billing", "repeat-suppressed"), 0)


def by_inbox(folder: Path, coat: Callable[[Any], Any] = lambda lane: lane) -> Bench:
    broker = SQLiteBroker(folder / "broker.db")
    return Bench(broker, SQLiteStore(folder / "store.db"), Admission.BY_INBOX, coat)


def test_an_inbox(tmp_path: Path):
    bench = by_inbox(tmp_path)
    bench.publish("a", "b")
    bench.drain()
    assert bench.suppressed() == 0
    bench.publish("a", "c", "b")
    bench.drain()
    assert bench.ran == ["a", "b", "c"]
    assert bench.suppressed() == 2
    [state] = bench.broker.subscriptions()
    assert state.is_drained
    [noted, _] = bench.broker.incidents("billing", "repeat-suppressed")
    assert (noted.topic, noted.id) == ("orders", "b")


def test_a_cursor():
    class Deaf(Coat):
        def settle(self, settlements: Any) -> Any:
            return []

    log = MemoryLog()
    bench = Bench(log, MemoryStore(), Admission.BY_CURSOR, Deaf)
    bench.publish("a", "b")
    bench.drain()
    log.crash(bench.subscription)
    bench.join(lambda lane: lane)
    bench.drain()
    assert bench.ran == ["a", "b"]
    assert bench.suppressed() == 2
    assert [(i.topic, i.id) for i in log.incidents("billing", "repeat-suppressed")] == [
        ("orders", "b"),
        ("orders", "a"),
    ]


@pytest.mark.parametrize("error", [BrokerUnavailable("no"), CommitUnknown("perhaps")])
def test_that_they_cannot_be_noted_changes_nothing(
    tmp_path: Path, error: Exception, caplog: pytest.LogCaptureFixture
):
    class Silent(Coat):
        def note_repeats(self, deliveries: Any) -> None:
            raise error

    bench = by_inbox(tmp_path, Silent)
    bench.publish("a")
    bench.drain()
    bench.publish("a", "b")
    with caplog.at_level(logging.WARNING):
        bench.drain()
    assert "1 suppressed repeats are not in the incidents" in caplog.text
    assert bench.ran == ["a", "b"]
    assert bench.lane.counts.repeats == 1
    assert bench.broker.subscriptions()[0].is_drained

"""On a log, a retry by cursor waits in the store: what is behind it goes on."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from duly import App, Topic, Transaction
from duly.brokers.memory import MemoryLog
from duly.cli.status import look
from duly.consumer import Consumer
from duly.dependencies import Resolver
from duly.errors import Superseded, TransactionFailed
from duly.guarantees import Admission, Done, RetryPolicy
from duly.inspection import Selection
from duly.metrics import _read
from duly.operating.health import examine
from duly.store import Scope, Waiting
from duly.stores.memory import MemoryStore
from duly.stores.sqlite import SQLiteStore
from duly.worker import Worker
from duly.worker.lane import Lane
from duly.worker.parking import Parking
from duly.worker.process import subscribe_options
from duly.worker.steps import Surroundings
from tests.worker.lanes import Clock

ORDERS: Topic[str] = Topic("orders", str, guarantee="at-least-once", partitions=1)
POLICY = RetryPolicy(attempts=3, first_s=10.0, factor=1.0, longest_s=10.0, jitter=0.0)
LEASE_S = 30.0
SCOPE = Scope("billing", Admission.BY_CURSOR, parks=True)


# Of a file there is one writer, so that nobody takes anything within a transaction.
IN_MEMORY = pytest.mark.parametrize("bench", ["memory"], indirect=True)


class Dies(BaseException):
    """The worker's process dies here."""


class Bench:
    """A log in memory, a store beside it, and lanes of one consumer, stepped by hand."""

    def __init__(self, store: Any, clock: Clock) -> None:
        self.clock = clock
        self.log = MemoryLog(clock=clock, wall_ms=clock.wall_ms)
        self.store = store
        self.ran: list[str] = []
        self.fails: set[str] = set()
        self.kills: set[str] = set()
        self.log.declare([ORDERS])

    def publish(self, *bodies: str) -> None:
        self.log.publish([ORDERS.message(body, source="shop", id=body) for body in bodies])

    def consumer(self, **options: Any) -> Consumer:
        app = App("shop", broker=self.log, store=self.store)

        @app.consumer(ORDERS, name="billing", guarantee="exactly-once", retry=POLICY, **options)
        def charge(order: str, tx: Transaction[Any]) -> None:
            self.ran.append(order)
            self.insert(tx.connection, order)
            if order in self.kills:
                raise Dies(order)
            if order in self.fails:
                raise ValueError(f"{order} fails")

        return app.consumers[0]

    def insert(self, connection: Any, order: str) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.execute("insert into effects values (?)", (order,))
        else:
            connection.insert("effects", order, order)

    @property
    def effects(self) -> list[str]:
        if isinstance(self.store, MemoryStore):
            return sorted(map(str, self.store.rows("effects")))
        with closing(sqlite3.connect(self.store.path)) as own:
            return sorted(row[0] for row in own.execute("select body from effects"))

    def lane(self, **options: Any) -> Lane:
        consumer = self.consumer(**options)
        wanted = subscribe_options(consumer)
        subscription = self.log.subscribe(consumer.topics, consumer.name, wanted)
        return Lane(
            consumer,
            Parking(subscription, self.store.parked, consumer, keeps=self.log),
            Resolver().bind(consumer.handler),
            Surroundings("shop", clock=self.clock, roll=lambda: 0.0, wait_s=0.0),
            store=self.store,
            admission=Admission.BY_CURSOR,
            retries_in_place=True,
        )

    def round(self, lane: Lane) -> None:
        """From one round's beginning to its end."""
        lane.step()
        while not lane.idle():
            lane.step()

    def drain(self, lane: Lane) -> None:
        """Step until a whole round claimed nothing."""
        nothing = 0
        while nothing < 3:
            before = lane.counts.claimed
            self.round(lane)
            nothing = 0 if lane.pending or lane.counts.claimed > before else nothing + 1

    def waiting(self) -> list[Waiting]:
        return list(self.store.parked.waiting())

    def dead(self) -> list[tuple[str, int]]:
        return [
            (each.message.id, each.attempts) for each in self.log.select(Selection("billing"), 9)
        ]


@pytest.fixture(params=["memory", "sqlite"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    clock = Clock()
    if request.param == "memory":
        yield Bench(MemoryStore(clock=clock, wall_ms=clock.wall_ms), clock)
        return
    store = SQLiteStore(tmp_path / "effects.db", wall_ms=clock.wall_ms, boot_ms=clock.wall_ms)
    with closing(sqlite3.connect(store.path)) as own:
        own.execute("create table effects (body text primary key)")
    with closing(store):
        yield Bench(store, clock)


def test_what_is_behind_a_retry_goes_on(bench: Bench) -> None:
    bench.publish("a", "bad", "c")
    bench.fails.add("bad")
    lane = bench.lane()
    bench.drain(lane)
    assert bench.effects == ["a", "c"]
    [waits] = bench.waiting()
    assert (waits.consumer, waits.topic, waits.parked, waits.in_flight) == (
        "billing",
        "orders",
        1,
        0,
    )
    [state] = bench.log.subscriptions()
    assert (state.backlog, state.in_flight, state.parked) == (0, 0, 0), (
        "the log is told that it is done"
    )


def test_it_comes_again_when_it_is_due_and_takes_effect_once(bench: Bench) -> None:
    bench.publish("bad", "b")
    bench.fails.add("bad")
    lane = bench.lane()
    bench.drain(lane)
    bench.ran.clear()
    bench.clock.now += 9.9
    bench.drain(lane)
    assert bench.ran == []
    bench.clock.now += 0.2
    bench.drain(lane)
    assert bench.ran == ["bad"]
    assert bench.waiting()[0].parked == 1, "its second attempt failed"
    bench.fails.clear()
    bench.clock.now += 10.1
    bench.drain(lane)
    assert (bench.waiting(), bench.effects) == ([], ["b", "bad"])
    bench.clock.now += 100.0
    bench.drain(lane)
    assert bench.ran == ["bad", "bad"]


def test_attempts_used_up_are_a_dead_letter_in_the_same_transaction(bench: Bench) -> None:
    bench.publish("bad", "b")
    bench.fails.add("bad")
    lane = bench.lane()
    for _ in range(4):
        bench.drain(lane)
        bench.clock.now += 10.1
    assert bench.dead() == [("bad", 3)]
    assert (bench.waiting(), bench.effects) == ([], ["b"])


def test_a_redelivery_of_what_is_parked_is_a_repeat(bench: Bench) -> None:
    """The log was not told: its worker died after the commit."""
    bench.publish("bad", "b")
    bench.fails.add("bad")
    lane = bench.lane()
    while not bench.waiting():
        lane.step()
    bench.log.crash(lane.subscription.inner)  # type: ignore[attr-defined]
    other = bench.lane()
    bench.drain(other)
    assert bench.waiting()[0].parked == 1
    assert other.counts.repeats == 2
    bench.fails.clear()
    bench.clock.now += 10.1
    bench.drain(other)
    assert (bench.effects, bench.waiting()) == (["b", "bad"], [])


def parked(bench: Bench, *bodies: str, lane: Lane | None = None) -> None:
    """These have failed once, and are due."""
    bench.publish(*bodies)
    bench.fails.update(bodies)
    lane = lane or bench.lane()
    bench.drain(lane)
    lane.close()
    bench.fails.clear()
    bench.ran.clear()
    bench.clock.now += 10.1


def test_workers_compete_for_what_is_parked_and_none_is_taken_twice(bench: Bench) -> None:
    parked(bench, *"abcdef")
    one, other = bench.lane(batch=2), bench.lane(batch=2)
    for _ in range(6):
        bench.round(one)
        bench.round(other)
    assert sorted(bench.ran) == [*"abcdef"]
    assert bench.effects == [*"abcdef"]
    assert one.counts.handled
    assert other.counts.handled


def test_a_dead_workers_lease_runs_out_and_another_takes_over(bench: Bench) -> None:
    parked(bench, "a", "b")
    bench.kills.add("a")
    with pytest.raises(Dies):
        bench.drain(bench.lane())
    bench.kills.clear()
    other = bench.lane()
    bench.drain(other)
    assert bench.ran == ["a"], "its lease is not over"
    assert bench.waiting()[0].in_flight == 2
    bench.clock.now += LEASE_S + 1
    bench.drain(other)
    assert bench.effects == ["a", "b"]
    assert bench.waiting() == []


def test_a_death_is_charged_only_to_what_was_alone(bench: Bench) -> None:
    """Of two that were taken together nobody knows which one it was; then each comes alone."""
    parked(bench, "a", "killer")
    bench.kills.add("killer")
    deaths = 0
    for _ in range(12):
        lane = bench.lane()
        try:
            bench.drain(lane)
        except Dies:
            deaths += 1
        else:
            lane.close()
        bench.clock.now += LEASE_S + 11
    assert bench.effects == ["a"]
    assert bench.ran.count("a") == 2, "with the killer, and alone"
    # One attempt had failed; the first death was nobody's, the second and third were its own.
    assert deaths == 3
    [(id, attempts)] = bench.dead()
    assert id == "killer"
    assert attempts == 4
    assert bench.waiting() == []


def test_one_that_was_asked_for_singly_is_charged_with_the_first_death(bench: Bench) -> None:
    parked(bench, "killer")
    bench.kills.add("killer")
    deaths = 0
    for _ in range(8):
        try:
            bench.drain(bench.lane(batch=1))
        except Dies:
            deaths += 1
        bench.clock.now += LEASE_S + 11
    assert deaths == 2
    assert [id for id, _ in bench.dead()] == ["killer"]


def test_who_lost_its_lease_commits_nothing(bench: Bench) -> None:
    parked(bench, "a")
    stale = bench.lane()
    while not stale.in_round:
        stale.step()  # it has taken it
    bench.clock.now += LEASE_S + 1
    other = bench.lane()
    bench.drain(other)
    assert bench.effects == ["a"]
    bench.drain(stale)
    assert bench.effects == ["a"]
    assert bench.ran == ["a"], "the fence stands before the handler"
    assert stale.counts.refused == 1


@IN_MEMORY
def test_a_lease_that_is_lost_within_the_transaction_undoes_it(bench: Bench) -> None:
    parked(bench, "a")
    [delivery] = bench.store.parked.take("billing", ["orders"], 9, 1 << 20, LEASE_S)
    session = bench.store.begin(SCOPE)
    session.admit([delivery])
    bench.clock.now += LEASE_S + 1
    assert len(bench.store.parked.take("billing", ["orders"], 9, 1 << 20, LEASE_S)) == 1
    session.settle([Done(delivery.receipt)], [delivery])
    with pytest.raises(Superseded):
        session.commit()
    session.rollback()
    assert bench.waiting()[0].in_flight == 1


def test_a_worker_that_ends_gives_back_what_it_took_uncharged(bench: Bench) -> None:
    parked(bench, "a", "b")
    lane = bench.lane()
    while not lane.in_round:
        lane.step()
    lane.close()
    assert bench.waiting()[0].parked == 2
    taken = bench.store.parked.take("billing", ["orders"], 9, 1 << 20, LEASE_S)
    assert [each.attempt for each in taken] == [2, 2]


def test_neither_the_log_nor_the_store_starves_the_other(bench: Bench) -> None:
    parked(bench, *"abcd")
    bench.publish(*"wxyz")
    lane = bench.lane(batch=1)
    bench.drain(lane)
    kinds = ["parked" if each in "abcd" else "log" for each in bench.ran]
    assert kinds == ["parked", "log"] * 4


def test_the_whole_message_comes_back(bench: Bench) -> None:
    message = ORDERS.message(
        "grüße", source="shop", id="one", key="k", headers={"tenant": "blue"}, time_ms=5
    )
    bench.log.publish([message])
    bench.fails.add("grüße")
    bench.drain(bench.lane())
    bench.clock.now += 10.1
    [delivery] = bench.store.parked.take("billing", ["orders"], 9, 1 << 20, LEASE_S)
    assert delivery.message == message
    assert (delivery.attempt, delivery.repeated, delivery.alone) == (2, True, False)
    assert delivery.position is not None
    assert delivery.position.offset == 0


def test_what_others_of_its_topics_wait_for_is_left_alone(bench: Bench) -> None:
    """During a rolling deployment this code does not know a topic yet, or any more."""
    parked(bench, "a")
    assert bench.store.parked.take("billing", ["news"], 9, 1 << 20, LEASE_S) == []
    assert bench.store.parked.next_s("billing", ["news"]) is None
    assert len(bench.store.parked.take("billing", ["orders"], 9, 1 << 20, LEASE_S)) == 1


@IN_MEMORY
def test_a_failed_commit_with_a_culprit_of_its_own_is_parked_too(bench: Bench) -> None:
    """A message alone whose transaction is lost: what it comes to is recorded by another."""
    bench.publish("a", "b")
    once = iter(["before", "before"])

    def lose(moment: str) -> None:
        if moment == next(once, ""):
            raise TransactionFailed("lost")

    bench.store.on_commit = lose
    lane = bench.lane()
    bench.drain(lane)
    assert [each.parked for each in bench.waiting()] == [1]
    bench.clock.now += 10.1
    bench.drain(lane)
    assert bench.effects == ["a", "b"]


def test_what_was_parked_before_order_was_asked_for_is_worked(bench: Bench) -> None:
    parked(bench, "a", "b")
    lane = bench.lane(order_by_key=True)
    bench.fails.update("ac")
    bench.publish("c")
    bench.drain(lane)
    assert bench.effects == ["b"]
    assert [each.parked for each in bench.waiting()] == [1], "what came out of the store goes back"
    [state] = bench.log.subscriptions()
    assert state.parked == 1, "what came from the log waits there"
    bench.fails.clear()
    bench.clock.now += 10.1
    bench.drain(lane)
    assert bench.effects == ["a", "b", "c"]


def test_in_order_by_key_a_retry_stays_in_its_place(tmp_path: Path) -> None:
    clock = Clock()
    store = MemoryStore(clock=clock, wall_ms=clock.wall_ms)
    app = App("shop", broker=MemoryLog(), store=store)
    keyed: Topic[str] = Topic("keyed", str, guarantee="at-least-once", partitions=2)

    @app.consumer(keyed, name="billing", guarantee="exactly-once", order_by_key=True)
    def charge(order: str, tx: Transaction[Any]) -> None:
        raise AssertionError(order)

    @app.consumer(ORDERS, name="other", guarantee="exactly-once")
    def other(order: str, tx: Transaction[Any]) -> None:
        raise AssertionError(order)

    with Worker(app) as worker:
        lanes = {e.consumer.name: e for e in worker._lanes if isinstance(e, Lane)}
        assert isinstance(lanes["other"].subscription, Parking)
        assert [lanes[name].parks for name in ("other", "billing")] == [True, False]
    text = str(worker.contract)
    assert "a retry holds up everything behind it in its partition" in text
    assert "a retry waits in in-memory store, parked there" in text


def test_status_and_metrics_have_what_waits(bench: Bench) -> None:
    bench.publish("a", "bad")
    bench.fails.add("bad")
    bench.drain(bench.lane())
    app = App("shop", broker=bench.log, store=bench.store)
    [row] = look(app).consumers
    assert (row["consumer"], row["backlog"], row["parked"], row["dead"]) == ("billing", 0, 1, 0)
    samples = {name: value for name, labels, value in _read(app) if "billing" in labels}
    assert samples["parked"] == 1
    assert samples["parked_oldest_age_seconds"] >= 0


def test_the_doctor_finds_what_nobody_takes(bench: Bench) -> None:
    parked(bench, "a")

    def found(*consumers: Consumer) -> list[str]:
        there = examine((bench.log, bench.store), [ORDERS], consumers, [])
        return [f.found for f in there if f.what == "consumer billing"]

    assert found(bench.consumer()) == found(bench.consumer(order_by_key=True)) == []
    [said] = found()
    assert "1 messages of orders wait in the store" in said

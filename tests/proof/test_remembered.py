"""What stores and brokers remember of messages that were given up on, or that may have run.

Each of these was once broken by a schedule of the simulation.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from duly.broker import Delivery, LogPosition, SubscribeOptions
from duly.brokers.memory import MemoryDatabase, MemoryLog, MemoryQueue
from duly.brokers.sqlite import SQLiteBroker
from duly.guarantees import Admission, Dead, Done, Guarantee, Release, Retry, Settlement
from duly.message import Message, Topic, now_ms
from duly.store import Admitted, Scope, Store
from duly.stores.memory import MemoryStore
from duly.stores.sqlite import SQLiteStore

INBOX = Scope("billing", Admission.BY_INBOX)
CURSOR = Scope("billing", Admission.BY_CURSOR)


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    store: Any = MemoryStore() if request.param == "memory" else SQLiteStore(tmp_path / "store.db")
    yield store
    store.close()


def delivery(receipt: str, *, body: bytes = b"1", replays: int = 0, at: int = 5) -> Delivery:
    message: Message[Any] = Message("checkout", "shop", "o-1", body, now_ms())
    position = LogPosition("log-1", at)
    return Delivery(message, receipt, replays=replays, position=position)


def admitted(store: Store, scope: Scope, each: Delivery) -> Admitted:
    session = store.begin(scope)
    found = session.admit([each])
    session.rollback()
    return found


def end(store: Store, scope: Scope, each: Delivery, settlement: Settlement) -> None:
    session = store.begin(scope)
    assert session.admit([each]).fresh, "it may run"
    session.settle([settlement], [each])
    session.commit()


@pytest.mark.parametrize("scope", [INBOX, CURSOR], ids=["inbox", "cursor"])
def test_who_lost_the_claim_to_the_one_that_gave_up_does_not_run(store: Store, scope: Scope):
    end(store, scope, delivery("second"), Dead("second", "it always fails"))
    found = admitted(store, scope, delivery("first"))
    assert (len(found.dead), found.fresh, found.repeated) == (1, [], [])


def test_replayed_it_runs_again(store: Store):
    end(store, INBOX, delivery("a"), Dead("a", "it fails"))
    end(store, INBOX, delivery("b", replays=1), Done("b"))
    assert admitted(store, INBOX, delivery("c", replays=1)).repeated


def test_a_replay_that_dies_again_stays_dead(store: Store):
    end(store, INBOX, delivery("a"), Dead("a", "it fails"))
    end(store, INBOX, delivery("b", replays=1), Dead("b", "it fails again"))
    assert admitted(store, INBOX, delivery("zombie", replays=1)).dead
    assert admitted(store, INBOX, delivery("c", replays=2)).fresh


def test_a_replay_that_is_retried_leaves_the_first_death_known(store: Store):
    end(store, INBOX, delivery("a"), Dead("a", "it fails"))
    end(store, INBOX, delivery("b", replays=1), Retry("b", 1.0, "not yet"))
    assert admitted(store, INBOX, delivery("zombie")).dead
    assert admitted(store, INBOX, delivery("c", replays=1)).fresh


def test_another_body_under_its_id_is_a_conflict_all_the_same(store: Store):
    end(store, INBOX, delivery("a"), Dead("a", "it fails"))
    assert admitted(store, INBOX, delivery("b", body=b"2")).conflicting


def test_below_the_cursor_a_replay_has_no_effect(store: Store):
    end(store, CURSOR, delivery("a"), Dead("a", "it fails"))
    assert admitted(store, CURSOR, delivery("b", replays=1)).repeated


@pytest.mark.parametrize("kind", ["database", "log", "queue", "sqlite"])
@pytest.mark.parametrize("started", [True, False])
def test_what_is_given_back_and_may_have_run_comes_marked(kind: str, started: bool, tmp_path: Path):
    brokers: dict[str, Any] = {
        "database": MemoryDatabase,
        "log": MemoryLog,
        "queue": MemoryQueue,
        "sqlite": lambda: SQLiteBroker(tmp_path / "broker.db"),
    }
    broker = brokers[kind]()
    topic = Topic("t", int, guarantee="at-least-once")
    broker.declare([topic])
    lane = broker.subscribe([topic], "c", SubscribeOptions(Guarantee.AT_LEAST_ONCE))
    broker.publish([topic.message(1, source="s")])
    [first] = lane.claim(1, 1000, 0.0)
    lane.settle([Release(first.receipt, started=started)])
    [again] = lane.claim(1, 1000, 0.0)
    assert (again.repeated, again.attempt) == (started, 1)
    broker.close()


@pytest.mark.parametrize("make", [MemoryDatabase, MemoryLog, MemoryQueue])
def test_replays_are_counted(make: Any):
    broker = make()
    topic = Topic("t", int, guarantee="at-least-once")
    broker.declare([topic])
    lane = broker.subscribe([topic], "c", SubscribeOptions(Guarantee.AT_LEAST_ONCE))
    broker.publish([topic.message(1, source="s")])
    for replays in range(3):
        [given] = lane.claim(1, 1000, 0.0)
        assert given.replays == replays
        lane.settle([Dead(given.receipt, "it fails")])
        [letter] = broker.dead_letters()
        broker.replay([letter])

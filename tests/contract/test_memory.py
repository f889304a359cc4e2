"""What the memory kinds have beyond what every broker keeps: rebalancing, faults, tables."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from duly.brokers.memory import MemoryDatabase, MemoryLog, MemoryQueue
from duly.errors import (
    CommitUnknown,
    ConfigurationError,
    Superseded,
    TransactionFailed,
    TransactionLost,
)
from duly.guarantees import Admission, Dead, Done, Guarantee, Release
from duly.store import Scope
from duly.stores.memory import DuplicateKey, MemoryStore
from duly.testing.conformance.backend import Backend, backend_on, bodies, claim, drain, settle_done
from duly.testing.conformance.memory import DATABASE, LOG, QUEUE
from duly.testing.conformance.page import expected_on
from duly.testing.conformance.subject import BrokerSubject, Clock, Site
from tests.contract.subjects import DOCS

MEMORY = [DATABASE, LOG, QUEUE]


@contextmanager
def memory(subject: BrokerSubject) -> Iterator[Backend]:
    # Nothing of theirs is in the folder.
    site = Site(Path(), "memory", Clock())
    with backend_on(subject, site, expected_on(DOCS / "memory.md", subject.name)) as backend:
        yield backend


@pytest.fixture(params=MEMORY, ids=lambda subject: subject.name)
def backend(request: Any) -> Iterator[Backend]:
    with memory(request.param) as opened:
        yield opened


# --- deaths


def crash(backend: Backend, lane: Any) -> None:
    assert isinstance(backend.broker, MemoryDatabase | MemoryLog | MemoryQueue)
    backend.broker.crash(lane)


def test_crashing_anothers_lane_is_a_mistake(backend: Backend):
    with memory(QUEUE if backend.subject is LOG else LOG) as other:
        lane = other.lane(other.topic())
        with pytest.raises(TypeError):
            crash(backend, lane)


# --- dead letters


def test_a_dead_letter_is_replayed_as_new(backend: Backend):
    topic = backend.topic()
    backend.publish(topic, "a", "b")
    lane = backend.lane(topic)
    a, b = claim(lane)
    lane.settle([Dead(a.receipt, "no"), Done(b.receipt)])
    broker: Any = backend.broker
    [letter] = broker.dead_letters("sub")
    assert broker.replay([letter]) == []
    assert list(broker.dead_letters("sub")) == []
    [again] = claim(lane)
    assert (bodies([again]), again.attempt) == (["a"], 1)
    settle_done(lane, [again])
    assert drain(lane) == []
    assert broker.replay([letter]) == [letter]


@pytest.mark.parametrize("how", ["replay", "discard"])
def test_a_held_key_goes_on_when_its_dead_letter_is_resolved(backend: Backend, how: str):
    topic = backend.topic(partitions=1)
    if not backend.can.orders_by_key:
        return
    lane = backend.lane(topic, order_by_key=True, hold_key_on_dead=True)
    backend.publish(topic, "1", "2", key="k")
    first, second = claim(lane)
    lane.settle([Dead(first.receipt, "no"), Release(second.receipt)])
    assert drain(lane) == []
    broker: Any = backend.broker
    [letter] = broker.dead_letters("sub")
    assert getattr(broker, how)([letter]) == []
    assert drain(lane) == (["1", "2"] if how == "replay" else ["2"])


# --- the queue


def test_a_lost_settlement_comes_again():
    with memory(QUEUE) as backend:
        broker = backend.broker
        assert isinstance(broker, MemoryQueue)
        topic = backend.topic()
        backend.publish(topic, "a", "b")
        lane = backend.lane(topic)
        held = claim(lane)
        broker.loses = lambda settlement: settlement.receipt == held[0].receipt
        settle_done(lane, held)
        broker.loses = None
        assert list(claim(lane)) == []
        backend.fall_silent()
        [again] = claim(lane)
        assert bodies([again]) == ["a"]
        assert again.repeated


# --- the log


@pytest.fixture
def log():
    with memory(LOG) as backend:
        yield backend


def test_a_joining_lane_takes_its_share(log: Backend):
    topic = log.topic(partitions=4)
    for number in range(40):
        log.publish(topic, str(number), key=str(number))
    one = log.lane(topic)
    before = {d.position.log: d for d in claim(one) if d.position}
    two = log.lane(topic)
    lost = set(one.extend([d.receipt for d in before.values()], 30.0))
    assert 0 < len(lost) < len(before), "some partitions moved, the others did not"
    moved = {d.position.log for d in claim(two) if d.position}
    assert moved == {name for name, d in before.items() if d.receipt in lost}
    for delivery in before.values():
        refused = list(one.settle([Done(delivery.receipt)]))
        assert bool(refused) == (delivery.receipt in lost)


def test_each_change_makes_a_generation(log: Backend):
    broker = log.broker
    assert isinstance(broker, MemoryLog)
    topic = log.topic(partitions=4)
    one = log.lane(topic)
    group = broker.groups["sub"]
    seen = [group.generation]
    two = log.lane(topic)
    seen.append(group.generation)
    two.close()
    seen.append(group.generation)
    broker.crash(one)
    seen.append(group.generation)
    assert seen == sorted(set(seen))


def test_only_a_prefix_is_committed(log: Backend):
    topic = log.topic()
    log.publish(topic, *"abcd")
    lane = log.lane(topic)
    claimed = claim(lane)
    settle_done(lane, [claimed[1], claimed[3]])
    lane.close()
    lane = log.lane(topic)
    again = claim(lane)
    assert bodies(again) == ["a", "b", "c", "d"], "nothing before them was done"
    settle_done(lane, [again[0], again[2]])
    lane.close()
    assert bodies(claim(log.lane(topic))) == ["b", "c", "d"]


def test_a_partition_waits_behind_a_suspect(log: Backend):
    topic = log.topic()
    log.publish(topic, "a", "b")
    lane = log.lane(topic)
    claim(lane)
    log.fall_silent()
    [suspect] = claim(lane)
    assert suspect.alone
    assert list(claim(lane)) == []
    settle_done(lane, [suspect])
    assert bodies(claim(lane)) == ["b"]


def test_a_lane_that_let_a_lease_end_comes_back(log: Backend):
    topic = log.topic(partitions=4)
    one, two = log.lane(topic), log.lane(topic)
    for number in range(40):
        log.publish(topic, str(number), key=str(number))
    claim(one)
    log.fall_silent()
    got = len(claim(two))
    assert got
    assert claim(one), "it joined again and has partitions"


# --- the store's faults


@pytest.fixture
def database():
    with memory(DATABASE) as backend:
        assert isinstance(backend.broker, MemoryDatabase)
        yield backend, MemoryStore(backend.broker, begin_s=0.01)


def held_transaction(backend: Backend, store: MemoryStore) -> Any:
    """An admitted message and an effect, all but committed."""
    topic = backend.topic()
    backend.publish(topic, "a")
    lane = backend.lane(topic, guarantee=Guarantee.EXACTLY_ONCE)
    deliveries = claim(lane)
    session = store.begin(Scope("sub", Admission.BY_CLAIM))
    session.admit(deliveries)
    session.connection.insert("effects", "a", 1)
    session.settle([Done(deliveries[0].receipt)], deliveries)
    return lane, session


def test_a_claim_taken_over_between_settle_and_commit(database: Any):
    backend, store = database
    lane, session = held_transaction(backend, store)
    backend.broker.crash(lane)
    with pytest.raises(Superseded):
        session.commit()
    session.rollback()
    assert store.rows("effects") == {}
    assert drain(backend.lane(*backend.topics, guarantee=Guarantee.EXACTLY_ONCE)) == ["a"]


def test_a_claim_taken_over_between_admission_and_settle(database: Any):
    backend, store = database
    topic = backend.topic()
    backend.publish(topic, "a")
    lane = backend.lane(topic, guarantee=Guarantee.EXACTLY_ONCE)
    deliveries = claim(lane)
    session = store.begin(Scope("sub", Admission.BY_CLAIM))
    session.admit(deliveries)
    backend.broker.crash(lane)
    with pytest.raises(Superseded):
        session.settle([Done(deliveries[0].receipt)], deliveries)
    session.rollback()


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_commit_whose_answer_is_lost(database: Any, moment: str):
    backend, store = database
    lane, session = held_transaction(backend, store)

    def fail(now: str) -> None:
        if now == moment:
            raise ConnectionError("cut")

    store.on_commit = fail
    with pytest.raises(CommitUnknown):
        session.commit()
    session.rollback()
    store.on_commit = None
    applied = moment == "after"
    assert store.rows("effects") == ({"a": 1} if applied else {})
    backend.fall_silent()
    assert len(claim(lane)) == (0 if applied else 1)
    store.begin(None).rollback()


def test_a_crash_of_the_worker_frees_the_store(database: Any):
    backend, store = database
    _, session = held_transaction(backend, store)
    store.crash()
    with pytest.raises(TransactionLost):
        session.commit()
    assert store.rows("effects") == {}
    store.begin(None).rollback()


def test_a_transaction_that_was_lost_inside_does_not_commit(database: Any):
    backend, store = database
    _, session = held_transaction(backend, store)
    session.connection.rollback()
    for call in (session.savepoint, session.release_savepoint, session.commit):
        with pytest.raises(TransactionLost):
            call()
    with pytest.raises(TransactionLost):
        session.connection.insert("effects", "b", 1)
    session.rollback()
    assert store.rows("effects") == {}


def test_an_identity_taken_meanwhile_fails_the_commit(database: Any):
    backend, store = database
    out = backend.topic("out", guarantee="exactly-once")
    session = store.begin(None)
    session.publish([backend.message(out, "mine", id="one")])
    backend.publish(out, "theirs", id="one")
    session.connection.insert("effects", "a", 1)
    with pytest.raises(TransactionFailed, match="one"):
        session.commit()
    session.rollback()
    assert store.rows("effects") == {}


def test_admission_by_claim_needs_the_same_database():
    with pytest.raises(ConfigurationError, match="MemoryStore"):
        MemoryStore().begin(Scope("sub", Admission.BY_CLAIM))


# --- tables


@pytest.fixture
def tables():
    store = MemoryStore()
    session = store.begin(None)
    session.connection.insert("t", "there", [1])
    session.commit()
    session = store.begin(None)
    yield session.connection
    session.rollback()


def test_keys_are_unique(tables: Any):
    with pytest.raises(DuplicateKey):
        tables.insert("t", "there", 2)
    tables.insert("t", "new", 2)
    with pytest.raises(DuplicateKey):
        tables.insert("t", "new", 3)
    tables.delete("t", "there")
    tables.insert("t", "there", 4)
    assert tables.rows("t") == {"there": 4, "new": 2}


def test_reads_see_own_writes(tables: Any):
    tables.update("t", "there", [2])
    assert tables.get("t", "there") == [2]
    assert tables.get("t", "gone") is None
    for call in (tables.delete, lambda t, k: tables.update(t, k, 1)):
        with pytest.raises(KeyError):
            call("t", "gone")


def test_values_are_copied(tables: Any):
    tables.get("t", "there").append(2)
    mine = [3]
    tables.insert("t", "mine", mine)
    mine.append(4)
    assert tables.rows("t") == {"there": [1], "mine": [3]}

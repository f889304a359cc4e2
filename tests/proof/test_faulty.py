"""The faulty broker and store: what they do to a call, and that a seed says all of it."""

from __future__ import annotations

from typing import Any

import pytest

from duly import errors
from duly.broker import SubscribeOptions
from duly.brokers.memory import MemoryDatabase, MemoryQueue
from duly.guarantees import Done, Guarantee
from duly.message import Topic
from duly.stores.memory import MemoryStore
from duly.testing.faulty import Faults, FaultyBroker, FaultyStore

topic: Topic[int] = Topic("t", int, guarantee="at-least-once")


def broker(inner: Any, **faults: Any) -> tuple[FaultyBroker, Faults]:
    made = Faults(rate=0.0, **faults)
    outer = FaultyBroker(inner, made)
    outer.declare([topic])
    return outer, made


def publish(to: Any, *numbers: int) -> list[str]:
    messages = [topic.message(number, source="app") for number in numbers]
    return [type(outcome).__name__ for outcome in to.publish(messages)]


def lane(of: FaultyBroker) -> Any:
    return of.subscribe([topic], "c", SubscribeOptions(Guarantee.AT_LEAST_ONCE))


def claimed(subscription: Any) -> list[int]:
    return [int(each.message.body) for each in subscription.claim(10, 1 << 20, 0.0)]


@pytest.mark.parametrize(
    ("kind", "outcome", "stored"),
    [
        ("unavailable", "PublishFailed", []),
        ("cut before", "PublishUnknown", []),
        ("cut after", "PublishUnknown", [1]),
        ("duplicate", "Published", [1, 1]),
    ],
)
def test_publishing(kind: Any, outcome: str, stored: list[int]) -> None:
    outer, faults = broker(MemoryQueue(), at={1: kind})
    assert publish(outer, 1) == [outcome]
    assert claimed(lane(outer)) == stored
    assert faults.hits == [(1, "publish", kind)]


def test_what_is_reordered_keeps_its_outcome() -> None:
    outer, _ = broker(MemoryQueue(), at={1: "reorder"}, seed=3)
    assert publish(outer, *range(9)) == ["Published"] * 9
    found = claimed(lane(outer))
    assert found != sorted(found)
    assert sorted(found) == list(range(9))


@pytest.mark.parametrize(
    ("kind", "raised", "gone"),
    [
        ("unavailable", errors.BrokerUnavailable, False),
        ("cut before", errors.CommitUnknown, False),
        ("cut after", errors.CommitUnknown, True),
        ("lose", None, False),
    ],
)
def test_settling(kind: Any, raised: Any, gone: bool) -> None:
    inner = MemoryQueue()
    outer, _ = broker(inner, at={3: kind})
    publish(outer, 1)
    subscription = lane(outer)
    receipts = [each.receipt for each in subscription.claim(10, 1 << 20, 0.0)]
    if raised is None:
        assert subscription.settle([Done(receipts[0])]) == []
    else:
        with pytest.raises(raised):
            subscription.settle([Done(receipts[0])])
    inner.crash(subscription.inner)
    assert claimed(lane(outer)) == ([] if gone else [1])


def test_a_lease_ends_at_once() -> None:
    outer, _ = broker(MemoryDatabase(), at={2: "expire"})
    publish(outer, 1)
    first, second = lane(outer), lane(outer)
    receipts = [each.receipt for each in first.claim(10, 1 << 20, 0.0)]
    assert claimed(second) == [1]
    assert first.settle([Done(receipts[0])]) == receipts


@pytest.mark.parametrize(
    ("kind", "raised", "there"),
    [
        ("unavailable", errors.TransactionFailed, False),
        ("cut before", errors.CommitUnknown, False),
        ("cut after", errors.CommitUnknown, True),
    ],
)
def test_committing(kind: Any, raised: Any, there: bool) -> None:
    inner = MemoryStore()
    store = FaultyStore(inner, Faults(rate=0.0, at={2: kind}))
    session = store.begin(None)
    session.connection.insert("effects", 1, 1)
    with pytest.raises(raised):
        session.commit()
    session.rollback()
    assert inner.rows("effects") == ({1: 1} if there else {})


def test_the_nth_call_raises_what_it_is_told() -> None:
    outer, _ = broker(MemoryDatabase(), at={2: OSError("the disk is full")})
    assert publish(outer, 1) == ["Published"]
    with pytest.raises(OSError, match="full"):
        publish(outer, 2)


def test_it_pauses_where_somebody_lets_it() -> None:
    paused: list[int] = []
    faults = Faults(rate=0.0, at={1: "pause"}, pause=lambda: paused.append(1))
    outer = FaultyBroker(MemoryDatabase(), faults)
    outer.declare([topic])
    assert publish(outer, 1) == ["Published"]
    assert paused == [1]


def test_a_seed_says_all_of_it() -> None:
    def hits(seed: int) -> Any:
        outer = FaultyBroker(MemoryQueue(), faults := Faults(seed, rate=0.3))
        outer.declare([topic])
        for number in range(60):
            publish(outer, number)
        return faults.hits

    assert hits(1) == hits(1)
    assert hits(1) != hits(2)
    assert {kind for _, _, kind in hits(1)} >= {"cut before", "cut after", "unavailable"}


def test_a_broker_is_not_shown_doing_what_it_promises_never_to() -> None:
    outer = FaultyBroker(MemoryDatabase(), faults := Faults(1, rate=1.0))
    outer.declare([topic])
    for number in range(60):
        publish(outer, number)
    assert not {kind for _, _, kind in faults.hits} & {"lose", "duplicate", "reorder"}


def test_a_call_that_does_not_exist_is_refused() -> None:
    with pytest.raises(errors.ConfigurationError, match="'setle' is no call; there are publish"):
        Faults(at={("setle", 1): "unavailable"})  # type: ignore[dict-item]

"""What a durable broker has taken is there after a restart; one that is not says so."""

from __future__ import annotations

from typing import Any

import pytest

from duly.broker import RepeatDropped
from duly.errors import BrokerError, ConfigurationError, PublishError
from duly.guarantees import Dead, Done, Guarantee, Retry
from tests.contract.backends import BROKERS, Backend, bodies, claim, drain

DURABLE = [name for name in BROKERS if not name.startswith("memory")]
durable = pytest.mark.parametrize("backend", DURABLE, indirect=True)


def test_durability_is_told(backend: Backend, request: Any):
    assert backend.can.durable == (request.node.callspec.params["backend"] in DURABLE)
    topic = backend.topic()
    backend.publish(topic, "a")
    backend.restart()
    assert drain(backend.lane(topic)) == (["a"] if backend.can.durable else [])


def test_a_closed_broker_takes_and_gives_nothing(backend: Backend):
    topic = backend.topic()
    lane = backend.lane(topic)
    backend.broker.close()
    try:
        [outcome] = backend.broker.publish([backend.message(topic, "a")])
        assert isinstance(outcome, PublishError)
    except (BrokerError, ConfigurationError):
        pass
    assert list(lane.claim(1, 1, 0.0)) == []
    backend.broker.close()
    backend.restart()


@durable
def test_messages_identities_and_progress_survive(backend: Backend):
    topic = backend.topic(guarantee="exactly-once")
    lane = backend.lane(topic)
    sent = backend.publish(topic, *"abcdef")
    settle, retry, dead, held, *_ = claim(lane, limit=4)
    lane.settle([Done(settle.receipt), Retry(retry.receipt, 5.0, "no"), Dead(dead.receipt, "no")])
    backend.restart()
    repeat = backend.message(topic, "a", id=sent[0].id)
    assert backend.broker.publish([repeat]) == [RepeatDropped(sent[0].id)]
    lane = backend.lane(topic)
    assert sorted(drain(lane)) == ["d", "e", "f"]
    backend.clock.advance(6)
    [again] = claim(lane)
    assert (bodies([again]), again.attempt) == (["b"], 2)
    [letter] = backend.broker.dead_letters("sub")  # type: ignore[attr-defined]
    assert letter.message.body == b"c"
    assert list(lane.settle([Done(held.receipt)])) == [held.receipt], "a stale receipt"


@durable
def test_the_recorded_guarantee_survives(backend: Backend):
    topic = backend.topic()
    backend.lane(topic, guarantee=Guarantee.AT_MOST_ONCE)
    backend.restart()
    with pytest.raises(ConfigurationError, match="at-most-once"):
        backend.lane(topic, guarantee=Guarantee.AT_LEAST_ONCE)


@durable
def test_the_topics_fixed_properties_survive(backend: Backend):
    topic = backend.topic(partitions=4)
    for number in range(20):
        backend.publish(topic, str(number), key="k")
    backend.restart()
    assert drain(backend.lane(topic, order_by_key=True), limit=3) == [str(n) for n in range(20)]


@durable
def test_receipts_of_before_stay_stale(backend: Backend):
    """Tokens only grow: a new one is never an old one."""
    topic = backend.topic()
    lane = backend.lane(topic)
    backend.publish(topic, "a")
    [before] = claim(lane)
    backend.restart()
    lane = backend.lane(topic)
    backend.fall_silent()
    [after] = claim(lane)
    assert after.receipt != before.receipt
    assert list(lane.settle([Done(before.receipt)])) == [before.receipt]
    assert list(lane.settle([Done(after.receipt)])) == []

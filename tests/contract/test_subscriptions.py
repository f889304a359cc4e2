"""Subscriptions: where they begin, what is recorded with them, and how a claim waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest

from duly.broker import Delivery
from duly.errors import ConfigurationError
from duly.guarantees import Guarantee, Release, Retry
from duly.message import Topic
from tests.contract.backends import A_LOT, Backend, bodies, claim, drain


def test_subscribing_needs_a_declared_topic(backend: Backend):
    with pytest.raises(ConfigurationError, match="declare"):
        backend.lane(Topic("nowhere", str, guarantee="at-least-once"))


def test_order_by_key_is_kept_or_refused(backend: Backend):
    topic = backend.topic(partitions=4)
    if backend.can.orders_by_key:
        backend.lane(topic, order_by_key=True)
        return
    with pytest.raises(ConfigurationError, match="order"):
        backend.lane(topic, order_by_key=True)


@pytest.mark.parametrize("other", [Guarantee.AT_MOST_ONCE, Guarantee.EXACTLY_ONCE])
def test_another_guarantee_is_refused(backend: Backend, other: Guarantee):
    topic = backend.topic()
    lane = backend.lane(topic, guarantee=Guarantee.AT_LEAST_ONCE)
    with pytest.raises(ConfigurationError, match="at-least-once") as refusal:
        backend.lane(topic, guarantee=other)
    assert str(other) in str(refusal.value)
    lane.close()
    with pytest.raises(ConfigurationError):
        backend.lane(topic, guarantee=other)
    backend.lane(topic, guarantee=Guarantee.AT_LEAST_ONCE)


def test_a_new_subscription_begins_with_the_oldest(backend: Backend):
    topic = backend.topic()
    backend.publish(topic, "a", "b")
    assert drain(backend.lane(topic)) == ["a", "b"]


def test_or_after_the_newest(backend: Backend):
    topic = backend.topic()
    backend.publish(topic, "a", "b")
    lane = backend.lane(topic, start="latest")
    backend.publish(topic, "c")
    assert drain(lane) == ["c"]


def test_or_at_a_time(backend: Backend):
    topic = backend.topic()
    backend.publish(topic, "a", "b")
    backend.clock.advance(10)
    now = datetime.fromtimestamp(backend.clock.wall_ms() / 1000, UTC)
    backend.clock.advance(10)
    backend.publish(topic, "c", "d")
    assert drain(backend.lane(topic, start=now)) == ["c", "d"]


def test_the_start_matters_once(backend: Backend):
    topic = backend.topic()
    lane = backend.lane(topic, start="latest")
    backend.publish(topic, "a")
    lane.close()
    assert drain(backend.lane(topic, start="latest")) == ["a"]


def test_a_topic_that_joins_later_is_read_too(backend: Backend):
    one, two = backend.topic("one"), backend.topic("two")
    backend.lane(one).close()
    backend.publish(one, "from one")
    backend.publish(two, "from two")
    assert sorted(drain(backend.lane(one, two))) == ["from one", "from two"]


def test_messages_are_kept_for_those_who_are_not_done(backend: Backend):
    topic = backend.topic(retention_s=0.0)
    slow, fast = backend.lane(topic, name="slow"), backend.lane(topic, name="fast")
    backend.publish(topic, *"abc")
    assert drain(fast) == ["a", "b", "c"]
    backend.clock.advance(86400)
    backend.publish(topic, "d")
    assert drain(slow) == ["a", "b", "c", "d"]


def test_messages_are_kept_for_their_retention(backend: Backend):
    topic = backend.topic(retention_s=3600.0)
    backend.publish(topic, "a")
    assert drain(backend.lane(topic)) == ["a"]
    backend.clock.advance(1800)
    assert drain(backend.lane(topic, name="late")) == ["a"]


# --- waiting, in real time


def waiting_claim(backend: Backend, topic: Topic[str], wait_s: float = 30.0):
    """A lane, and its claim that waits on another thread."""
    lane = backend.lane(topic)
    pool = ThreadPoolExecutor(1)
    started = threading.Event()

    def run() -> Sequence[Delivery]:
        started.set()
        return lane.claim(10, A_LOT, wait_s)

    future = pool.submit(run)
    assert started.wait(10)
    pool.shutdown(wait=False)
    return lane, future


def test_a_claim_waits_no_longer_than_asked(backend: Backend):
    backend.in_real_time()
    topic = backend.topic()
    before = time.monotonic()
    assert list(backend.lane(topic).claim(1, A_LOT, 0.1)) == []
    assert 0.09 < time.monotonic() - before < 10


def test_publishing_wakes_a_waiting_claim(backend: Backend):
    backend.in_real_time()
    topic = backend.topic()
    _, future = waiting_claim(backend, topic)
    backend.publish(topic, "a")
    assert bodies(future.result(10)) == ["a"]


def test_closing_ends_a_waiting_claim(backend: Backend):
    backend.in_real_time()
    lane, future = waiting_claim(backend, backend.topic())
    lane.close()
    assert list(future.result(10)) == []


def test_a_release_wakes_a_waiting_claim(backend: Backend):
    backend.in_real_time()
    topic = backend.topic()
    backend.publish(topic, "a")
    lane = backend.lane(topic)
    [held] = claim(lane)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(lane.claim, 10, A_LOT, 30.0)
        # From another thread, while the claim waits.
        assert list(lane.settle([Release(held.receipt)])) == []
        assert bodies(future.result(10)) == ["a"]


def test_a_retry_that_comes_due_wakes_a_waiting_claim(backend: Backend):
    backend.in_real_time()
    topic = backend.topic()
    backend.publish(topic, "a")
    lane = backend.lane(topic)
    [held] = claim(lane)
    lane.settle([Retry(held.receipt, 0.05, "soon")])
    [again] = lane.claim(1, A_LOT, 30.0)
    assert again.attempt == 2


def test_a_lease_that_ends_wakes_a_waiting_claim(backend: Backend):
    backend.in_real_time()
    topic = backend.topic()
    backend.publish(topic, "a")
    lane = backend.lane(topic, lease_s=0.3)
    claim(lane)
    [again] = lane.claim(1, A_LOT, 30.0)
    assert again.repeated

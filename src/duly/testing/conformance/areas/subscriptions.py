"""Subscriptions: where they begin, what is recorded with them, and how a claim waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime

import pytest

from duly.broker import Delivery, SubscribeOptions, Subscription
from duly.errors import ConfigurationError, PublishFailed
from duly.guarantees import Guarantee, Release, Retry
from duly.message import Topic
from duly.testing.conformance.backend import A_LOT, Backend, bodies, claim, drain, settle_done


def waiting_claim(
    backend: Backend, topic: Topic[str], wait_s: float = 30.0
) -> tuple[Subscription, Future[Sequence[Delivery]]]:
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


class Subscriptions:
    """What is recorded with a subscription, and where it begins."""

    def test_subscribing_needs_a_declared_topic(self, backend: Backend) -> None:
        with pytest.raises(ConfigurationError, match="declare"):
            backend.lane(Topic("nowhere", str, guarantee="at-least-once"))

    @pytest.mark.parametrize("other", [Guarantee.AT_MOST_ONCE, Guarantee.EXACTLY_ONCE])
    def test_another_guarantee_is_refused(self, backend: Backend, other: Guarantee) -> None:
        topic = backend.topic()
        lane = backend.lane(topic, guarantee=Guarantee.AT_LEAST_ONCE)
        with pytest.raises(ConfigurationError, match="at-least-once") as refusal:
            backend.lane(topic, guarantee=other)
        assert str(other) in str(refusal.value)
        lane.close()
        with pytest.raises(ConfigurationError):
            backend.lane(topic, guarantee=other)
        backend.lane(topic, guarantee=Guarantee.AT_LEAST_ONCE)

    def test_the_start_matters_once(self, backend: Backend) -> None:
        topic = backend.topic()
        lane = backend.lane(topic, start="latest")
        backend.publish(topic, "a")
        lane.close()
        assert drain(backend.lane(topic, start="latest")) == ["a"]

    def test_a_lane_is_given_only_messages_of_its_topics(self, backend: Backend) -> None:
        """Two versions of an application may work one subscription with different topics."""
        one, two = backend.topic("one"), backend.topic("two")
        old, new = backend.lane(one), backend.lane(one, two)
        for number in range(10):
            backend.publish(one, f"one {number}")
            backend.publish(two, f"two {number}")
        lanes = {"old": old, "new": new}
        got: dict[str, list[str]] = {"old": [], "new": []}
        for _ in range(20):
            for name, lane in lanes.items():
                deliveries = claim(lane, limit=2)
                got[name] += bodies(deliveries)
                settle_done(lane, deliveries)
        assert {body.split()[0] for body in got["old"]} <= {"one"}
        assert len(got["old"]) + len(got["new"]) == 20

    def test_a_topic_that_joins_later_is_read_too(self, backend: Backend) -> None:
        one, two = backend.topic("one"), backend.topic("two")
        backend.lane(one).close()
        backend.publish(one, "from one")
        backend.publish(two, "from two")
        assert sorted(drain(backend.lane(one, two))) == ["from one", "from two"]


class Retention:
    """How long messages are kept."""

    def test_what_everybody_is_done_with_makes_room_and_hides_nothing(
        self, backend: Backend
    ) -> None:
        """Positions are not given out again: what comes after would lie behind the cursor."""
        topic = backend.topic(retention_s=0.0)
        lane = backend.lane(topic)
        for number in range(20):
            backend.publish(topic, *(f"{number}.{n}" for n in range(50)))
            assert len(drain(lane)) == 50, f"round {number}"
            backend.clock.advance(3600)

    def test_what_waits_for_a_retry_is_kept(self, backend: Backend) -> None:
        topic = backend.topic(retention_s=0.0)
        lane = backend.lane(topic)
        backend.publish(topic, "a")
        [held] = claim(lane)
        lane.settle([Retry(held.receipt, 86400.0, "tomorrow")])
        backend.clock.advance(86401)
        backend.publish(topic, "b")
        assert sorted(drain(lane)) == ["a", "b"]

    def test_messages_are_kept_for_those_who_are_not_done(self, backend: Backend) -> None:
        topic = backend.topic(retention_s=0.0, read_by=("slow", "fast"))
        slow, fast = backend.lane(topic, name="slow"), backend.lane(topic, name="fast")
        backend.publish(topic, *"abc")
        assert drain(fast) == ["a", "b", "c"]
        backend.clock.advance(86400)
        backend.publish(topic, "d")
        assert drain(slow) == ["a", "b", "c", "d"]


class Replays:
    """A new subscription may begin with what was published before it was made."""

    def test_a_new_subscription_begins_with_the_oldest(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "a", "b")
        assert drain(backend.lane(topic)) == ["a", "b"]

    def test_what_nobody_listened_to_is_kept_though_it_need_not_be(self, backend: Backend) -> None:
        topic = backend.topic(may_go_unheard=True)
        backend.publish(topic, "a", "b")
        assert drain(backend.lane(topic)) == ["a", "b"]

    def test_or_after_the_newest(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "a", "b")
        lane = backend.lane(topic, start="latest")
        backend.publish(topic, "c")
        assert drain(lane) == ["c"]

    def test_or_at_a_time(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "a", "b")
        backend.clock.advance(10)
        now = datetime.fromtimestamp(backend.clock.wall_ms() / 1000, UTC)
        backend.clock.advance(10)
        backend.publish(topic, "c", "d")
        assert drain(backend.lane(topic, start=now)) == ["c", "d"]

    def test_each_subscription_begins_where_it_says(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "a")
        newest = backend.lane(topic, name="newest", start="latest")
        oldest = backend.lane(topic, name="oldest")
        backend.publish(topic, "b")
        assert drain(newest) == ["b"]
        assert drain(oldest) == ["a", "b"]

    def test_a_time_after_the_newest_begins_there(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "a")
        backend.clock.advance(10)
        now = datetime.fromtimestamp(backend.clock.wall_ms() / 1000, UTC)
        lane = backend.lane(topic, start=now)
        backend.clock.advance(10)
        backend.publish(topic, "b")
        assert drain(lane) == ["b"]

    def test_a_subscription_made_late_sees_only_what_is_kept(self, backend: Backend) -> None:
        topic = backend.topic(retention_s=0.0)
        lane = backend.lane(topic)
        backend.publish(topic, *"abc")
        drain(lane)
        backend.clock.advance(86400)
        backend.publish(topic, "d")
        late = drain(backend.lane(topic, name="late"))
        assert late[-1] == "d"
        assert late == list("abcd")[-len(late) :]

    def test_messages_are_kept_for_their_retention(self, backend: Backend) -> None:
        topic = backend.topic(retention_s=3600.0)
        backend.publish(topic, "a")
        assert drain(backend.lane(topic)) == ["a"]
        backend.clock.advance(1800)
        assert drain(backend.lane(topic, name="late")) == ["a"]


class NoReplays:
    """Nothing is kept for those who come later: a message that nobody takes is refused, and who
    asks for the past is told.
    """

    def test_a_message_that_nobody_takes_is_refused(self, backend: Backend) -> None:
        topic = backend.topic(read_by=())
        [outcome] = backend.broker.publish([backend.message(topic, "unheard")])
        assert isinstance(outcome, PublishFailed)
        lane = backend.lane(topic)
        backend.publish(topic, "heard")
        assert drain(lane) == ["heard"]

    def test_unless_nobody_need_listen(self, backend: Backend) -> None:
        topic = backend.topic(read_by=(), may_go_unheard=True)
        backend.publish(topic, "unheard")
        lane = backend.lane(topic)
        backend.publish(topic, "heard")
        assert drain(lane) == ["heard"]

    def test_a_subscription_begins_when_it_is_made(self, backend: Backend) -> None:
        topic = backend.topic(read_by=("other",))
        backend.publish(topic, "before")
        lane = backend.lane(topic)
        backend.publish(topic, "after")
        assert drain(lane) == ["after"]

    def test_it_can_be_made_before_it_is_worked(self, backend: Backend) -> None:
        topic = backend.topic(read_by=())
        for _ in range(2):
            backend.preparing.prepare([topic], "sub", SubscribeOptions(Guarantee.EXACTLY_ONCE))
        backend.publish(topic, "a")
        lane = backend.lane(topic, guarantee=Guarantee.EXACTLY_ONCE)
        assert drain(lane) == ["a"]

    def test_making_it_needs_a_declared_topic(self, backend: Backend) -> None:
        nowhere, options = (
            Topic("nowhere", str, guarantee="at-least-once"),
            SubscribeOptions(Guarantee.AT_LEAST_ONCE),
        )
        with pytest.raises(ConfigurationError, match="declare"):
            backend.preparing.prepare([nowhere], "sub", options)

    def test_a_time_in_the_past_is_refused(self, backend: Backend) -> None:
        topic = backend.topic()
        now = datetime.fromtimestamp(backend.clock.wall_ms() / 1000, UTC)
        with pytest.raises(ConfigurationError, match="start"):
            backend.lane(topic, start=now)


class Waiting:
    """A claim waits for what can be claimed, in real time."""

    def test_a_claim_waits_no_longer_than_asked(self, backend: Backend) -> None:
        backend.in_real_time()
        topic = backend.topic()
        before = time.monotonic()
        assert list(backend.lane(topic).claim(1, A_LOT, 0.1)) == []
        assert 0.09 < time.monotonic() - before < 10

    def test_publishing_wakes_a_waiting_claim(self, backend: Backend) -> None:
        backend.in_real_time()
        topic = backend.topic()
        _, future = waiting_claim(backend, topic)
        backend.publish(topic, "a")
        assert bodies(future.result(10)) == ["a"]

    def test_closing_ends_a_waiting_claim(self, backend: Backend) -> None:
        backend.in_real_time()
        lane, future = waiting_claim(backend, backend.topic())
        lane.close()
        assert list(future.result(10)) == []

    def test_a_release_wakes_a_waiting_claim(self, backend: Backend) -> None:
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

    def test_a_retry_that_comes_due_wakes_a_waiting_claim(self, backend: Backend) -> None:
        backend.in_real_time()
        topic = backend.topic()
        backend.publish(topic, "a")
        lane = backend.lane(topic)
        [held] = claim(lane)
        lane.settle([Retry(held.receipt, 0.05, "soon")])
        [again] = lane.claim(1, A_LOT, 30.0)
        assert again.attempt == 2

    def test_a_lease_that_ends_wakes_a_waiting_claim(self, backend: Backend) -> None:
        backend.in_real_time()
        topic = backend.topic()
        backend.publish(topic, "a")
        lane = backend.lane(topic, lease_s=0.3)
        claim(lane)
        [again] = lane.claim(1, A_LOT, 30.0)
        assert again.repeated

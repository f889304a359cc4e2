"""At-most-once where settlements are not confirmed: a claim is what settles."""

from __future__ import annotations

from duly.broker import Subscription
from duly.guarantees import Dead, Done, Guarantee, Release, Retry
from duly.message import Topic
from duly.testing.conformance.backend import Backend, bodies, claim, drain, settle_done

ONCE = Guarantee.AT_MOST_ONCE


def topic_of(backend: Backend) -> Topic[str]:
    """A topic that an at-most-once subscription reads."""
    return backend.topic(read_as=ONCE)


def lane_of(backend: Backend, topic: Topic[str]) -> Subscription:
    """One lane of that."""
    return backend.lane(topic, guarantee=ONCE)


class HandedOutOnce:
    """What an at-most-once subscription claims has left the broker, settled or not."""

    def test_what_was_claimed_never_comes_again(self, backend: Backend) -> None:
        topic = topic_of(backend)
        backend.publish(topic, *"abc")
        lane, other = lane_of(backend, topic), lane_of(backend, topic)
        [held] = claim(lane, limit=1)
        assert (bodies([held]), held.attempt, held.repeated) == (["a"], 1, False)
        for _ in range(3):
            backend.fall_silent()
        assert drain(other) == ["b", "c"]
        assert list(lane.settle([Done(held.receipt)])) == []
        assert list(claim(lane)) == list(claim(other)) == []

    def test_not_from_the_dead_either(self, backend: Backend) -> None:
        topic = topic_of(backend)
        backend.publish(topic, *"abcd")
        assert bodies(claim(lane_of(backend, topic), limit=2)) == ["a", "b"]
        backend.crash()
        lane = lane_of(backend, topic)
        for _ in range(2):
            backend.fall_silent()
            assert set(drain(lane)) <= {"c", "d"}
        backend.publish(topic, "e")
        assert drain(lane) == ["e"]

    def test_a_claim_takes_no_more_than_it_may(self, backend: Backend) -> None:
        """What was taken and does not fit is handed out next."""
        topic = topic_of(backend)
        backend.publish(topic, *(str(n) * 100 for n in range(10)))
        lane = lane_of(backend, topic)
        got = []
        while deliveries := claim(lane, limit=4, max_bytes=250):
            assert 1 <= len(deliveries) <= 2
            got += bodies(deliveries)
            settle_done(lane, deliveries)
        assert got == [str(n) * 100 for n in range(10)]

    def test_what_was_not_started_comes_again(self, backend: Backend) -> None:
        topic = topic_of(backend)
        backend.publish(topic, *"abcd")
        lane = lane_of(backend, topic)
        first, second, *_ = claim(lane, limit=3)
        assert list(lane.settle([Done(first.receipt), Release(second.receipt)])) == []
        lane.close()
        again = claim(lane_of(backend, topic))
        assert sorted(bodies(again)) == ["b", "c", "d"]
        assert {(delivery.attempt, delivery.repeated) for delivery in again} == {(1, False)}

    def test_what_cannot_be_read_yet_waits(self, backend: Backend) -> None:
        topic = topic_of(backend)
        backend.publish(topic, "a")
        lane = lane_of(backend, topic)
        for _ in range(3):
            [held] = claim(lane)
            assert (held.attempt, held.repeated) == (1, False)
            lane.settle([Retry(held.receipt, 10.0, "of a newer type", charged=False)])
            backend.clock.advance(9)
            assert list(claim(lane)) == []
            backend.clock.advance(1.5)
        assert drain(lane) == ["a"]

    def test_a_receipt_counts_once(self, backend: Backend) -> None:
        topic = topic_of(backend)
        backend.publish(topic, "a", "b")
        lane, other = lane_of(backend, topic), lane_of(backend, topic)
        first, second = claim(lane)
        receipts = [first.receipt, second.receipt]
        assert list(other.settle([Done(receipt) for receipt in receipts])) == receipts
        assert list(lane.extend(receipts, 30.0)) == []
        assert list(lane.settle([Done(first.receipt), Dead(second.receipt, "bad")])) == []
        assert list(lane.settle([Done(receipt) for receipt in receipts])) == receipts
        assert list(lane.extend(receipts, 30.0)) == receipts
        assert list(claim(lane)) == []

"""Admission by cursor: each offset takes effect once, and a changed log is not passed off."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from duly.broker import Delivery, Subscription
from duly.errors import BrokerUnusable, ConfigurationError
from duly.guarantees import Admission, Done, Guarantee, Release, Retry, Settlement
from duly.message import Topic
from duly.testing.conformance.backend import Place, bodies, claim


def lane_of(place: Place, topic: Topic[Any]) -> Subscription:
    """A lane that asks for exactly-once."""
    return place.backend.lane(topic, guarantee=Guarantee.EXACTLY_ONCE)


def take_effect(place: Place, deliveries: Any) -> list[str]:
    """One transaction; which of these were fresh."""
    session = place.begin()
    try:
        fresh = session.admit(deliveries).fresh
        session.settle([Done(d.receipt) for d in fresh], fresh)
        session.commit()
    finally:
        session.rollback()
    return bodies(fresh)


class ByCursor:
    """Each offset takes effect once, and a changed log is not passed off."""

    admissions = frozenset({Admission.BY_CURSOR})

    @pytest.fixture
    def topic(self, place: Place) -> Topic[Any]:
        return place.backend.topic("orders")

    def test_what_lies_below_the_cursor_is_repeated(self, place: Place, topic: Topic[Any]) -> None:
        place.backend.publish(topic, *"abcd")
        deliveries = claim(lane_of(place, topic))
        assert take_effect(place, deliveries[:2]) == ["a", "b"]
        assert take_effect(place, deliveries) == ["c", "d"]

    def test_each_consumer_has_a_cursor_of_its_own(self, place: Place, topic: Topic[Any]) -> None:
        place.backend.publish(topic, "a")
        deliveries = claim(lane_of(place, topic))
        assert take_effect(place, deliveries) == ["a"]
        session = place.begin("another")
        assert bodies(session.admit(deliveries).fresh) == ["a"]
        session.rollback()

    @pytest.mark.parametrize("kind", [Retry, Release])
    def test_the_cursor_stops_before_what_is_not_done(
        self, place: Place, topic: Topic[Any], kind: Any
    ) -> None:
        place.backend.publish(topic, *"abc")
        deliveries = claim(lane_of(place, topic))
        session = place.begin()
        session.admit(deliveries)
        middle = deliveries[1].receipt
        end = Release(middle) if kind is Release else Retry(middle, 0.0, "no")
        session.settle(
            [Done(deliveries[0].receipt), end, Release(deliveries[2].receipt)], deliveries
        )
        session.commit()
        assert take_effect(place, deliveries) == ["b", "c"]

    def test_settling_behind_what_is_not_done_is_refused(
        self, place: Place, topic: Topic[Any]
    ) -> None:
        place.backend.publish(topic, *"abc")
        deliveries = claim(lane_of(place, topic))
        session = place.begin()
        session.admit(deliveries)
        ends: list[Settlement] = [Done(delivery.receipt) for delivery in deliveries]
        ends[1] = Release(deliveries[1].receipt)
        with pytest.raises(ValueError, match="prefix"):
            session.settle(ends, deliveries)
        session.rollback()

    def test_leaving_one_out_is_refused(self, place: Place, topic: Topic[Any]) -> None:
        place.backend.publish(topic, *"abc")
        deliveries = claim(lane_of(place, topic))
        session = place.begin()
        session.admit(deliveries)
        with pytest.raises(ValueError, match="prefix"):
            session.settle([Done(deliveries[1].receipt)], deliveries[1:2])
        session.rollback()

    def test_partitions_have_cursors_of_their_own(self, place: Place) -> None:
        topic = place.backend.topic("wide", partitions=4)
        for number in range(20):
            place.backend.publish(topic, str(number), key=str(number))
        deliveries = claim(lane_of(place, topic))
        assert len({d.position.log for d in deliveries if d.position}) > 1
        assert sorted(
            take_effect(place, deliveries[:7]) + take_effect(place, deliveries)
        ) == sorted(map(str, range(20)))

    def test_a_message_without_position_is_refused(self, place: Place, topic: Topic[Any]) -> None:
        place.backend.publish(topic, "a")
        [delivery] = claim(lane_of(place, topic))
        session = place.begin()
        with pytest.raises(ConfigurationError, match="position"):
            session.admit([replace(delivery, position=None)])
        session.rollback()

    # --- a log that changed, as its deliveries tell

    def test_gaps_are_stepped_over(self, place: Place, topic: Topic[Any]) -> None:
        """Transaction markers and compaction leave them."""
        place.backend.publish(topic, *"abc")
        deliveries = [
            at(delivery, offset=4 * number, end=9)
            for number, delivery in enumerate(claim(lane_of(place, topic)))
        ]
        assert take_effect(place, deliveries) == ["a", "b", "c"]
        assert take_effect(place, deliveries) == []

    def test_a_recreated_topic_is_another_log(self, place: Place, topic: Topic[Any]) -> None:
        place.backend.publish(topic, "a")
        [before] = claim(lane_of(place, topic))
        assert take_effect(place, [before]) == ["a"]
        assert take_effect(place, [at(before, log="made again")]) == ["a"], "at the same offset"

    def test_a_cursor_beyond_the_end_stops(self, place: Place, topic: Topic[Any]) -> None:
        """The log lost messages: what comes now at a used offset is new, and no repeat."""
        place.backend.publish(topic, *"abcd")
        deliveries = claim(lane_of(place, topic))
        assert take_effect(place, deliveries) == ["a", "b", "c", "d"]
        with pytest.raises(BrokerUnusable, match="end"):
            take_effect(place, [at(deliveries[1], end=2)])

    def test_an_epoch_going_backwards_stops(self, place: Place, topic: Topic[Any]) -> None:
        place.backend.publish(topic, *"ab")
        first, second = claim(lane_of(place, topic))
        assert take_effect(place, [at(first, epoch=5)]) == ["a"]
        with pytest.raises(BrokerUnusable, match="epoch"):
            take_effect(place, [at(second, epoch=4)])

    def test_what_was_written_anew_stops(self, place: Place, topic: Topic[Any]) -> None:
        """Truncated, and grown beyond the cursor again before anybody looked."""
        place.backend.publish(topic, *"abcd")
        deliveries = claim(lane_of(place, topic))
        assert take_effect(place, deliveries[:3]) == ["a", "b", "c"]
        with pytest.raises(BrokerUnusable, match="anew"):
            take_effect(place, [at(deliveries[1], epoch=1, end=9)])

    def test_an_epoch_may_grow(self, place: Place, topic: Topic[Any]) -> None:
        """A change of leader that lost nothing."""
        place.backend.publish(topic, *"ab")
        first, second = claim(lane_of(place, topic))
        assert take_effect(place, [first]) == ["a"]
        assert take_effect(place, [at(second, epoch=3)]) == ["b"]


def at(delivery: Delivery, **changed: Any) -> Delivery:
    """The same delivery at another position."""
    assert delivery.position is not None
    return replace(delivery, position=replace(delivery.position, **changed))

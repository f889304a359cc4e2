"""Admission by cursor: each offset takes effect once, and a changed log is not passed off."""

from __future__ import annotations

from typing import Any

import pytest

from duly.brokers.memory import MemoryLog
from duly.errors import BrokerUnusable, ConfigurationError
from duly.guarantees import Done, Guarantee, Release, Retry, Settlement
from duly.message import Topic
from tests.contract.backends import Place, bodies, claim, places, settle_done

pytestmark = pytest.mark.parametrize("place", places("by-cursor"), indirect=True)


@pytest.fixture
def log(place: Place) -> MemoryLog:
    assert isinstance(place.backend.broker, MemoryLog)
    return place.backend.broker


@pytest.fixture
def topic(place: Place) -> Topic[Any]:
    return place.backend.topic("orders")


def lane_of(place: Place, topic: Topic[Any]):
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


def test_gaps_are_stepped_over(place: Place, log: MemoryLog, topic: Topic[Any]):
    lane = lane_of(place, topic)
    for body in "abc":
        place.backend.publish(topic, body)
        log.partitions(topic.name)[0].skip(3)
    deliveries = claim(lane)
    assert [d.position.offset for d in deliveries if d.position] == [0, 4, 8]
    assert take_effect(place, deliveries) == ["a", "b", "c"]
    assert take_effect(place, deliveries) == []


def test_what_lies_below_the_cursor_is_repeated(place: Place, topic: Topic[Any]):
    place.backend.publish(topic, *"abcd")
    deliveries = claim(lane_of(place, topic))
    assert take_effect(place, deliveries[:2]) == ["a", "b"]
    assert take_effect(place, deliveries) == ["c", "d"]


def test_each_consumer_has_a_cursor_of_its_own(place: Place, topic: Topic[Any]):
    place.backend.publish(topic, "a")
    deliveries = claim(lane_of(place, topic))
    assert take_effect(place, deliveries) == ["a"]
    session = place.begin("another")
    assert bodies(session.admit(deliveries).fresh) == ["a"]
    session.rollback()


@pytest.mark.parametrize("kind", [Retry, Release])
def test_the_cursor_stops_before_what_is_not_done(place: Place, topic: Topic[Any], kind: Any):
    place.backend.publish(topic, *"abc")
    deliveries = claim(lane_of(place, topic))
    session = place.begin()
    session.admit(deliveries)
    middle = deliveries[1].receipt
    end = Release(middle) if kind is Release else Retry(middle, 0.0, "no")
    session.settle([Done(deliveries[0].receipt), end, Release(deliveries[2].receipt)], deliveries)
    session.commit()
    assert take_effect(place, deliveries) == ["b", "c"]


def test_settling_behind_what_is_not_done_is_refused(place: Place, topic: Topic[Any]):
    place.backend.publish(topic, *"abc")
    deliveries = claim(lane_of(place, topic))
    session = place.begin()
    session.admit(deliveries)
    ends: list[Settlement] = [Done(delivery.receipt) for delivery in deliveries]
    ends[1] = Release(deliveries[1].receipt)
    with pytest.raises(ValueError, match="prefix"):
        session.settle(ends, deliveries)
    session.rollback()


def test_leaving_one_out_is_refused(place: Place, topic: Topic[Any]):
    place.backend.publish(topic, *"abc")
    deliveries = claim(lane_of(place, topic))
    session = place.begin()
    session.admit(deliveries)
    with pytest.raises(ValueError, match="prefix"):
        session.settle([Done(deliveries[1].receipt)], deliveries[1:2])
    session.rollback()


def test_partitions_have_cursors_of_their_own(place: Place):
    topic = place.backend.topic("wide", partitions=4)
    for number in range(20):
        place.backend.publish(topic, str(number), key=str(number))
    deliveries = claim(lane_of(place, topic))
    assert len({d.position.log for d in deliveries if d.position}) > 1
    assert sorted(take_effect(place, deliveries[:7]) + take_effect(place, deliveries)) == sorted(
        map(str, range(20))
    )


def test_a_recreated_topic_is_another_log(place: Place, log: MemoryLog, topic: Topic[Any]):
    place.backend.publish(topic, *"abc")
    lane = lane_of(place, topic)
    assert take_effect(place, claim(lane)) == ["a", "b", "c"]
    lane.close()
    log.delete(topic.name)
    log.declare([topic])
    place.backend.publish(topic, "new")
    assert take_effect(place, claim(lane_of(place, topic))) == ["new"]


def test_a_cursor_beyond_the_end_stops(place: Place, log: MemoryLog, topic: Topic[Any]):
    place.backend.publish(topic, *"abcd")
    lane = lane_of(place, topic)
    assert take_effect(place, claim(lane)) == ["a", "b", "c", "d"]
    log.truncate(topic.name, 0, 1)
    place.backend.publish(topic, "new")
    deliveries = claim(lane)
    assert bodies(deliveries)[-1] == "new"
    with pytest.raises(BrokerUnusable, match="end"):
        take_effect(place, deliveries)


def test_what_was_written_anew_stops(place: Place, log: MemoryLog, topic: Topic[Any]):
    """Truncated, and grown beyond the cursor again before anybody looked."""
    place.backend.publish(topic, *"abcd")
    lane = lane_of(place, topic)
    assert take_effect(place, claim(lane)) == ["a", "b", "c", "d"]
    log.truncate(topic.name, 0, 2)
    place.backend.publish(topic, "new c", "new d", "new e")
    deliveries = claim(lane)
    with pytest.raises(BrokerUnusable, match="anew"):
        take_effect(place, deliveries)


def test_an_epoch_going_backwards_stops(place: Place, log: MemoryLog, topic: Topic[Any]):
    partition = log.partitions(topic.name)[0]
    partition.epoch = 5
    place.backend.publish(topic, "a")
    lane = lane_of(place, topic)
    deliveries = claim(lane)
    assert take_effect(place, deliveries) == ["a"]
    settle_done(lane, deliveries)
    partition.epoch = 4
    place.backend.publish(topic, "b")
    with pytest.raises(BrokerUnusable, match="epoch"):
        take_effect(place, claim(lane))


def test_a_message_without_position_is_refused(place: Place, topic: Topic[Any]):
    place.backend.publish(topic, "a")
    [delivery] = claim(lane_of(place, topic))
    from msgspec.structs import replace

    session = place.begin()
    with pytest.raises(ConfigurationError, match="position"):
        session.admit([replace(delivery, position=None)])
    session.rollback()

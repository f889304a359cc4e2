"""A log in memory that loses its end or is made again, beside every store that admits by cursor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from duly.broker import SubscribeOptions
from duly.brokers.memory import MemoryLog
from duly.errors import BrokerUnusable
from duly.guarantees import Admission, Done, Guarantee
from duly.message import Topic, key_lane_of, partition_of
from duly.testing.conformance.backend import Place, bodies, claim, place_on, settle_done
from duly.testing.conformance.memory import LOG, STORE_APART
from duly.testing.conformance.page import expected_on
from duly.testing.conformance.subject import Clock, Pairing, Site
from tests.contract.subjects import DOCS, SQLITE_STORE


@pytest.fixture(params=[STORE_APART, SQLITE_STORE], ids=lambda store: store.name)
def place(request: Any, tmp_path: Path) -> Iterator[Place]:
    expected = expected_on(DOCS / "memory.md", LOG.name)
    site = Site(tmp_path, "log", Clock())
    with place_on(Pairing(LOG, request.param, Admission.BY_CURSOR), site, expected) as opened:
        yield opened


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


def test_keys_of_one_partition_are_of_all_lanes():
    """Where the same hash dealt them to partitions, they would all be of one."""
    topic: Topic[str] = Topic("t", str, guarantee="at-least-once", partitions=8)
    found = [topic.message("x", source="s", key=f"k{number}") for number in range(2000)]
    mine = [each for each in found if partition_of(each, 8) == 0]
    lanes = Counter(key_lane_of(each, 0, 8) for each in mine)
    assert sorted(lanes) == [*range(8)]
    assert min(lanes.values()) > len(mine) / 8 / 3


def test_what_all_lanes_of_keys_are_done_with_leaves_the_log(log: MemoryLog):
    """Also where one of them never had anything."""
    topic: Topic[str] = Topic("one", str, guarantee="at-least-once", partitions=1)
    log.declare([topic])
    options = SubscribeOptions(Guarantee.EXACTLY_ONCE, key_lanes=8)
    lane = log.subscribe([topic], "sub", options)
    log.publish([topic.message(body, source="s", key="k") for body in "abc"])
    settle_done(lane, claim(lane))
    [partition] = log.partitions("one")
    assert partition.after(0) is None

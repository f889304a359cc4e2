"""What a relay may publish while it is not known where its topics ended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import pytest

from duly.brokers.kafka.address import address_of
from duly.brokers.kafka.admin import Admin
from duly.brokers.kafka.leavings import Leavings, Place
from duly.brokers.kafka.producer import Sending
from duly.errors import BrokerError, BrokerUnavailable, BrokerUnusable

ORDER = Sending("orders", b"1", None, [("ce_source", b"shop"), ("ce_id", b"1")])


class Told:
    """A cluster that says this of its topics, or raises it."""

    def __init__(self, says: Mapping[Place, tuple[int, int]] | BrokerError) -> None:
        self.says = says
        self.asked = 0

    def held_up(self, _topics: Any) -> Mapping[Place, tuple[int, int]]:
        self.asked += 1
        if isinstance(self.says, BrokerError):
            raise self.says
        return self.says


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def never(number: int) -> Any:
    raise AssertionError(f"nothing is begun as {number}")


def leavings(told: Told, clock: Clock) -> Leavings:
    address = address_of("kafka://127.0.0.1:1", "here")
    return Leavings(address, cast(Admin, told), never, 3, clock)


def test_nothing_is_published_before_it_is_known_where_a_topic_ends():
    """With the first publish the proof is gone. Not for ever: the others of the outbox wait."""
    told, clock = Told(BrokerUnavailable("no leader")), Clock()
    left = leavings(told, clock)
    for _ in range(3):
        with pytest.raises(BrokerUnavailable, match="nothing was published: no leader"):
            left.end([ORDER])
    clock.now += 61
    left.end([ORDER])
    told.says = {}
    left.end([ORDER])
    assert told.asked == 4, "it is too late to ask"


def test_who_may_not_look_publishes_all_the_same():
    left = leavings(Told(BrokerUnusable("not allowed")), Clock())
    left.end([ORDER])


def test_a_topic_before_which_nobody_waits_is_not_looked_at_again():
    told, clock = Told({}), Clock()
    left = leavings(told, clock)
    for _ in range(5):
        left.end([ORDER])
        clock.now += 100
    assert told.asked == 1

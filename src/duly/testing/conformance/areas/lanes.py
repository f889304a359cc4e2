"""Lanes of keys within a partition of a log, each in order, with a cursor of its own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pytest

from duly.broker import Delivery, Subscription
from duly.errors import ConfigurationError
from duly.guarantees import Done, Guarantee, Release, Retry
from duly.message import Topic
from duly.testing.conformance.backend import Backend, batches, bodies, claim, drain, settle_done

KEYS, COUNT, LANES = 12, 60, 4


def cut(backend: Backend, topic: Topic[Any], lanes: int = LANES, **more: Any) -> Subscription:
    """A lane of an exactly-once subscription that asks for so many lanes of keys."""
    return backend.lane(topic, guarantee=Guarantee.EXACTLY_ONCE, key_lanes=lanes, **more)


def log_of(delivery: Delivery) -> str:
    """The log that it stands in."""
    assert delivery.position is not None
    return delivery.position.log


class KeyLanes:
    """A partition is worked in lanes of keys, side by side, each of them in order."""

    @pytest.fixture
    def topic(self, backend: Backend) -> Topic[Any]:
        """One partition, in which keys take turns."""
        topic = backend.topic(partitions=1, read_by=("sub", "other"))
        for number in range(COUNT):
            backend.publish(topic, str(number), key=f"k{number % KEYS}")
        return topic

    def all_of(self, lane: Subscription) -> list[Delivery]:
        """Everything, each claim settled before the next."""
        found: list[Delivery] = []
        for some in batches(lane, limit=7):
            found += some
            settle_done(lane, some)
        return found

    def test_several_lanes_of_a_partition_are_claimed_at_once(
        self, backend: Backend, topic: Topic[Any]
    ) -> None:
        one, two = cut(backend, topic), cut(backend, topic)
        held = [claim(one, limit=5), claim(two, limit=5)]
        assert all(held), "neither waits for the other"
        logs = [{log_of(each) for each in some} for some in held]
        assert not logs[0] & logs[1], "a lane is held by one at a time"
        for lane, some in zip((one, two), held, strict=True):
            settle_done(lane, some)
        rest = [*drain(one), *drain(two), *drain(one)]
        done = [*bodies(held[0]), *bodies(held[1]), *rest]
        assert sorted(map(int, done)) == [*range(COUNT)]

    def test_each_lane_comes_in_order(self, backend: Backend, topic: Topic[Any]) -> None:
        by_log: dict[str, list[int]] = defaultdict(list)
        by_key: dict[str | None, set[str]] = defaultdict(set)
        for each in self.all_of(cut(backend, topic)):
            assert each.position is not None
            by_log[each.position.log].append(each.position.offset)
            by_key[each.message.key].add(each.position.log)
        assert 1 < len(by_log) <= LANES
        assert all(offsets == sorted(offsets) for offsets in by_log.values())
        assert all(len(logs) == 1 for logs in by_key.values()), "a key is of one lane"
        assert sum(map(len, by_log.values())) == COUNT

    def test_a_message_stays_in_its_lane(self, backend: Backend, topic: Topic[Any]) -> None:
        """Whoever is given it later has to find its cursor."""

        def logs(deliveries: Sequence[Delivery]) -> dict[str, str]:
            return {bodies([each])[0]: log_of(each) for each in deliveries}

        lane, other = cut(backend, topic), cut(backend, topic, name="other")
        first = logs(claim(lane, limit=5))
        backend.fall_silent()
        again = logs(self.all_of(lane))
        assert {body: again[body] for body in first} == first
        assert logs(self.all_of(other)) == again

    def test_what_has_no_key_is_dealt_out(self, backend: Backend) -> None:
        topic = backend.topic("plain", partitions=1)
        backend.publish(topic, *map(str, range(COUNT)))
        found = self.all_of(cut(backend, topic))
        assert sorted(int(body) for body in bodies(found)) == [*range(COUNT)]
        assert len({log_of(each) for each in found}) == LANES

    def test_a_retry_holds_up_its_own_lane(self, backend: Backend, topic: Topic[Any]) -> None:
        lane = cut(backend, topic)
        head, *others = claim(lane, limit=5)
        behind = [Release(each.receipt) for each in others if log_of(each) == log_of(head)]
        beside = [Done(each.receipt) for each in others if log_of(each) != log_of(head)]
        lane.settle([Retry(head.receipt, 10.0, "later"), *behind, *beside])
        gone_on = drain(lane)
        assert bodies([head])[0] not in gone_on
        assert gone_on, "other lanes do not wait"
        backend.clock.advance(11)
        rest = drain(lane)
        assert rest[0] == bodies([head])[0]

    @pytest.mark.parametrize("now", [1, LANES + 1])
    def test_another_number_is_refused(self, backend: Backend, topic: Topic[Any], now: int) -> None:
        """In another lane the same message would take effect once more."""
        cut(backend, topic).close()
        with pytest.raises(ConfigurationError, match=f"key_lanes={LANES}.*key_lanes={now}"):
            cut(backend, topic, lanes=now)
        cut(backend, topic).close()


class NoKeyLanes:
    """To ask for lanes of keys changes nothing where there are none."""

    def test_everything_comes_as_ever(self, backend: Backend) -> None:
        topic = backend.topic(read_as=Guarantee.EXACTLY_ONCE)
        backend.publish(topic, "a", "b", "c")
        assert drain(cut(backend, topic)) == ["a", "b", "c"]

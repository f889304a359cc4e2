"""Positions: whether deliveries say where in a log they stand."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import pytest

from duly.broker import Delivery
from duly.errors import ConfigurationError
from duly.guarantees import Admission
from duly.store import Scope
from duly.stores.memory import MemoryStore
from duly.testing.conformance.backend import Backend, claim, claim_all, settle_done


def positions(deliveries: Iterable[Delivery]) -> dict[str, tuple[str, int]]:
    """Where these messages stand, by id."""
    return {d.message.id: (d.position.log, d.position.offset) for d in deliveries if d.position}


class Positions:
    """Each delivery of a log has its place in one partition."""

    def test_offsets_grow_in_the_order_of_delivery(self, backend: Backend) -> None:
        topic = backend.topic(partitions=4)
        for number in range(40):
            backend.publish(topic, str(number), key=str(number))
        offsets: dict[str, list[int]] = defaultdict(list)
        for delivery in claim_all(backend.lane(topic), 40):
            assert delivery.position is not None
            offsets[delivery.position.log].append(delivery.position.offset)
        assert len(offsets) > 1
        assert all(found == sorted(set(found)) for found in offsets.values())

    def test_the_end_lies_behind_every_message(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, *"abc")
        for delivery in claim(backend.lane(topic)):
            assert delivery.position is not None
            assert delivery.position.end is None or delivery.position.end > delivery.position.offset

    def test_a_message_keeps_its_position(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, *"abc")
        lane = backend.lane(topic)
        held = claim(lane)
        before = positions(held)
        settle_done(lane, held[:1])
        lane.close()
        after = positions(claim(backend.lane(topic)))
        assert after == {id: where for id, where in before.items() if id in after}
        assert len(after) == 2

    def test_subscriptions_see_the_same_positions(self, backend: Backend) -> None:
        topic = backend.topic()
        one, two = backend.lane(topic, name="one"), backend.lane(topic, name="two")
        backend.publish(topic, *"abc")
        assert positions(claim(one)) == positions(claim(two))

    def test_topics_are_logs_of_their_own(self, backend: Backend) -> None:
        topics = [backend.topic(name) for name in ("one", "two")]
        for topic in topics:
            backend.publish(topic, "a")
        deliveries = claim_all(backend.lane(*topics), len(topics))
        logs = [d.position.log for d in deliveries if d.position]
        assert len(set(logs)) == 2


class NoPositions:
    """No log: deliveries carry no position, and admission by cursor refuses them."""

    def test_deliveries_have_no_position(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "a", "b")
        lane = backend.lane(topic)
        deliveries = claim(lane)
        assert [delivery.position for delivery in deliveries] == [None, None]
        settle_done(lane, deliveries)

    def test_admission_by_cursor_refuses_them(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "a")
        deliveries = claim(backend.lane(topic))
        session = MemoryStore().begin(Scope("sub", Admission.BY_CURSOR))
        with pytest.raises(ConfigurationError, match="position"):
            session.admit(deliveries)
        session.rollback()

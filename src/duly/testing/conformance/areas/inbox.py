"""Admission by inbox: what took effect is remembered by its identity, for a retention."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from duly.broker import Delivery
from duly.guarantees import Admission, Done, Guarantee, Retry
from duly.message import Topic
from duly.store import Admitted
from duly.testing.conformance.backend import Place, bodies, claim


def take_effect(place: Place, deliveries: Any, **scope: Any) -> Admitted:
    """One transaction; what admission found."""
    session = place.begin(**scope)
    try:
        admitted = session.admit(deliveries)
        session.settle([Done(d.receipt) for d in admitted.fresh], admitted.fresh)
        session.commit()
    finally:
        session.rollback()
    return admitted


def delivered(place: Place, topic: Topic[Any], *messages: tuple[str, str]) -> list[Delivery]:
    """Publish (body, id) pairs and claim them; the broker is done with them."""
    lane = place.backend.lane(topic, guarantee=Guarantee.EXACTLY_ONCE)
    for body, id in messages:
        place.backend.publish(topic, body, id=id)
    deliveries = list(claim(lane))
    lane.settle([Done(d.receipt) for d in deliveries])
    lane.close()
    return deliveries


class ByInbox:
    """What took effect is remembered by its identity, for a retention."""

    admissions = frozenset({Admission.BY_INBOX})

    @pytest.fixture
    def topic(self, place: Place) -> Topic[Any]:
        return place.backend.topic("orders", guarantee="exactly-once")

    def test_a_repeated_publish_takes_effect_once(self, place: Place, topic: Topic[Any]) -> None:
        first = delivered(place, topic, ("a", "one"))
        again = delivered(place, topic, ("a", "one"))
        assert bodies(take_effect(place, first).fresh) == ["a"]
        admitted = take_effect(place, again)
        assert (list(admitted.fresh), list(admitted.repeated)) == ([], again)

    def test_a_repeat_within_one_batch_too(self, place: Place, topic: Topic[Any]) -> None:
        batch = delivered(place, topic, ("a", "one"), ("b", "two"), ("a", "one"))
        admitted = take_effect(place, batch)
        assert list(admitted.fresh) == batch[:2]
        assert list(admitted.repeated) == batch[2:]

    def test_one_id_with_another_body_is_a_conflict(self, place: Place, topic: Topic[Any]) -> None:
        take_effect(place, delivered(place, topic, ("a", "one")))
        batch = delivered(place, topic, ("b", "one"), ("c", "two"))
        admitted = take_effect(place, batch)
        assert list(admitted.conflicting) == batch[:1]
        assert bodies(admitted.fresh) == ["c"]

    def test_a_conflict_within_one_batch(self, place: Place, topic: Topic[Any]) -> None:
        batch = delivered(place, topic, ("a", "one"), ("b", "one"))
        admitted = take_effect(place, batch)
        assert list(admitted.fresh) == batch[:1]
        assert list(admitted.conflicting) == batch[1:]

    def test_a_conflict_does_not_make_the_inbox_forget(
        self, place: Place, topic: Topic[Any]
    ) -> None:
        first = delivered(place, topic, ("a", "one"))
        take_effect(place, first)
        conflict = delivered(place, topic, ("b", "one"))
        session = place.begin()
        session.admit(conflict)
        session.settle([Retry(conflict[0].receipt, 0.0, "of the conflict")], conflict)
        session.commit()
        assert list(take_effect(place, first).repeated) == first

    def test_a_repeat_that_is_done_does_not_vouch_for_the_first(
        self, place: Place, topic: Topic[Any]
    ) -> None:
        batch = delivered(place, topic, ("a", "one"), ("a", "one"))
        session = place.begin()
        session.admit(batch)
        session.settle([Retry(batch[0].receipt, 0.0, "failed"), Done(batch[1].receipt)], batch)
        session.commit()
        assert list(take_effect(place, batch[:1]).fresh) == batch[:1]

    def test_a_rollback_remembers_nothing(self, place: Place, topic: Topic[Any]) -> None:
        batch = delivered(place, topic, ("a", "one"))
        session = place.begin()
        session.admit(batch)
        session.rollback()
        assert list(take_effect(place, batch).fresh) == batch

    def test_each_consumer_has_an_inbox_of_its_own(self, place: Place, topic: Topic[Any]) -> None:
        batch = delivered(place, topic, ("a", "one"))
        take_effect(place, batch)
        assert list(take_effect(place, batch, consumer="another").fresh) == batch

    def test_sources_and_topics_are_part_of_the_identity(
        self, place: Place, topic: Topic[Any]
    ) -> None:
        [delivery] = batch = delivered(place, topic, ("a", "one"))
        take_effect(place, batch)
        elsewhere = replace(delivery, carried=replace(delivery.message, topic="other", body=b"b"))
        another = replace(delivery, carried=replace(delivery.message, source="another", body=b"c"))
        admitted = take_effect(place, [elsewhere, another])
        assert len(admitted.fresh) == 2

    def test_only_a_marked_repeat_can_be_too_old(self, place: Place, topic: Topic[Any]) -> None:
        day_ms = 86_400_000
        [made] = delivered(place, topic, ("a", "one"))
        old = replace(made.message, time_ms=made.message.time_ms - 10 * day_ms)
        first = replace(made, carried=old)
        marked = replace(made, carried=replace(old, id="two"), repeated=True)
        admitted = take_effect(place, [first, marked], inbox_retention_s=7 * 86400.0)
        assert list(admitted.fresh) == [first], "a first delivery may be of any age"
        assert list(admitted.too_old) == [marked]

    def test_what_is_remembered_is_never_too_old(self, place: Place, topic: Topic[Any]) -> None:
        [made] = delivered(place, topic, ("a", "one"))
        old = replace(made.message, time_ms=made.message.time_ms - 10 * 86_400_000)
        take_effect(place, [replace(made, carried=old)])
        again = replace(made, carried=old, repeated=True)
        assert list(take_effect(place, [again]).repeated) == [again]

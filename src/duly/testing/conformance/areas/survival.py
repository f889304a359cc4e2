"""What a durable store has committed is there when every process is gone."""

from __future__ import annotations

from duly.guarantees import Admission, Guarantee
from duly.testing.conformance.areas.admission import expected, work
from duly.testing.conformance.backend import Place, claim


class DurableStore:
    """Effects, the memory of messages and the outbox survive, together."""

    admissions = frozenset({Admission.BY_CURSOR, Admission.BY_INBOX})

    def test_what_was_committed_is_there(self, place: Place) -> None:
        out = place.topic("receipts")
        topic = place.backend.topic("orders")
        place.backend.publish(topic, "a", "b")
        work(place, place.backend.lane(topic, guarantee=Guarantee.EXACTLY_ONCE), out)
        place.reopen()
        assert dict(place.effects.rows()) == expected("a", "b")
        place.check_outputs(out, ["receipt of a", "receipt of b"])
        place.reopen()
        place.check_outputs(out, [])

    def test_what_took_effect_is_remembered(self, place: Place) -> None:
        out = place.topic("receipts")
        topic = place.backend.topic("orders")
        place.backend.publish(topic, "a", "b")
        lane = place.backend.lane(topic, guarantee=Guarantee.EXACTLY_ONCE)
        deliveries = claim(lane, limit=2)
        lane.close()
        lane = place.backend.lane(topic, guarantee=Guarantee.EXACTLY_ONCE)
        assert len(work(place, lane, out)) == 2
        place.reopen()
        session = place.begin()
        assert list(session.admit(deliveries).repeated) == list(deliveries)
        session.rollback()

    def test_what_was_rolled_back_is_not_there(self, place: Place) -> None:
        out = place.topic("receipts")
        session = place.store.begin(None)
        place.effects.insert(session.connection, "no", "row")
        if place.publishes:
            session.publish([place.backend.message(out, "no")])
        session.rollback()
        place.reopen()
        assert dict(place.effects.rows()) == {}
        place.check_outputs(out, [])


class ForgetfulStore:
    """Not durable, and it says so: opened again it holds nothing."""

    admissions = frozenset({Admission.BY_CURSOR, Admission.BY_INBOX})

    def test_nothing_is_left(self, place: Place) -> None:
        out = place.topic("receipts")
        topic = place.backend.topic("orders")
        place.backend.publish(topic, "a")
        work(place, place.backend.lane(topic, guarantee=Guarantee.EXACTLY_ONCE), out)
        place.reopen()
        assert dict(place.effects.rows()) == {}
        place.check_outputs(out, [])

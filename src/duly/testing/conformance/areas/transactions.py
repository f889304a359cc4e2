"""Transactions without a scope: the application's own, begun by the store or beside it."""

from __future__ import annotations

from typing import Any

import pytest

from duly.broker import Published
from duly.errors import ConfigurationError, DulyError, IdentityConflict, PublishFailed
from duly.guarantees import Admission
from duly.message import Topic
from duly.store import Scope, outbox_of
from duly.testing.conformance.backend import Place


class Transactions:
    """Begun by the store, without a message to admit."""

    def test_a_session_is_over_after_its_end(self, place: Place) -> None:
        for end in ("commit", "rollback"):
            session = place.store.begin(None)
            getattr(session, end)()
            with pytest.raises(DulyError):
                session.commit()
            session.rollback()

    def test_a_transaction_without_scope_admits_nothing(self, place: Place) -> None:
        session = place.store.begin(None)
        with pytest.raises(TypeError, match="scope"):
            session.admit([])
        session.rollback()


class NoOutbox:
    """No outbox: what a transaction would publish to a broker elsewhere is refused, not lost."""

    admissions = frozenset({Admission.BY_CURSOR, Admission.BY_INBOX})

    def test_it_has_none(self, place: Place) -> None:
        assert outbox_of(place.store) is None

    def test_publishing_is_refused(self, place: Place) -> None:
        out = place.topic("receipts")
        message = place.backend.message(out, "a")
        session = place.store.begin(None)
        place.effects.insert(session.connection, "a", "row")
        try:
            refused = all(isinstance(o, PublishFailed) for o in session.publish([message]))
        except DulyError:
            refused = True
        session.rollback()
        assert refused
        assert dict(place.effects.rows()) == {}


class Publications:
    """What the application's own transaction publishes is true exactly when its rows are."""

    publishes = True

    @pytest.fixture
    def out(self, place: Place) -> Topic[Any]:
        return place.topic("receipts")

    def test_a_transaction_of_its_own_publishes_with_its_effects(
        self, place: Place, out: Topic[Any]
    ) -> None:
        for body, commits in (("no", False), ("yes", True)):
            session = place.store.begin(None)
            place.effects.insert(session.connection, body, "row")
            session.publish([place.backend.message(out, body)])
            if commits:
                session.commit()
            else:
                session.rollback()
        assert place.effects.rows() == {"yes": "row"}
        assert place.outputs(out) == ["yes"]


class IntoTheLog:
    """What a transaction publishes where the broker is the same database: into its log."""

    admissions = frozenset({Admission.BY_CLAIM})

    def test_an_identity_conflict_is_found_inside(self, place: Place) -> None:
        out = place.topic("once", guarantee="exactly-once")
        place.backend.publish(out, "a", id="one")
        session = place.store.begin(None)
        batch = [("a", "one"), ("b", "one"), ("c", "two"), ("d", "two")]
        outcomes = session.publish([place.backend.message(out, b, id=i) for b, i in batch])
        assert [type(outcome).__name__ for outcome in outcomes] == [
            "RepeatDropped",
            "IdentityConflict",
            "Published",
            "IdentityConflict",
        ]
        assert isinstance(outcomes[1], IdentityConflict)
        session.commit()
        assert place.outputs(out) == ["a", "c"]

    def test_an_id_that_was_undone_can_be_published_again(self, place: Place) -> None:
        out = place.topic("once", guarantee="exactly-once")
        message = place.backend.message(out, "a", id="one")
        session = place.store.begin(None)
        session.savepoint()
        session.publish([message])
        session.rollback_to_savepoint()
        [outcome] = session.publish([message])
        assert outcome == Published("one")
        session.commit()
        assert place.outputs(out) == ["a"]


class Within:
    """What is published within a transaction that is not the store's."""

    publishes = True

    @pytest.fixture
    def out(self, place: Place) -> Topic[Any]:
        return place.topic("receipts")

    def test_it_is_seen_when_that_commits(self, place: Place, out: Topic[Any]) -> None:
        with place.own() as own:
            assert place.store.joins(own.connection)
            outcomes = place.store.publish_within(
                own.connection, [place.backend.message(out, "yes", id="one")]
            )
            assert list(outcomes) == [Published("one")]
            own.commit()
        assert place.outputs(out) == ["yes"]

    def test_and_never_when_that_rolls_back(self, place: Place, out: Topic[Any]) -> None:
        with place.own() as own:
            place.store.publish_within(own.connection, [place.backend.message(out, "no")])
            own.rollback()
        assert place.outputs(out) == []

    def test_its_effects_are_of_the_same_transaction(self, place: Place, out: Topic[Any]) -> None:
        for body, end in (("no", "rollback"), ("yes", "commit")):
            with place.own() as own:
                place.effects.insert(own.connection, body, "row")
                place.store.publish_within(own.connection, [place.backend.message(out, body)])
                getattr(own, end)()
        assert dict(place.effects.rows()) == {"yes": "row"}
        assert place.outputs(out) == ["yes"]

    def test_a_topic_is_made_known_as_part_of_it(self, place: Place) -> None:
        new: Topic[Any] = Topic("new", str, guarantee="at-least-once")
        with place.own() as own:
            place.store.publish_within(
                own.connection, [place.backend.message(new, "no")], topics=[new]
            )
            own.rollback()
        with place.own() as own:
            place.store.publish_within(
                own.connection, [place.backend.message(new, "yes")], topics=[new]
            )
            own.commit()
        place.backend.broker.declare([new])
        assert place.outputs(new) == ["yes"]

    @pytest.mark.parametrize("other", [None, object(), "a connection"])
    def test_what_is_no_connection_of_this_database_is_refused(
        self, place: Place, out: Topic[Any], other: Any
    ) -> None:
        assert not place.store.joins(other)
        with pytest.raises(ConfigurationError):
            place.store.publish_within(other, [place.backend.message(out, "a")])
        assert place.outputs(out) == []

    def test_one_that_has_ended_is_refused(self, place: Place, out: Topic[Any]) -> None:
        with place.own() as own:
            connection = own.connection
            own.commit()
        assert not place.store.joins(connection)
        with pytest.raises(ConfigurationError):
            place.store.publish_within(connection, [place.backend.message(out, "a")])
        assert place.outputs(out) == []


class ByClaimElsewhere:
    """Admission by claim needs the claims: a store in another database refuses it."""

    admissions = frozenset({Admission.BY_CURSOR, Admission.BY_INBOX})

    def test_it_is_refused(self, place: Place) -> None:
        topic = place.backend.topic("orders")
        place.backend.publish(topic, "a")
        deliveries = place.backend.lane(topic).claim(1, 1, 0.0)

        def admit() -> None:
            session = place.store.begin(Scope("sub", Admission.BY_CLAIM))
            try:
                session.admit(deliveries)
            finally:
                session.rollback()

        with pytest.raises(DulyError):
            admit()
        place.store.begin(None).rollback()
        assert dict(place.effects.rows()) == {}

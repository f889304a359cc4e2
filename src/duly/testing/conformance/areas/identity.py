"""Identity: what becomes of an id that is published again."""

from __future__ import annotations

from duly.broker import Published, RepeatDropped
from duly.errors import IdentityConflict
from duly.testing.conformance.backend import Backend, claim, drain, kinds, settle_done


class Identity:
    """An exactly-once topic drops repeats, for as long as it remembers ids."""

    def test_a_repeat_on_an_exactly_once_topic_is_dropped(self, backend: Backend) -> None:
        topic = backend.topic(guarantee="exactly-once")
        lane = backend.lane(topic)
        backend.publish(topic, "a", id="one")
        [repeat] = backend.broker.publish([backend.message(topic, "a", id="one")])
        assert repeat == RepeatDropped("one")
        assert drain(lane) == ["a"]

    def test_a_repeat_within_one_call_is_dropped(self, backend: Backend) -> None:
        topic = backend.topic(guarantee="exactly-once")
        twice = [backend.message(topic, "a", id="one") for _ in range(2)]
        assert kinds(backend.broker.publish(twice)) == ["Published", "RepeatDropped"]
        assert drain(backend.lane(topic)) == ["a"]

    def test_a_repeat_is_dropped_after_it_was_handled_too(self, backend: Backend) -> None:
        topic = backend.topic(guarantee="exactly-once")
        lane = backend.lane(topic)
        backend.publish(topic, "a", id="one")
        settle_done(lane, claim(lane))
        backend.clock.advance(3600)
        assert kinds(backend.broker.publish([backend.message(topic, "a", id="one")])) == [
            "RepeatDropped"
        ]
        assert list(claim(lane)) == []

    def test_one_id_with_another_body_is_a_conflict(self, backend: Backend) -> None:
        topic = backend.topic(guarantee="exactly-once")
        backend.publish(topic, "a", id="one")
        [outcome] = backend.broker.publish([backend.message(topic, "b", id="one")])
        assert isinstance(outcome, IdentityConflict)
        assert outcome.message_id == "one"
        assert drain(backend.lane(topic)) == ["a"]

    def test_a_conflict_within_one_call(self, backend: Backend) -> None:
        topic = backend.topic(guarantee="exactly-once")
        batch = [backend.message(topic, body, id="one") for body in "ab"]
        assert kinds(backend.broker.publish(batch)) == ["Published", "IdentityConflict"]
        assert drain(backend.lane(topic)) == ["a"]

    def test_a_conflict_leaves_its_neighbours_alone(self, backend: Backend) -> None:
        topic = backend.topic(guarantee="exactly-once")
        backend.publish(topic, "a", id="one")
        batch = [("b", "two"), ("x", "one"), ("c", "three"), ("a", "one")]
        outcomes = backend.broker.publish([backend.message(topic, b, id=i) for b, i in batch])
        assert kinds(outcomes) == ["Published", "IdentityConflict", "Published", "RepeatDropped"]
        assert drain(backend.lane(topic)) == ["a", "b", "c"]

    def test_equal_messages_under_two_ids_are_two_events(self, backend: Backend) -> None:
        topic = backend.topic(guarantee="exactly-once")
        backend.publish(topic, "same", "same")
        assert drain(backend.lane(topic)) == ["same", "same"]

    def test_identity_is_topic_source_and_id(self, backend: Backend) -> None:
        topic, other = backend.topic(guarantee="exactly-once"), backend.topic("o", "exactly-once")
        backend.publish(topic, "a", id="one")
        elsewhere = backend.message(other, "b", id="one")
        of_another = topic.message("c", source="another", id="one")
        assert kinds(backend.broker.publish([elsewhere, of_another])) == ["Published"] * 2

    def test_an_id_is_remembered_for_its_retention(self, backend: Backend) -> None:
        topic = backend.topic(guarantee="exactly-once", identity_retention_s=60.0)
        lane = backend.lane(topic)
        backend.publish(topic, "a", id="one")
        settle_done(lane, claim(lane))
        backend.clock.advance(50)
        [within] = backend.broker.publish([backend.message(topic, "a", id="one")])
        assert isinstance(within, RepeatDropped)

    def test_other_topics_remember_no_ids(self, backend: Backend) -> None:
        """Remembering would cost each of their messages a row that nobody asked for."""
        topic = backend.topic(guarantee="at-least-once")
        backend.publish(topic, "a", "b", id="one")
        assert drain(backend.lane(topic)) == ["a", "b"]


class NoIdentity:
    """No memory of ids: each repeat stands for itself, and an inbox has to find it."""

    def test_a_repeat_on_an_exactly_once_topic_is_stored(self, backend: Backend) -> None:
        topic = backend.topic(guarantee="exactly-once")
        lane = backend.lane(topic)
        backend.publish(topic, "a", id="one")
        [repeat] = backend.broker.publish([backend.message(topic, "a", id="one")])
        assert repeat == Published("one")
        assert drain(lane) == ["a", "a"]

    def test_a_repeat_within_one_call_is_stored(self, backend: Backend) -> None:
        topic = backend.topic(guarantee="exactly-once")
        twice = [backend.message(topic, "a", id="one") for _ in range(2)]
        assert kinds(backend.broker.publish(twice)) == ["Published"] * 2
        assert drain(backend.lane(topic)) == ["a", "a"]

    def test_one_id_with_another_body_is_stored(self, backend: Backend) -> None:
        """No silent drop either: the inbox finds the conflict, and the message is dead-lettered."""
        topic = backend.topic(guarantee="exactly-once")
        batch = [("a", "one"), ("b", "two"), ("x", "one"), ("a", "one")]
        outcomes = backend.broker.publish([backend.message(topic, b, id=i) for b, i in batch])
        assert kinds(outcomes) == ["Published"] * 4
        assert sorted(drain(backend.lane(topic))) == ["a", "a", "b", "x"]

    def test_an_id_is_not_remembered_after_it_was_handled(self, backend: Backend) -> None:
        topic = backend.topic(guarantee="exactly-once", identity_retention_s=60.0)
        lane = backend.lane(topic)
        backend.publish(topic, "a", id="one")
        settle_done(lane, claim(lane))
        backend.clock.advance(50)
        backend.publish(topic, "a", id="one")
        assert drain(lane) == ["a"]

    def test_other_topics_remember_no_ids(self, backend: Backend) -> None:
        topic = backend.topic(guarantee="at-least-once")
        backend.publish(topic, "a", "b", id="one")
        assert drain(backend.lane(topic)) == ["a", "b"]

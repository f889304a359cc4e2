"""What goes through a broker, by brokers that can count it (`Counting`), and what was suppressed
at a consumer (`NotesRepeats`).
"""

from __future__ import annotations

from duly.broker import NotesRepeats
from duly.inspection import Observing
from duly.inspection.counting import Counting
from duly.testing.conformance.backend import Backend, claim, drain, settle_done


def counting(backend: Backend) -> Counting:
    """The broker as one that counts."""
    assert isinstance(backend.broker, Counting)
    return backend.broker


class Counted:
    """Counts that only grow, and who is there."""

    def test_what_was_ever_stored(self, backend: Backend) -> None:
        broker = counting(backend)
        topic, other = backend.topic("t"), backend.topic("other")
        assert (broker.published()["t"], broker.published()["other"]) == (0, 0)
        lane = backend.lane(topic)
        backend.publish(topic, *"abc")
        backend.publish(other, "a")
        assert drain(lane) == [*"abc"]
        backend.publish(topic, "d")
        assert drain(lane) == ["d"]
        assert (broker.published()["t"], broker.published()["other"]) == (4, 1)

    def test_in_every_partition(self, backend: Backend) -> None:
        topic = backend.topic(partitions=4)
        for key in "abcdefgh":
            backend.publish(topic, key, key=key)
        assert counting(backend).published()[topic.name] == 8

    def test_a_repeat_was_not_stored(self, backend: Backend) -> None:
        topic = backend.topic(guarantee="exactly-once")
        message = backend.message(topic, "a", id="one")
        backend.broker.publish([message])
        backend.broker.publish([message])
        stored = 1 if backend.can.identity_retention else 2
        assert counting(backend).published()[topic.name] == stored

    def test_who_is_there(self, backend: Backend) -> None:
        broker = counting(backend)
        topic = backend.topic()
        lane = backend.lane(topic)
        [idle] = broker.workers()
        backend.publish(topic, "a")
        settle_done(lane, held := claim(lane))
        assert len(held) == 1
        assert list(broker.workers()) == [idle]
        backend.publish(topic, "b")
        claim(lane)
        if isinstance(backend.broker, Observing):
            assert [holder.worker for holder in backend.broker.holders()] == [idle]
        backend.restart()
        assert idle not in counting(backend).workers()


class Suppressed:
    """What had taken effect before is kept for people to see, and is otherwise untouched."""

    def test_each_is_counted(self, backend: Backend) -> None:
        topic, other = backend.topic("t"), backend.topic("other")
        lane = backend.lane(topic, other, identities=True)
        backend.lane(topic, name="another")
        messages = [*backend.publish(topic, *"abcd"), *backend.publish(other, "e")]
        held = claim(lane)
        assert isinstance(lane, NotesRepeats)
        lane.note_repeats([d for d in held if d.message.body != b"c"])
        counts = backend.inside.incident_counts()
        assert counts == {("sub", "repeat-suppressed"): 4}
        noted = backend.inside.incidents("sub", "repeat-suppressed")
        assert sum(incident.count for incident in noted) == 4
        assert {incident.topic for incident in noted} == {"t", "other"}
        assert {incident.id for incident in noted} <= {each.id for each in messages}

    def test_they_are_settled_as_ever(self, backend: Backend) -> None:
        topic = backend.topic()
        lane = backend.lane(topic, bodies_only=True, identities=True)
        backend.publish(topic, *"ab")
        held = claim(lane)
        assert isinstance(lane, NotesRepeats)
        lane.note_repeats([held[0]])
        settle_done(lane, [*held])
        backend.fall_silent()
        assert drain(lane) == []
        assert list(backend.inside.dead_letters()) == []

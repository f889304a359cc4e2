"""What people see of the work before a broker: states, counts, who holds what, how old it is."""

from __future__ import annotations

import pytest

from duly.guarantees import Dead, Release, Retry
from duly.inspection import Observing as Observes
from duly.testing.conformance.backend import Backend, claim, drain, settle_done

CALLS = ("holders", "oldest")


class States:
    """`duly.inspection.Inspection`: one state for each topic of each subscription, and counts."""

    def test_each_topic_of_each_subscription_by_name(self, backend: Backend) -> None:
        first, second = backend.topic("first"), backend.topic("second")
        both = backend.lane(second, first, name="both")
        backend.lane(second, name="alone")
        backend.publish(first, *"abc")
        backend.publish(second, *"de")
        states = [(each.name, each.topic, each.backlog) for each in backend.inside.subscriptions()]
        assert states == [("alone", "second", 2), ("both", "first", 3), ("both", "second", 2)]
        drain(both)
        drained = [each.is_drained for each in backend.inside.subscriptions()]
        assert drained == [False, True, True]

    def test_a_state_goes_with_what_happens(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, *"abc")
        lane = backend.lane(topic)

        def state() -> tuple[int, int, int, int]:
            [found] = backend.inside.subscriptions()
            return found.backlog, found.in_flight, found.parked, found.dead

        assert state() == (3, 0, 0, 0)
        [delivery] = claim(lane, limit=1)
        assert state() == (2, 1, 0, 0)
        lane.settle([Release(delivery.receipt)])
        assert sum(state()) == 3
        assert state()[1] == 0
        settle_done(lane, claim(lane, limit=1))
        assert state() == (2, 0, 0, 0)
        while claimed := claim(lane):
            lane.settle([Dead(delivery.receipt, "no") for delivery in claimed])
        assert state() == (0, 0, 0, 2)

    def test_incidents_count_messages(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, *"abc")
        lane = backend.lane(topic)
        lane.settle([Retry(delivery.receipt, 0.0, "why") for delivery in claim(lane)])
        dead = 0
        while deliveries := claim(lane):
            lane.settle([Dead(delivery.receipt, "no") for delivery in deliveries])
            dead += len(deliveries)
        counts = backend.inside.incident_counts()
        assert (dead, counts["sub", "retry"], counts["sub", "dead-letter"]) == (3, 3, 3)
        told = backend.inside.incidents("sub", "retry")
        assert sum(incident.count for incident in told) == 3

    def test_incidents_are_narrowed_and_limited(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "a")
        for lane in [backend.lane(topic, name=name) for name in ("one", "two")]:
            [delivery] = claim(lane)
            lane.settle([Retry(delivery.receipt, 0.0, "why")])
            backend.clock.advance(1)
            [delivery] = claim(lane)
            lane.settle([Dead(delivery.receipt, "no")])
            backend.clock.advance(1)
        look = backend.inside.incidents
        assert [each.kind for each in look("one")] == ["dead-letter", "retry"]
        assert [each.subscription for each in look(kind="retry")] == ["two", "one"]
        assert [(each.subscription, each.kind) for each in look(limit=1)] == [
            ("two", "dead-letter")
        ]
        assert list(look("nobody")) == []


class NoObserving:
    """No telling who holds what: nothing pretends to be `duly.inspection.Observing`."""

    @pytest.mark.parametrize("call", CALLS)
    def test_it_has_no_such_call(self, backend: Backend, call: str) -> None:
        assert not hasattr(backend.broker, call), "say observing = true in the page"


class Observing:
    """Who holds what, and how old the oldest is."""

    def test_it_has_every_call(self, backend: Backend) -> None:
        assert isinstance(backend.broker, Observes)
        assert list(backend.observer.holders()) == []
        assert dict(backend.observer.oldest()) == {}

    def test_who_holds_what(self, backend: Backend) -> None:
        first, second = backend.topic("first"), backend.topic("second")
        backend.publish(first, *"abc")
        backend.publish(second, *"de")
        lane, other = backend.lane(first, name="one"), backend.lane(second, name="two")
        held = claim(lane)
        claim(other)
        holders = backend.observer.holders()
        assert [(each.subscription, each.topic, each.messages) for each in holders] == [
            ("one", "first", 3),
            ("two", "second", 2),
        ]
        assert all(each.worker and each.alive for each in holders)
        settle_done(lane, held[:1])
        assert [each.messages for each in backend.observer.holders()] == [2, 2]

    def test_who_is_done_holds_nothing(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, *"abcd")
        lane = backend.lane(topic)
        done, dead, late, back = claim(lane)
        settle_done(lane, [done])
        lane.settle([Dead(dead.receipt, "no"), Retry(late.receipt, 60.0, "later")])
        assert [each.messages for each in backend.observer.holders()] == [1]
        lane.settle([Release(back.receipt)])
        assert list(backend.observer.holders()) == []

    def test_how_old_the_oldest_is(self, backend: Backend) -> None:
        topic = backend.topic()
        first, second = backend.lane(topic, name="one"), backend.lane(topic, name="two")
        times = []
        for body in "abc":
            [message] = backend.publish(topic, body)
            times.append(message.time_ms)
            backend.clock.advance(10)
        key, other = ("one", topic.name), ("two", topic.name)
        assert dict(backend.observer.oldest()) == {key: times[0], other: times[0]}
        claimed = claim(first)
        assert backend.observer.oldest()[key] == times[0], "what is claimed is not done"
        settle_done(first, claimed[:1])
        assert dict(backend.observer.oldest()) == {key: times[1], other: times[0]}
        first.settle([Retry(claimed[1].receipt, 3600.0, "later")])
        settle_done(first, claimed[2:])
        assert backend.observer.oldest()[key] == times[1], "what is parked is not done"
        drain(second)
        assert dict(backend.observer.oldest()) == {key: times[1]}

    def test_what_was_given_up_on_does_not_grow_older(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "a")
        lane = backend.lane(topic)
        [delivery] = claim(lane)
        lane.settle([Dead(delivery.receipt, "no")])
        assert dict(backend.observer.oldest()) == {}

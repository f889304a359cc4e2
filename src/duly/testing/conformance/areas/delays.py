"""Due times: kept, or refused before anything is stored."""

from __future__ import annotations

import pytest

from duly.errors import InvalidMessage
from duly.testing.conformance.backend import Backend, batches, claim, drain


class Delays:
    """A message with a due time waits for it, and nothing else does."""

    def test_a_due_time_is_kept(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "later", due_ms=backend.clock.wall_ms() + 5_000)
        lane = backend.lane(topic)
        backend.publish(topic, "now")
        assert drain(lane) == ["now"]
        backend.clock.advance(4.5)
        assert drain(lane) == []
        backend.clock.advance(1)
        assert drain(lane) == ["later"]

    def test_a_due_time_in_the_past_is_now(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "late", due_ms=backend.clock.wall_ms() - 60_000)
        assert drain(backend.lane(topic)) == ["late"]

    def test_a_first_delivery_is_one_however_late(self, backend: Backend) -> None:
        """A delayed message is moved in one step: it neither doubles nor is charged."""
        topic = backend.topic()
        backend.publish(topic, *"abc", due_ms=backend.clock.wall_ms() + 5_000)
        lane = backend.lane(topic)
        assert list(claim(lane)) == []
        backend.clock.advance(6)
        deliveries = [delivery for batch in batches(lane) for delivery in batch]
        assert {(d.attempt, d.repeated, d.alone) for d in deliveries} == {(1, False, False)}
        assert len(deliveries) == 3

    @pytest.mark.parametrize("hours", [1, -1])
    def test_a_due_time_names_a_moment(self, backend: Backend, hours: int) -> None:
        """It goes by the wall clock, also where that is set in between."""
        topic = backend.topic()
        backend.publish(topic, "later", due_ms=backend.clock.wall_ms() + 7200_000)
        lane = backend.lane(topic)
        assert list(claim(lane)) == []
        backend.clock.step(hours * 3600)
        backend.clock.advance(7200 - hours * 3600 - 5)
        early = drain(lane)
        backend.clock.advance(6)
        in_time = drain(lane)
        backend.clock.advance(3600)
        late = drain(lane)
        assert [*early, *in_time, *late] == ["later"]
        backend.judge("due-by-elapsed-time", deviates=in_time != ["later"])

    def test_every_subscription_waits_for_itself(self, backend: Backend) -> None:
        topic = backend.topic()
        one, two = backend.lane(topic, name="one"), backend.lane(topic, name="two")
        backend.publish(topic, "later", due_ms=backend.clock.wall_ms() + 5_000)
        assert drain(one) == []
        backend.clock.advance(6)
        assert drain(two) == ["later"]
        assert drain(one) == ["later"]


class NoDelays:
    """No due times: refused at publish, not delivered at once instead."""

    @pytest.mark.parametrize("in_s", [5, -60])
    def test_a_due_time_is_refused(self, backend: Backend, in_s: int) -> None:
        topic = backend.topic()
        due_ms = backend.clock.wall_ms() + in_s * 1000
        [outcome] = backend.broker.publish([backend.message(topic, "later", due_ms=due_ms)])
        assert isinstance(outcome, InvalidMessage)
        assert drain(backend.lane(topic)) == []

    def test_a_refused_due_time_leaves_its_neighbours_alone(self, backend: Backend) -> None:
        topic = backend.topic()
        due_ms = backend.clock.wall_ms() + 5_000
        batch = [
            backend.message(topic, "a"),
            backend.message(topic, "later", due_ms=due_ms),
            backend.message(topic, "b"),
        ]
        outcomes = backend.broker.publish(batch)
        assert [isinstance(outcome, InvalidMessage) for outcome in outcomes] == [False, True, False]
        assert drain(backend.lane(topic)) == ["a", "b"]

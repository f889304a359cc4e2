"""Kills: a worker's death that the broker notices before the lease is over."""

from __future__ import annotations

from duly.broker import Subscription
from duly.guarantees import Done
from duly.testing.conformance.backend import Backend, bodies, claim, settle_done


def kill(backend: Backend, lane: Subscription) -> None:
    """The worker that holds this lane dies."""
    assert backend.subject.kill is not None
    backend.subject.kill(backend.broker, lane)


class Kills:
    """What a dead worker held goes to the living at once, and is charged to whom it may be."""

    def test_a_killed_worker_makes_its_claims_suspect(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "a", "b")
        lane = backend.lane(topic)
        held = claim(lane)
        kill(backend, lane)
        assert list(claim(lane)) == [], "the dead claim nothing"
        other = backend.lane(topic)
        assert list(other.settle([Done(d.receipt) for d in held])) == [d.receipt for d in held]
        for body in "ab":
            [delivery] = claim(other)
            assert (bodies([delivery]), delivery.attempt, delivery.alone) == ([body], 1, True)
            settle_done(other, [delivery])

    def test_deaths_alone_add_up(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "poison", "mate")
        for attempt in [0, 1, 2, 3, 4]:
            lane = backend.lane(topic)
            deliveries = claim(lane)
            if attempt:
                assert [(*bodies([d]), d.attempt) for d in deliveries] == [("poison", attempt)]
            kill(backend, lane)

    def test_asked_for_one_a_death_is_charged_at_once(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "poison")
        lane = backend.lane(topic)
        assert claim(lane, limit=1)[0].attempt == 1
        kill(backend, lane)
        assert claim(backend.lane(topic))[0].attempt == 2

    def test_a_death_leaves_other_workers_alone(self, backend: Backend) -> None:
        topic, other = backend.topic(), backend.topic("other")
        backend.publish(topic, "a")
        backend.publish(other, "b")
        living, dying = backend.lane(topic, name="living"), backend.lane(other, name="dying")
        held = claim(living)
        claim(dying)
        kill(backend, dying)
        assert list(claim(living)) == []
        settle_done(living, held)

"""Leases: how long a claim holds, and what happens when it does not."""

from __future__ import annotations

import pytest

from duly.guarantees import Done, Retry
from duly.testing.conformance.backend import LEASE_S, Backend, bodies, claim, drain, settle_done


class Leases:
    """How long a claim holds, and what happens when it does not."""

    def test_a_claim_holds_for_its_lease(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "a")
        lane = backend.lane(topic)
        held = claim(lane)
        backend.clock.advance(LEASE_S - 1)
        assert list(claim(lane)) == []
        settle_done(lane, held)

    def test_a_lease_that_ended_gives_the_message_to_another(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "a")
        silent = backend.lane(topic)
        [before] = claim(silent)
        other = backend.lane(topic)
        backend.fall_silent()
        [after] = claim(other) or claim(other)
        assert after.message.id == before.message.id
        assert after.repeated
        assert list(silent.settle([Done(before.receipt)])) == [before.receipt]
        assert list(other.settle([Done(after.receipt)])) == []

    @pytest.mark.parametrize("bodies_only", [False, True])
    def test_what_another_has_settled_since_can_still_be_named(
        self, backend: Backend, bodies_only: bool
    ) -> None:
        """A worker that lost its claim has yet to say of which message it lost it."""
        topic = backend.topic()
        backend.publish(topic, "a")
        silent = backend.lane(topic, bodies_only=bodies_only)
        [before] = claim(silent)
        other = backend.lane(topic)
        backend.fall_silent()
        settle_done(other, claim(other) or claim(other))
        assert isinstance(before.message_id, str)
        assert list(silent.settle([Retry(before.receipt, 0.0, "e")])) == [before.receipt]

    def test_a_late_settlement_counts_while_nobody_took_over(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "a")
        lane = backend.lane(topic)
        held = claim(lane)
        backend.fall_silent()
        settle_done(lane, held)
        assert list(claim(lane)) == []

    def test_extending_holds_the_claim(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "a", "b")
        lane = backend.lane(topic)
        held = claim(lane)
        for _ in range(4):
            backend.clock.advance(LEASE_S - 1)
            assert list(lane.extend([d.receipt for d in held], LEASE_S)) == []
            assert list(claim(lane)) == []
        settle_done(lane, held)

    def test_extending_counts_from_now(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "a")
        lane = backend.lane(topic)
        [held] = claim(lane)
        lane.extend([held.receipt], 5.0)
        backend.clock.advance(6)
        [again] = claim(lane)
        assert again.message.id == held.message.id

    def test_extending_holds_what_is_named_and_no_more(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "a", "b", "c")
        lane = backend.lane(topic)
        _, b, c = claim(lane)
        backend.clock.advance(LEASE_S - 1)
        assert list(lane.extend([b.receipt, c.receipt], LEASE_S)) == []
        backend.clock.advance(2)
        [again] = claim(lane)
        assert bodies([again]) == ["a"]
        refused = list(lane.settle([Done(b.receipt), Done(c.receipt)]))
        assert refused in ([], [b.receipt, c.receipt])
        backend.judge("lane-lost-together", deviates=bool(refused))

    def test_another_lane_that_joins_takes_nothing_away(self, backend: Backend) -> None:
        topic = backend.topic(partitions=4)
        for number in range(40):
            backend.publish(topic, str(number), key=str(number))
        one = backend.lane(topic)
        held = claim(one)
        two = backend.lane(topic)
        lost = list(one.extend([delivery.receipt for delivery in held], LEASE_S))
        moved = claim(two)
        assert not {d.message.id for d in moved} & {
            d.message.id for d in held if d.receipt not in lost
        }, "two hold one message"
        settle_done(one, [delivery for delivery in held if delivery.receipt not in lost])
        backend.judge("moves-on-join", deviates=bool(lost))

    @pytest.mark.parametrize("hours", [1, -1])
    def test_a_step_of_the_wall_clock_ends_no_lease(self, backend: Backend, hours: int) -> None:
        topic = backend.topic()
        backend.publish(topic, "a", "b")
        lane = backend.lane(topic)
        held = claim(lane)
        backend.clock.step(hours * 3600)
        assert list(claim(lane)) == []
        backend.clock.advance(LEASE_S - 1)
        assert list(claim(lane)) == []
        settle_done(lane, held[:1])
        backend.clock.advance(2)
        [again] = claim(lane)
        assert bodies([again]) == ["b"], "nor makes it longer"

    @pytest.mark.parametrize("hours", [1, -1])
    def test_a_retry_waits_as_long_over_a_step_of_the_wall_clock(
        self, backend: Backend, hours: int
    ) -> None:
        topic = backend.topic()
        backend.publish(topic, "a")
        lane = backend.lane(topic)
        [held] = claim(lane)
        assert list(lane.settle([Retry(held.receipt, 10.0, "later")])) == []
        backend.clock.step(hours * 3600)
        backend.clock.advance(8)
        assert list(claim(lane)) == []
        backend.clock.advance(3)
        assert bodies(claim(lane)) == ["a"]

    @pytest.mark.parametrize("what", ["settle", "extend"])
    def test_a_paused_worker_is_refused_when_it_wakes(self, backend: Backend, what: str) -> None:
        """It was silent past its lease, its successor has claimed, and then it goes on."""
        topic = backend.topic()
        backend.publish(topic, "a")
        paused = backend.lane(topic)
        [before] = claim(paused)
        successor = backend.lane(topic)
        backend.fall_silent()
        [after] = claim(successor) or claim(successor)
        if what == "extend":
            assert list(paused.extend([before.receipt], LEASE_S)) == [before.receipt]
        else:
            assert list(paused.settle([Done(before.receipt)])) == [before.receipt]
        backend.clock.advance(LEASE_S - 1)
        assert list(claim(paused)) == [], "its call changed nothing for its successor"
        settle_done(successor, [after])

    def test_extending_tells_what_is_lost(self, backend: Backend) -> None:
        topic = backend.topic()
        lane = backend.lane(topic)
        backend.publish(topic, "a")
        [lost] = claim(lane)
        backend.fall_silent()
        [held] = claim(lane)
        assert list(lane.extend([lost.receipt, held.receipt], LEASE_S)) == [lost.receipt]
        settle_done(lane, [held])
        assert list(lane.extend([held.receipt], LEASE_S)) == [held.receipt]

    def test_closing_gives_everything_back_uncharged(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, *"abc")
        lane = backend.lane(topic)
        claim(lane)
        lane.close()
        deliveries = claim(backend.lane(topic))
        assert bodies(deliveries) == ["a", "b", "c"]
        assert [(d.attempt, d.alone) for d in deliveries] == [(1, False)] * 3

    def test_a_closed_lane_claims_nothing_and_settles_nothing(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "a")
        lane = backend.lane(topic)
        [held] = claim(lane)
        lane.close()
        lane.close()
        assert list(claim(lane)) == []
        other = backend.lane(topic)
        assert list(other.settle([Done(held.receipt)])) == [held.receipt]
        assert drain(other) == ["a"]

    def test_closing_a_lane_leaves_the_others_alone(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "a")
        one = backend.lane(topic)
        held = claim(one)
        two = backend.lane(topic, name="another subscription".replace(" ", "-"))
        two.close()
        settle_done(one, held)

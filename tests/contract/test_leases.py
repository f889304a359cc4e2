"""Leases: how long a claim holds, and what happens when it does not."""

from __future__ import annotations

from duly.guarantees import Done
from tests.contract.backends import LEASE_S, Backend, bodies, claim, drain, settle_done


def test_a_claim_holds_for_its_lease(backend: Backend):
    topic = backend.topic()
    backend.publish(topic, "a")
    lane = backend.lane(topic)
    held = claim(lane)
    backend.clock.advance(LEASE_S - 1)
    assert list(claim(lane)) == []
    settle_done(lane, held)


def test_a_lease_that_ended_gives_the_message_to_another(backend: Backend):
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


def test_a_late_settlement_counts_while_nobody_took_over(backend: Backend):
    topic = backend.topic()
    backend.publish(topic, "a")
    lane = backend.lane(topic)
    held = claim(lane)
    backend.fall_silent()
    settle_done(lane, held)
    assert list(claim(lane)) == []


def test_extending_holds_the_claim(backend: Backend):
    topic = backend.topic()
    backend.publish(topic, "a", "b")
    lane = backend.lane(topic)
    held = claim(lane)
    for _ in range(4):
        backend.clock.advance(LEASE_S - 1)
        assert list(lane.extend([d.receipt for d in held], LEASE_S)) == []
        assert list(claim(lane)) == []
    settle_done(lane, held)


def test_extending_counts_from_now(backend: Backend):
    topic = backend.topic()
    backend.publish(topic, "a")
    lane = backend.lane(topic)
    [held] = claim(lane)
    lane.extend([held.receipt], 5.0)
    backend.clock.advance(6)
    [again] = claim(lane)
    assert again.message.id == held.message.id


def test_extending_holds_what_is_named_and_no_more(backend: Backend):
    topic = backend.topic()
    backend.publish(topic, "a", "b", "c")
    lane = backend.lane(topic)
    _, b, c = claim(lane)
    backend.clock.advance(LEASE_S - 1)
    assert list(lane.extend([b.receipt, c.receipt], LEASE_S)) == []
    backend.clock.advance(2)
    [again] = claim(lane)
    assert bodies([again]) == ["a"]
    if not backend.can.is_log:
        settle_done(lane, [b, c])
        return
    # A log takes the whole lane for dead: its partitions change hands.
    assert list(lane.settle([Done(b.receipt), Done(c.receipt)])) == [b.receipt, c.receipt]


def test_extending_tells_what_is_lost(backend: Backend):
    topic = backend.topic()
    lane = backend.lane(topic)
    backend.publish(topic, "a")
    [lost] = claim(lane)
    backend.fall_silent()
    [held] = claim(lane)
    assert list(lane.extend([lost.receipt, held.receipt], LEASE_S)) == [lost.receipt]
    settle_done(lane, [held])
    assert list(lane.extend([held.receipt], LEASE_S)) == [held.receipt]


def test_closing_gives_everything_back_uncharged(backend: Backend):
    topic = backend.topic()
    backend.publish(topic, *"abc")
    lane = backend.lane(topic)
    claim(lane)
    lane.close()
    deliveries = claim(backend.lane(topic))
    assert bodies(deliveries) == ["a", "b", "c"]
    assert [(d.attempt, d.alone) for d in deliveries] == [(1, False)] * 3


def test_a_closed_lane_claims_nothing_and_settles_nothing(backend: Backend):
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


def test_closing_a_lane_leaves_the_others_alone(backend: Backend):
    topic = backend.topic()
    backend.publish(topic, "a")
    one = backend.lane(topic)
    held = claim(one)
    two = backend.lane(topic, name="another subscription".replace(" ", "-"))
    two.close()
    settle_done(one, held)

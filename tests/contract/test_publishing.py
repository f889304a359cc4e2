"""Publishing: what the outcomes say is what is there."""

from __future__ import annotations

import pytest

from duly.broker import Published, RepeatDropped
from duly.errors import ConfigurationError, IdentityConflict, InvalidMessage, PublishFailed
from duly.guarantees import Done
from duly.message import Topic
from tests.contract.backends import Backend, bodies, claim, drain, settle_done


def test_what_is_published_is_delivered_unchanged(backend: Backend):
    topic = backend.topic()
    headers = {"traceparent": "00-ab-cd-01", "tenant": "blue"}
    [sent] = backend.publish(topic, "grüße", key="k", headers=headers, id="the id")
    [delivery] = claim(backend.lane(topic))
    got = delivery.message
    assert (got.topic, got.source, got.id, got.body) == (
        sent.topic,
        sent.source,
        "the id",
        sent.body,
    )
    assert (got.key, dict(got.headers), got.time_ms) == ("k", headers, sent.time_ms)


def test_outcomes_come_in_the_order_of_the_messages(backend: Backend):
    topic, unknown = backend.topic(), Topic("nowhere", str, guarantee="at-least-once")
    first, lost, last = (
        backend.message(topic, "first"),
        backend.message(unknown, "lost"),
        backend.message(topic, "last"),
    )
    outcomes = backend.broker.publish([first, lost, last])
    assert [type(outcome) for outcome in outcomes] == [Published, PublishFailed, Published]
    failed = outcomes[1]
    assert isinstance(failed, PublishFailed)
    assert failed.message_id == lost.id
    assert drain(backend.lane(topic)) == ["first", "last"]


def test_publishing_nothing_is_harmless(backend: Backend):
    assert list(backend.broker.publish([])) == []


def test_messages_of_a_topic_stay_in_order(backend: Backend):
    topic, other = backend.topic(), backend.topic("other")
    for number in range(0, 40, 4):
        batch = [backend.message(topic, str(n)) for n in range(number, number + 4)]
        batch.insert(2, backend.message(other, "between"))
        backend.broker.publish(batch)
    assert drain(backend.lane(topic), limit=7) == [str(n) for n in range(40)]


def test_a_repeat_on_an_exactly_once_topic_is_dropped(backend: Backend):
    topic = backend.topic(guarantee="exactly-once")
    lane = backend.lane(topic)
    backend.publish(topic, "a", id="one")
    [repeat] = backend.broker.publish([backend.message(topic, "a", id="one")])
    if backend.can.identity_retention:
        assert repeat == RepeatDropped("one")
        assert drain(lane) == ["a"]
    else:
        assert repeat == Published("one")
        assert drain(lane) == ["a", "a"]


def test_a_repeat_within_one_call_is_dropped(backend: Backend):
    topic = backend.topic(guarantee="exactly-once")
    twice = [backend.message(topic, "a", id="one") for _ in range(2)]
    outcomes = [type(outcome) for outcome in backend.broker.publish(twice)]
    drops = backend.can.identity_retention
    assert outcomes == [Published, RepeatDropped if drops else Published]
    assert len(drain(backend.lane(topic))) == (1 if drops else 2)


def test_one_id_with_another_body_is_a_conflict(backend: Backend):
    topic = backend.topic(guarantee="exactly-once")
    backend.publish(topic, "a", id="one")
    [outcome] = backend.broker.publish([backend.message(topic, "b", id="one")])
    if not backend.can.identity_retention:
        assert outcome == Published("one"), "no memory of ids: a store's inbox finds the conflict"
        return
    assert isinstance(outcome, IdentityConflict)
    assert outcome.message_id == "one"
    assert drain(backend.lane(topic)) == ["a"]


def test_a_conflict_leaves_its_neighbours_alone(backend: Backend):
    topic = backend.topic(guarantee="exactly-once")
    backend.publish(topic, "a", id="one")
    batch = [("b", "two"), ("x", "one"), ("c", "three"), ("a", "one")]
    outcomes = backend.broker.publish([backend.message(topic, b, id=i) for b, i in batch])
    kinds = [type(outcome) for outcome in outcomes]
    if not backend.can.identity_retention:
        assert kinds == [Published] * 4
        return
    assert kinds == [Published, IdentityConflict, Published, RepeatDropped]
    assert drain(backend.lane(topic)) == ["a", "b", "c"]


def test_identity_is_topic_source_and_id(backend: Backend):
    topic, other = backend.topic(guarantee="exactly-once"), backend.topic("o", "exactly-once")
    backend.publish(topic, "a", id="one")
    elsewhere = backend.message(other, "b", id="one")
    of_another = topic.message("c", source="another", id="one")
    outcomes = backend.broker.publish([elsewhere, of_another])
    assert [type(outcome) for outcome in outcomes] == [Published, Published]


def test_an_id_is_forgotten_after_its_retention(backend: Backend):
    topic = backend.topic(guarantee="exactly-once", identity_retention_s=60.0)
    lane = backend.lane(topic)
    backend.publish(topic, "a", id="one")
    settle_done(lane, claim(lane))
    backend.clock.advance(50)
    [within] = backend.broker.publish([backend.message(topic, "a", id="one")])
    expected = RepeatDropped if backend.can.identity_retention else Published
    assert isinstance(within, expected)


def test_other_topics_do_not_remember_ids(backend: Backend):
    topic = backend.topic(guarantee="at-least-once")
    backend.publish(topic, "a", "b", id="one")
    assert drain(backend.lane(topic)) == ["a", "b"]


def test_a_due_time_is_kept_or_refused(backend: Backend):
    topic = backend.topic()
    due_ms = backend.clock.wall_ms() + 5_000
    [outcome] = backend.broker.publish([backend.message(topic, "later", due_ms=due_ms)])
    if not backend.can.delays:
        assert isinstance(outcome, InvalidMessage)
        assert drain(backend.lane(topic)) == []
        return
    lane = backend.lane(topic)
    backend.publish(topic, "now")
    assert drain(lane) == ["now"]
    backend.clock.advance(4.5)
    assert drain(lane) == []
    backend.clock.advance(1)
    assert drain(lane) == ["later"]


def test_a_due_time_in_the_past_is_now(backend: Backend):
    topic = backend.topic()
    late = backend.message(topic, "late", due_ms=backend.clock.wall_ms() - 60_000)
    [outcome] = backend.broker.publish([late])
    if not backend.can.delays:
        assert isinstance(outcome, InvalidMessage)
        return
    assert drain(backend.lane(topic)) == ["late"]


def test_declaring_again_is_harmless(backend: Backend):
    topic = backend.topic(partitions=4)
    backend.publish(topic, "a")
    backend.broker.declare(
        [Topic(topic.name, str, guarantee="at-least-once", partitions=topic.partitions)]
    )
    assert drain(backend.lane(topic)) == ["a"]


def test_partitions_are_fixed(backend: Backend):
    backend.topic("t")
    with pytest.raises(ConfigurationError, match="partitions"):
        backend.broker.declare([Topic("t", str, guarantee="at-least-once", partitions=3)])


def test_a_refused_declaration_declares_nothing(backend: Backend):
    backend.topic("t")
    new = Topic("new", str, guarantee="at-least-once")
    with pytest.raises(ConfigurationError):
        backend.broker.declare([new, Topic("t", str, guarantee="at-least-once", partitions=3)])
    [outcome] = backend.broker.publish([backend.message(new, "a")])
    assert isinstance(outcome, PublishFailed)


def test_publishing_while_a_claim_is_open(backend: Backend):
    topic = backend.topic()
    lane = backend.lane(topic)
    backend.publish(topic, "a")
    held = claim(lane)
    backend.publish(topic, "b")
    assert bodies(held) == ["a"]
    assert list(lane.settle([Done(held[0].receipt)])) == []
    assert drain(lane) == ["b"]

"""Publishing: what the outcomes say is what is there."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from duly.broker import Published
from duly.errors import ConfigurationError, PublishFailed
from duly.guarantees import Done
from duly.message import Topic
from duly.testing.conformance.backend import Backend, bodies, claim, drain, kinds


class Publishing:
    """What the outcomes say is what is there."""

    def test_what_is_published_is_delivered_unchanged(self, backend: Backend) -> None:
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

    def test_outcomes_come_in_the_order_of_the_messages(self, backend: Backend) -> None:
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

    def test_publishing_nothing_is_harmless(self, backend: Backend) -> None:
        assert list(backend.broker.publish([])) == []

    def test_messages_of_a_topic_stay_in_order(self, backend: Backend) -> None:
        topic, other = backend.topic(), backend.topic("other")
        for number in range(0, 40, 4):
            batch = [backend.message(topic, str(n)) for n in range(number, number + 4)]
            batch.insert(2, backend.message(other, "between"))
            backend.broker.publish(batch)
        assert drain(backend.lane(topic), limit=7) == [str(n) for n in range(40)]

    def test_what_names_an_event_is_its_id(self, backend: Backend) -> None:
        topic = backend.topic(dedup_by=lambda body: body.split()[0])
        backend.publish(topic, "o-1 ordered", "o-2 ordered")
        backend.publish(topic, "o-3 ordered", id="given")
        got = claim(backend.lane(topic))
        assert [delivery.message_id for delivery in got] == ["o-1", "o-2", "given"]

    def test_other_topics_do_not_remember_ids(self, backend: Backend) -> None:
        topic = backend.topic(guarantee="at-least-once")
        backend.publish(topic, "a", "b", id="one")
        assert drain(backend.lane(topic)) == ["a", "b"]

    def test_publishing_while_a_claim_is_open(self, backend: Backend) -> None:
        topic = backend.topic()
        lane = backend.lane(topic)
        backend.publish(topic, "a")
        held = claim(lane)
        backend.publish(topic, "b")
        assert bodies(held) == ["a"]
        assert list(lane.settle([Done(held[0].receipt)])) == []
        assert drain(lane) == ["b"]

    def test_declaring_again_is_harmless(self, backend: Backend) -> None:
        topic = backend.topic(partitions=4)
        backend.publish(topic, "a")
        backend.broker.declare(
            [Topic(topic.name, str, guarantee="at-least-once", partitions=topic.partitions)]
        )
        assert drain(backend.lane(topic)) == ["a"]

    def test_partitions_are_fixed(self, backend: Backend) -> None:
        backend.topic("t")
        with pytest.raises(ConfigurationError, match="partitions"):
            backend.broker.declare([Topic("t", str, guarantee="at-least-once", partitions=3)])

    def test_a_refused_declaration_declares_nothing(self, backend: Backend) -> None:
        backend.topic("t")
        new = Topic("new", str, guarantee="at-least-once")
        with pytest.raises(ConfigurationError):
            backend.broker.declare([new, Topic("t", str, guarantee="at-least-once", partitions=3)])
        [outcome] = backend.broker.publish([backend.message(new, "a")])
        assert isinstance(outcome, PublishFailed)

    def test_a_thousand_at_once(self, backend: Backend) -> None:
        topic = backend.topic()
        sent = [str(number) for number in range(1000)]
        backend.publish(topic, *sent)
        assert drain(backend.lane(topic), limit=300) == sent

    def test_bytes_are_not_looked_at(self, backend: Backend) -> None:
        """What cannot be decoded is somebody else's to judge, and has to arrive for that."""
        topic = backend.topic()
        wild = [b"", b"\x00", b"\xff\xfe not text", b"'; drop table messages; --", b"null"]
        messages = [
            replace(backend.message(topic, str(number)), body=body)
            for number, body in enumerate(wild)
        ]
        assert kinds(backend.broker.publish(messages)) == ["Published"] * len(wild)
        assert [delivery.message.body for delivery in claim(backend.lane(topic))] == wild

    def test_a_message_is_delivered_as_its_topics(self, backend: Backend) -> None:
        topics = [backend.topic(name, read_by=("sub", "only-two")) for name in ("one", "two")]
        for topic in topics:
            backend.publish(topic, topic.name)
        for delivery in claim(backend.lane(*topics)):
            assert delivery.message.topic == delivery.message.body.decode()
        lane = backend.lane(topics[1], name="only-two")
        assert drain(lane) == ["two"]

    def test_the_whole_message_can_be_had_where_only_bodies_were_asked_for(
        self, backend: Backend
    ) -> None:
        topic = backend.topic()
        sent = backend.publish(topic, "a", "b", "c", key="k", headers={"tenant": "blue"})
        got = list(claim(backend.lane(topic, bodies_only=True)))
        assert [delivery.message_id for delivery in got] == [message.id for message in sent]
        assert [delivery.carried.body for delivery in got] == [b"a", b"b", b"c"]
        assert [delivery.message.id for delivery in got] == [message.id for message in sent]
        assert {(d.message.key, d.message.headers["tenant"]) for d in got} == {("k", "blue")}

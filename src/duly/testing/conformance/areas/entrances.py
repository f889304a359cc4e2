"""The entrance of an outbox (`PublishesOnce`): a batch and its note together, by one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from duly.broker import Entrance, Published, PublishesOnce
from duly.errors import (
    BrokerUnavailable,
    CommitUnknown,
    PublishFailed,
    Superseded,
    TransactionFailed,
)
from duly.message import Topic
from duly.testing.conformance.backend import Backend, arriving, kinds


def entrance_of(backend: Backend, outbox: str = "an outbox/1") -> Entrance:
    """The entrance of this outbox."""
    assert isinstance(backend.broker, PublishesOnce)
    return backend.broker.entrance(outbox)


def bring(backend: Backend, entrance: Entrance, topic: Topic[Any], *texts: str) -> None:
    """Publish these; the note says what they are."""
    messages = [backend.message(topic, text) for text in texts]
    outcomes = entrance.publish(messages, lambda at: noted([texts[place] for place in at]))
    assert outcomes == [Published(message.id) for message in messages]


def noted(texts: Sequence[str]) -> bytes:
    """A note of these."""
    return ",".join(texts).encode()


class Entrances:
    """What is brought from an outbox is stored with its note, by whoever resumed last."""

    def test_a_batch_is_there_with_its_note(self, backend: Backend) -> None:
        topic = backend.topic()
        lane = backend.lane(topic)
        entrance = entrance_of(backend)
        assert entrance.resume() is None
        bring(backend, entrance, topic, "a", "b")
        bring(backend, entrance, topic, "c")
        assert sorted(arriving(lane, 3)) == ["a", "b", "c"]
        assert entrance.resume() == b"c"
        entrance.close()
        assert entrance_of(backend).resume() == b"c"

    def test_whoever_resumes_fences_off_the_other(self, backend: Backend) -> None:
        topic = backend.topic()
        lane = backend.lane(topic)
        one, two = entrance_of(backend), entrance_of(backend)
        one.resume()
        bring(backend, one, topic, "a")
        assert two.resume() == b"a"
        with pytest.raises((Superseded, CommitUnknown)):
            bring(backend, one, topic, "never")
        bring(backend, two, topic, "b")
        assert one.resume() == b"b"
        bring(backend, one, topic, "c")
        assert sorted(arriving(lane, 3)) == ["a", "b", "c"]

    def test_outboxes_have_entrances_of_their_own(self, backend: Backend) -> None:
        topic = backend.topic()
        one, two = entrance_of(backend, "one"), entrance_of(backend, "two")
        assert one.resume() is None
        bring(backend, one, topic, "a")
        assert two.resume() is None
        bring(backend, two, topic, "b")
        bring(backend, one, topic, "c")
        assert (one.resume(), two.resume()) == (b"c", b"b")

    def test_nothing_is_published_before_it_resumed(self, backend: Backend) -> None:
        topic = backend.topic()
        with pytest.raises(BrokerUnavailable, match="resume first"):
            bring(backend, entrance_of(backend), topic, "a")

    def test_what_is_refused_is_in_no_note(self, backend: Backend) -> None:
        topic = backend.topic()
        lane = backend.lane(topic)
        unknown: Topic[str] = Topic("nobody-has-declared-it", str, guarantee="at-least-once")
        messages = [backend.message(unknown, "x"), backend.message(topic, "a")]
        entrance = entrance_of(backend)
        entrance.resume()
        outcomes = entrance.publish(messages[:1], lambda _: b"never")
        assert kinds(outcomes) == [PublishFailed.__name__]
        assert entrance.resume() is None
        try:
            outcomes = entrance.publish(messages, lambda at: noted([str(place) for place in at]))
        except TransactionFailed:
            assert entrance.resume() is None
            bring(backend, entrance, topic, "a")
        else:
            assert kinds(outcomes) == [PublishFailed.__name__, Published.__name__]
            assert entrance.resume() == b"1"
        assert arriving(lane, 1) == ["a"]

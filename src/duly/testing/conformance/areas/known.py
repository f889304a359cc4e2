"""A broker that tells of what nobody declared to it (`Knows`), for who only looks."""

from __future__ import annotations

from typing import Any

import pytest

from duly.broker import Knows, SubscribeOptions
from duly.errors import ConfigurationError
from duly.guarantees import Guarantee
from duly.message import Topic
from duly.testing.conformance.backend import Backend, claim, kinds, settle_done

OPTIONS = SubscribeOptions(Guarantee.AT_LEAST_ONCE)


def knows(backend: Backend, topic: Topic[Any]) -> None:
    """Tell it that this topic and its subscription ``sub`` may be there."""
    assert isinstance(backend.broker, Knows)
    backend.broker.know([topic], "sub", OPTIONS)


class Known:
    """Who only looks changes nothing, and is told where what is there is something else."""

    def test_a_topic_that_is_known_is_not_made(self, backend: Backend) -> None:
        topic: Topic[Any] = Topic("t", str, guarantee="at-least-once")
        knows(backend, topic)
        outcomes = backend.broker.publish([backend.message(topic, "a")])
        assert kinds(outcomes) == ["PublishFailed"]
        # Of what was made, the guarantee would be fixed.
        backend.topic("t", "exactly-once")

    def test_a_subscription_that_is_known_is_not_made(self, backend: Backend) -> None:
        topic = backend.topic("t", read_by=())
        knows(backend, topic)
        backend.broker.publish([backend.message(topic, "a")])
        lane = backend.lane(topic, start="latest")
        backend.publish(topic, "b")
        held = claim(lane)
        assert [each.message.body for each in held] == [b"b"]
        settle_done(lane, held)

    def test_what_is_there_is_not_disturbed(self, backend: Backend) -> None:
        topic = backend.topic()
        lane = backend.lane(topic)
        backend.publish(topic, "a")
        held = claim(lane)
        knows(backend, topic)
        settle_done(lane, held)
        assert list(claim(lane)) == []

    def test_what_is_there_as_another_is_refused(self, backend: Backend) -> None:
        backend.topic("t", "exactly-once")
        with pytest.raises(ConfigurationError):
            knows(backend, Topic("t", str, guarantee="at-least-once"))

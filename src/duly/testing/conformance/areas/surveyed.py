"""What a broker's server is configured to do (`Surveys`)."""

from __future__ import annotations

from typing import Any

from duly.inspection.survey import Survey, Surveys
from duly.message import Topic
from duly.testing.conformance.backend import Backend, claim, settle_done


def survey_of(backend: Backend, topic: Topic[Any]) -> Survey:
    """What is found of the subscription ``sub`` of this topic."""
    assert isinstance(backend.broker, Surveys)
    return backend.broker.survey([topic], {"sub": [topic.name]})


class Surveyed:
    """A look at the server, on one that nobody has configured against anything."""

    def test_nothing_endangers_what_is_there(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.lane(topic)
        found = survey_of(backend, topic)
        assert list(found.perils) == []
        assert found.seen or found.unseen, "say what was looked at, or what was not"

    def test_looking_makes_nothing(self, backend: Backend) -> None:
        """A subscription that it was asked about begins when it is first made, and not before."""
        topic = backend.topic("t", read_by=())
        survey_of(backend, topic)
        outcomes = backend.broker.publish([backend.message(topic, "a")])
        lane = backend.lane(topic, start="latest")
        backend.publish(topic, "b")
        held = claim(lane)
        assert [each.message.body for each in held] == [b"b"], outcomes
        settle_done(lane, held)

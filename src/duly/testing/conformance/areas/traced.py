"""The life of one message, and following a topic, by brokers that can (`Tracing`, `Following`)."""

from __future__ import annotations

from typing import Any

import pytest

from duly.errors import ConfigurationError
from duly.guarantees import Dead, Done, Retry
from duly.inspection.tracing import Following, Tracing
from duly.testing.conformance.backend import SOURCE, Backend, claim


class Traced:
    """What is kept of a message is told as it is."""

    def test_where_it_stands_for_everybody(self, backend: Backend) -> None:
        assert isinstance(backend.broker, Tracing)
        topic = backend.topic()
        names = ("claimed", "dead", "done", "parked", "waiting")
        lanes = {name: backend.lane(topic, name=name) for name in names}
        [message] = backend.publish(topic, "a")
        ends: dict[str, Any] = {
            "dead": lambda receipt: Dead(receipt, "ValueError: no"),
            "done": Done,
            "parked": lambda receipt: Retry(receipt, 60.0, "KeyError: x"),
        }
        for name in names[:4]:
            [delivery] = claim(lanes[name])
            if name in ends:
                lanes[name].settle([ends[name](delivery.receipt)])
        [trace] = backend.broker.trace(message.id, SOURCE)
        assert trace.message is not None
        assert trace.message.body == b"a"
        assert [(s.subscription, s.state) for s in trace.standings] == [(n, n) for n in names]
        errors = {s.subscription: s.error for s in trace.standings}
        assert (errors["dead"], errors["parked"]) == ("ValueError: no", "KeyError: x")
        assert sorted(i.kind for i in trace.incidents) == ["dead-letter", "retry"]

    def test_nobody_elses(self, backend: Backend) -> None:
        assert isinstance(backend.broker, Tracing)
        topic = backend.topic()
        backend.publish(topic, "a", id="it")
        assert list(backend.broker.trace("it", "another")) == []
        assert list(backend.broker.trace("it", SOURCE, "another")) == []
        assert list(backend.broker.trace("' or 1=1 --", SOURCE)) == []

    def test_what_was_published_because_of_it(self, backend: Backend) -> None:
        assert isinstance(backend.broker, Tracing)
        topic = backend.topic()
        [cause] = backend.publish(topic, "a")
        backend.publish(topic, "b", headers=cause.causation)
        backend.publish(topic, "c", headers={"tenant": "t"})
        found = backend.broker.caused_by(cause.idempotency_key, 10)
        assert [logged.message.body for logged in found] == [b"b"]

    def test_following_takes_no_part(self, backend: Backend) -> None:
        assert isinstance(backend.broker, Following)
        topic = backend.topic()
        backend.publish(topic, *"abc")
        broker = backend.broker
        earliest, latest = broker.mark(topic.name, "earliest"), broker.mark(topic.name, "latest")
        backend.publish(topic, "d")
        seen: list[bytes] = []
        while (followed := broker.follow(topic.name, earliest, 2)).messages:
            seen += [logged.message.body for logged in followed.messages]
            earliest = followed.mark
            assert followed.missed == 0
            assert len(seen) < 10, "it begins again"
        assert seen == [b"a", b"b", b"c", b"d"]
        after = broker.follow(topic.name, latest, 10)
        assert [logged.message.body for logged in after.messages] == [b"d"]
        assert list(backend.inside.subscriptions()) == []
        with pytest.raises(ConfigurationError):
            broker.mark("another", "latest")

"""Limits: what a message may be, at its largest and longest, and what is refused beyond."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from duly.errors import ConfigurationError, MessageTooLarge
from duly.message import (
    MAX_HEADER_BYTES,
    MAX_HEADERS,
    MAX_ID_CHARS,
    MAX_KEY_CHARS,
    MAX_NAME_CHARS,
    Topic,
)
from duly.testing.conformance.backend import Backend, bodies, claim, drain, kinds, settle_done

# Bodies that are really sent are no larger: what is beyond costs a test seconds.
LARGE = 4 * 1024 * 1024


class Limits:
    """What is over a limit is refused before it is stored, and what is within arrives whole."""

    def test_a_body_over_the_limit_is_refused(self, backend: Backend) -> None:
        topic = backend.topic()
        ordinary = backend.message(topic, "before")
        # Zeros that nobody has written take no memory, however many.
        huge = replace(ordinary, id="huge", body=bytes(backend.can.max_message_bytes + 1))
        [outcome] = backend.broker.publish([huge])
        assert isinstance(outcome, MessageTooLarge)
        assert outcome.message_id == "huge"
        assert f"{backend.can.max_message_bytes:,}" in str(outcome), "it says the limit"
        after = replace(ordinary, id="after", body=b"after")
        outcomes = backend.broker.publish([ordinary, huge, after])
        assert kinds(outcomes) == ["Published", "MessageTooLarge", "Published"]
        assert drain(backend.lane(topic)) == ["before", "after"]

    def test_a_large_body_arrives_whole(self, backend: Backend) -> None:
        topic = backend.topic()
        body = bytes(range(256)) * (min(LARGE, backend.can.max_message_bytes) // 256)
        large = replace(backend.message(topic, "x"), body=body)
        assert kinds(backend.broker.publish([large])) == ["Published"]
        [delivery] = claim(backend.lane(topic))
        assert delivery.message.body == body

    def test_an_empty_body_is_one(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "", "a")
        assert drain(backend.lane(topic)) == ["", "a"]

    @pytest.mark.parametrize("character", ["x", "ü", "\N{DUCK}"])
    def test_the_longest_id_and_key_arrive_whole(self, backend: Backend, character: str) -> None:
        topic = backend.topic(guarantee="exactly-once")
        id, key = character * MAX_ID_CHARS, character * MAX_KEY_CHARS
        backend.publish(topic, "a", id=id, key=key)
        [delivery] = claim(backend.lane(topic))
        assert (delivery.message.id, delivery.message.key) == (id, key)

    def test_ids_that_look_alike_are_not_one(self, backend: Backend) -> None:
        topic = backend.topic(guarantee="exactly-once")
        ids = ["a", "A", "a ", " a", "ä", "a\N{COMBINING DIAERESIS}", "1", "01", "1.0", "a%20"]
        for id in ids:
            backend.publish(topic, id, id=id)
        assert drain(backend.lane(topic)) == ids

    def test_as_many_headers_as_there_may_be(self, backend: Backend) -> None:
        topic = backend.topic()
        each = MAX_HEADER_BYTES // MAX_HEADERS - 4
        headers = {f"h{number:03}": "v" * each for number in range(MAX_HEADERS)}
        backend.publish(topic, "a", headers=headers)
        [delivery] = claim(backend.lane(topic))
        assert dict(delivery.message.headers) == headers

    def test_header_values_are_any_text(self, backend: Backend) -> None:
        topic = backend.topic()
        headers = {"a": "", "b": "grüße \N{DUCK}", "c": '"quoted", {json: 1}; a=b', "d": " x "}
        backend.publish(topic, "a", headers=headers)
        [delivery] = claim(backend.lane(topic))
        assert dict(delivery.message.headers) == headers

    def test_the_longest_names(self, backend: Backend) -> None:
        names = [("t" * (MAX_NAME_CHARS - 1)) + end for end in "ab"]
        topics: list[Topic[Any]] = [backend.topic(name, read_by=(name,)) for name in names]
        for topic in topics:
            backend.publish(topic, topic.name[-1])
        for topic in topics:
            lane = backend.lane(topic, name=topic.name)
            deliveries = claim(lane)
            assert bodies(deliveries) == [topic.name[-1]]
            settle_done(lane, deliveries)

    def test_names_that_look_alike_are_not_one(self, backend: Backend) -> None:
        """Where a server cannot tell two apart, the second is refused."""
        names = ["orders", "orders.eu", "orders_eu", "orders-eu", "Orders"]
        topics: list[Topic[Any]] = []
        refused = []
        for name in names:
            try:
                topics.append(backend.topic(name))
            except ConfigurationError:
                refused.append(name)
        assert refused in ([], ["orders_eu"])
        lanes = [backend.lane(topic, name=f"{topic.name}-reader") for topic in topics]
        for topic in topics:
            backend.publish(topic, topic.name)
        assert [drain(lane) for lane in lanes] == [[topic.name] for topic in topics]

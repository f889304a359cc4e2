"""Schedules: a tick's messages and the memory of it, by brokers that keep both (`Ticking`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from duly.errors import DulyError, PublishFailed
from duly.message import Message
from duly.schedules import Ticking
from duly.testing.conformance.backend import Backend, drain, kinds

BEGAN, FIRST, SECOND = 1_000_000, 1_060_000, 1_120_000


def begun(backend: Backend, name: str = "app/poll") -> Ticking:
    """The broker as schedules use it, with one that has begun."""
    assert isinstance(backend.broker, Ticking)
    assert backend.broker.reached(name, BEGAN) == BEGAN
    return backend.broker


class Ticked:
    """A tick's messages are stored with the memory of it, once, both or neither."""

    def test_a_schedule_begins_once(self, backend: Backend) -> None:
        broker = begun(backend)
        assert dict(broker.ticked()) == {"app/poll": BEGAN}
        assert broker.reached("app/poll", FIRST) == BEGAN
        assert broker.reached("app/other", SECOND) == SECOND
        assert broker.reached("app/poll", SECOND) == BEGAN
        assert dict(broker.ticked()) == {"app/poll": BEGAN, "app/other": SECOND}

    def test_a_tick_is_published_once(self, backend: Backend) -> None:
        topic = backend.topic()
        lane = backend.lane(topic)
        broker = begun(backend)
        messages = [backend.message(topic, body, id=body) for body in "ab"]
        outcomes = broker.tick("app/poll", BEGAN, FIRST, messages)
        assert outcomes is not None
        assert kinds(outcomes) == ["Published", "Published"]
        assert broker.tick("app/poll", BEGAN, FIRST, messages) is None
        assert broker.tick("app/poll", BEGAN, SECOND, messages) is None
        assert broker.reached("app/poll", SECOND) == FIRST
        assert sorted(drain(lane)) == ["a", "b"]

    def test_only_from_where_it_stands(self, backend: Backend) -> None:
        topic = backend.topic()
        lane = backend.lane(topic)
        broker = begun(backend)
        begun(backend, "app/other")
        messages = [backend.message(topic, "a")]
        assert broker.tick("app/poll", FIRST, SECOND, messages) is None
        assert broker.tick("app/never-begun", BEGAN, FIRST, messages) is None
        broker.tick("app/poll", BEGAN, FIRST, messages)
        assert broker.reached("app/other", SECOND) == BEGAN
        assert drain(lane) == ["a"]

    def test_of_many_one_publishes_a_tick(self, backend: Backend) -> None:
        topic = backend.topic()
        lane = backend.lane(topic)
        broker = begun(backend)
        message = backend.message(topic, "a", id="poll/1")
        with ThreadPoolExecutor(8) as pool:
            ticks = [
                pool.submit(broker.tick, "app/poll", BEGAN, FIRST, [message]) for _ in range(8)
            ]
            told = [tick.result(60) for tick in ticks]
        assert sum(outcomes is not None for outcomes in told) == 1
        assert drain(lane) == ["a"]

    def test_what_is_refused_moves_nothing(self, backend: Backend) -> None:
        topic = backend.topic()
        lane = backend.lane(topic)
        broker = begun(backend)
        stranger: Message[Any] = Message("never-declared", "conformance", "x", b"x", 0)
        with pytest.raises(PublishFailed):
            broker.tick("app/poll", BEGAN, FIRST, [backend.message(topic, "a"), stranger])
        assert broker.reached("app/poll", SECOND) == BEGAN
        assert drain(lane) == []
        assert broker.tick("app/poll", BEGAN, FIRST, [backend.message(topic, "b")]) is not None
        assert drain(lane) == ["b"]

    def test_an_id_that_is_taken_ends_the_tick(self, backend: Backend) -> None:
        """No other attempt could end otherwise: trying again for ever would stop the schedule."""
        topic = backend.topic(guarantee="exactly-once")
        backend.publish(topic, "a", id="one")
        broker = begun(backend)
        again = [backend.message(topic, "a", id="one"), backend.message(topic, "b", id="one")]
        outcomes = broker.tick("app/poll", BEGAN, FIRST, again)
        assert outcomes is not None
        dropped = ["RepeatDropped", "IdentityConflict"]
        assert kinds(outcomes) == (dropped if backend.can.identity_retention else ["Published"] * 2)
        assert broker.reached("app/poll", SECOND) == FIRST

    def test_a_closed_broker_ticks_nothing(self, backend: Backend) -> None:
        topic = backend.topic()
        broker = begun(backend)
        backend.broker.close()
        with pytest.raises(DulyError):
            broker.tick("app/poll", BEGAN, FIRST, [backend.message(topic, "a")])


class TickedDurably:
    """Both survive together."""

    @pytest.mark.parametrize("end", ["restart", "crash"])
    def test_a_tick_survives(self, backend: Backend, end: str) -> None:
        topic = backend.topic()
        backend.lane(topic)
        begun(backend).tick("app/poll", BEGAN, FIRST, [backend.message(topic, "a")])
        again: Callable[[], None] = getattr(backend, end)
        again()
        broker: Any = backend.broker
        assert broker.reached("app/poll", SECOND) == FIRST
        twice: Sequence[Message[Any]] = [backend.message(topic, "b")]
        assert broker.tick("app/poll", BEGAN, FIRST, twice) is None
        assert drain(backend.lane(topic)) == ["a"]

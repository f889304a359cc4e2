"""A person's messages removed from everywhere, by brokers that can (`Erasing`)."""

from __future__ import annotations

from typing import Any

import pytest

from duly.guarantees import Dead, Done, Release, Retry
from duly.inspection.erasing import Erasing, Whose
from duly.testing.conformance.backend import SOURCE, Backend, claim, drain, kinds


def erase(backend: Backend, **whose: Any) -> int:
    """Remove them; how many copies."""
    assert isinstance(backend.broker, Erasing)
    meant = Whose(**whose)
    erased = sum(backend.broker.erase(meant))
    assert backend.broker.holdings(meant) == 0
    assert sum(backend.broker.erase(meant)) == 0
    return erased


class Erased:
    """Nothing of them is kept or delivered, and nobody else's is touched."""

    def test_wherever_it_is(self, backend: Backend) -> None:
        topic = backend.topic()
        lane = backend.lane(topic)
        backend.publish(topic, *"abc", key="ann")
        backend.publish(topic, "d", key="bob")
        first, second = [delivery.receipt for delivery in claim(lane, 2)]
        lane.settle([Dead(first, "KeyError: ann"), Retry(second, 0.0, "KeyError: ann")])
        assert erase(backend, key="ann") >= 3
        assert list(backend.inside.dead_letters()) == []
        assert not [i for i in backend.inside.incidents() if i.id or "ann" in i.detail]
        assert drain(lane) == ["d"]

    def test_of_one_source_only(self, backend: Backend) -> None:
        topic = backend.topic()
        lane = backend.lane(topic)
        backend.publish(topic, "a", id="it")
        assert erase(backend, id="it", source="another") == 0
        assert erase(backend, id="it", source=SOURCE, topic="another") == 0
        assert erase(backend, key="' or 1=1 --") == 0
        assert drain(lane) == ["a"]

    def test_a_repeat_of_it_is_dropped_as_before(self, backend: Backend) -> None:
        topic = backend.topic(guarantee="exactly-once")
        lane = backend.lane(topic)
        message = backend.message(topic, "a", id="it")
        backend.broker.publish([message])
        erase(backend, id="it", source=SOURCE)
        again = backend.broker.publish([message, backend.message(topic, "b", id="another")])
        dropped = "RepeatDropped" if backend.can.identity_retention else "Published"
        assert kinds(again) == [dropped, "Published"]
        assert drain(lane)[-1:] == ["b"]

    @pytest.mark.parametrize("end", ["done", "retry", "dead", "release", "silence"])
    def test_while_it_is_claimed(self, backend: Backend, end: str) -> None:
        topic = backend.topic()
        lane = backend.lane(topic, bodies_only=True)
        messages = backend.publish(topic, *"abc")
        held = claim(lane)
        erase(backend, id=messages[1].id, source=SOURCE)
        ends: dict[str, Any] = {
            "done": Done,
            "retry": lambda receipt: Retry(receipt, 0.0, "KeyError: a handler's"),
            "dead": lambda receipt: Dead(receipt, "KeyError: a handler's"),
            "release": Release,
        }
        if end in ends:
            assert list(lane.settle([ends[end](d.receipt) for d in [*held]])) == []
        else:
            backend.fall_silent()
        assert drain(lane) == ([] if end in ("done", "dead") else [*"ac"])
        dead = sorted(letter.message.body for letter in backend.inside.dead_letters())
        assert dead == ([b"a", b"c"] if end == "dead" else [])
        told = [
            incident for incident in backend.inside.incidents() if "KeyError" in incident.detail
        ]
        assert messages[1].id not in {incident.id for incident in backend.inside.incidents()}
        assert len(told) == (2 if end in ("retry", "dead") else 0), (
            "what failed with it says nothing"
        )

    @pytest.mark.parametrize("bodies_only", [False, True])
    def test_a_claim_of_which_nothing_is_left(self, backend: Backend, bodies_only: bool) -> None:
        topic = backend.topic()
        lane = backend.lane(topic, bodies_only=bodies_only)
        [message] = backend.publish(topic, "a")
        [held] = claim(lane)
        erase(backend, id=message.id, source=SOURCE)
        assert isinstance(held.message_id, str)
        assert list(lane.settle([Retry(held.receipt, 0.0, "e")])) == []
        assert drain(lane) == []

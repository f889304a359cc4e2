"""The outbox: what transactions published waits, in order, until the broker has confirmed it."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from duly.message import Topic
from duly.store import Outgoing, Refusal, outbox_of
from duly.testing.conformance.backend import A_LOT, Outboxed


def unsent(outboxed: Outboxed, limit: int = 100, max_bytes: int = A_LOT) -> list[Outgoing]:
    """What is to be sent now."""
    return list(outboxed.outbox.unsent(limit, max_bytes, 0.0))


def texts(outgoing: Sequence[Outgoing]) -> list[str]:
    """What these say."""
    return [each.message.body.decode() for each in outgoing]


def refuse(outboxed: Outboxed, position: int, retry_in_s: float | None = None, **more: Any) -> None:
    """The broker refuses this one."""
    outboxed.outbox.refused([Refusal(position, "no", retry_in_s, **more)])


class Outboxes:
    """What transactions published waits, in order, until the broker has confirmed it."""

    @pytest.fixture
    def topic(self, outboxed: Outboxed) -> Topic[Any]:
        topic: Topic[Any] = Topic("t", str, guarantee="at-least-once")
        outboxed.store.declare([topic])
        return topic

    def test_a_store_with_an_outbox_shows_it(self, outboxed: Outboxed) -> None:
        assert outboxed.store.capabilities.outbox
        assert outbox_of(outboxed.store) is not None

    def test_messages_come_unchanged_and_in_order(
        self, outboxed: Outboxed, topic: Topic[Any]
    ) -> None:
        [first] = outboxed.put(topic, "grüße", key="k", headers={"tenant": "blue"}, id="one")
        outboxed.put(topic, "second", "third")
        found = unsent(outboxed)
        assert texts(found) == ["grüße", "second", "third"]
        assert [each.position for each in found] == sorted(each.position for each in found)
        got = found[0].message
        assert (got.topic, got.source, got.id, got.key, got.time_ms) == (
            first.topic, first.source, "one", "k", first.time_ms,
        )  # fmt: skip
        assert dict(got.headers) == {"tenant": "blue"}

    def test_what_was_rolled_back_is_not_there(self, outboxed: Outboxed, topic: Topic[Any]) -> None:
        session = outboxed.store.begin(None)
        session.publish([topic.message("never", source="tests")])
        assert unsent(outboxed) == []
        session.rollback()
        assert unsent(outboxed) == []

    def test_reading_takes_nothing_away(self, outboxed: Outboxed, topic: Topic[Any]) -> None:
        outboxed.put(topic, "a", "b")
        assert texts(unsent(outboxed)) == texts(unsent(outboxed)) == ["a", "b"]

    def test_limits_in_messages_and_bytes(self, outboxed: Outboxed, topic: Topic[Any]) -> None:
        outboxed.put(topic, "a" * 10, "b" * 10, "c" * 10)
        assert len(unsent(outboxed, limit=2)) == 2
        assert len(unsent(outboxed, max_bytes=20)) == 2
        assert len(unsent(outboxed, max_bytes=5)) == 1

    def test_what_is_left_is_told_by_positions(self, outboxed: Outboxed, topic: Topic[Any]) -> None:
        outboxed.put(topic, "a", "b", "c", "d")
        found = unsent(outboxed)
        outboxed.outbox.sent([found[1].position])
        refuse(outboxed, found[2].position, None)
        refuse(outboxed, found[3].position, 1000.0)
        asked = [each.position for each in found]
        still = outboxed.outbox.left([*asked, 10**6])
        assert [(each.position, each.message.id, each.attempts) for each in still] == [
            (found[0].position, found[0].message.id, 0),
            (found[2].position, found[2].message.id, 1),
            (found[3].position, found[3].message.id, 1),
        ]
        assert list(outboxed.outbox.left([])) == []

    def test_what_is_sent_is_gone(self, outboxed: Outboxed, topic: Topic[Any]) -> None:
        outboxed.put(topic, "a", "b", "c")
        found = unsent(outboxed)
        outboxed.outbox.sent([found[0].position, found[2].position])
        outboxed.outbox.sent([found[0].position])
        assert texts(unsent(outboxed)) == ["b"]
        outboxed.put(topic, "d")
        assert unsent(outboxed)[-1].position > found[2].position, "positions are not used again"

    def test_a_refused_one_waits_while_others_go_on(
        self, outboxed: Outboxed, topic: Topic[Any]
    ) -> None:
        outboxed.put(topic, "a", "b")
        refuse(outboxed, unsent(outboxed)[0].position, 10.0)
        assert texts(unsent(outboxed)) == ["b"]
        outboxed.clock.advance(9)
        assert texts(unsent(outboxed)) == ["b"]
        outboxed.clock.advance(2)
        assert [(each.attempts, *texts([each])) for each in unsent(outboxed)] == [
            (1, "a"),
            (0, "b"),
        ]

    def test_an_uncharged_refusal_counts_no_attempt(
        self, outboxed: Outboxed, topic: Topic[Any]
    ) -> None:
        outboxed.put(topic, "a")
        position = unsent(outboxed)[0].position
        refuse(outboxed, position, 1.0)
        refuse(outboxed, position, 1.0, charged=False)
        refuse(outboxed, position, 1.0)
        outboxed.clock.advance(2)
        assert unsent(outboxed)[0].attempts == 2

    def test_a_key_waits_behind_its_refused_one(
        self, outboxed: Outboxed, topic: Topic[Any]
    ) -> None:
        outboxed.put(topic, "1", key="k")
        outboxed.put(topic, "other", key="another")
        outboxed.put(topic, "2", key="k")
        refuse(outboxed, unsent(outboxed)[0].position, 10.0)
        assert texts(unsent(outboxed)) == ["other"]
        outboxed.clock.advance(11)
        assert texts(unsent(outboxed)) == ["1", "other", "2"]

    def test_given_up_ones_stay_in_sight_and_hold_nothing(
        self, outboxed: Outboxed, topic: Topic[Any]
    ) -> None:
        outboxed.put(topic, "1", "2", key="k")
        first = unsent(outboxed)[0]
        refuse(outboxed, first.position, 1.0)
        refuse(outboxed, first.position, None)
        assert texts(unsent(outboxed)) == ["2"]
        [given_up] = outboxed.outbox.given_up()
        assert (given_up.position, given_up.attempts, given_up.error) == (first.position, 2, "no")
        assert given_up.message.body == b"1"
        outboxed.clock.advance(1e6)
        assert texts(unsent(outboxed)) == ["2"]

    def test_given_up_ones_can_be_tried_again(self, outboxed: Outboxed, topic: Topic[Any]) -> None:
        outboxed.put(topic, "a", "b")
        first, second = unsent(outboxed)
        refuse(outboxed, first.position, None)
        outboxed.outbox.try_again([first.position, second.position])
        assert [(each.position, each.attempts) for each in unsent(outboxed)] == [
            (first.position, 0),
            (second.position, 0),
        ]
        assert list(outboxed.outbox.given_up()) == []

    def test_what_is_sent_after_all_leaves_nothing(
        self, outboxed: Outboxed, topic: Topic[Any]
    ) -> None:
        outboxed.put(topic, "a")
        position = unsent(outboxed)[0].position
        refuse(outboxed, position, None)
        outboxed.outbox.sent([position])
        backlog = outboxed.outbox.backlog()
        assert (backlog.unsent, backlog.given_up) == (0, 0)

    def test_the_backlog_adds_up(self, outboxed: Outboxed, topic: Topic[Any]) -> None:
        empty = outboxed.outbox.backlog()
        assert (empty.unsent, empty.given_up, empty.oldest_ms) == (0, 0, None)
        outboxed.put(topic, "a", time_ms=1000)
        outboxed.put(topic, "b", time_ms=2000)
        outboxed.put(topic, "c", time_ms=3000)
        first, second, _ = unsent(outboxed)
        refuse(outboxed, first.position, None)
        refuse(outboxed, second.position, 5.0)
        backlog = outboxed.outbox.backlog()
        assert (backlog.unsent, backlog.given_up, backlog.oldest_ms) == (2, 1, 2000)

    def test_one_relay_at_a_time(self, outboxed: Outboxed) -> None:
        outbox = outboxed.outbox
        assert outbox.hold("one", 10.0)
        assert not outbox.hold("two", 10.0)
        outboxed.clock.advance(8)
        assert outbox.hold("one", 10.0), "it renews"
        outboxed.clock.advance(8)
        assert not outbox.hold("two", 10.0)
        outboxed.clock.advance(3)
        assert outbox.hold("two", 10.0), "the lease is over"
        assert not outbox.hold("one", 10.0)

    def test_letting_go(self, outboxed: Outboxed) -> None:
        outbox = outboxed.outbox
        assert outbox.hold("one", 10.0)
        outbox.let_go("two")
        assert not outbox.hold("two", 10.0)
        outbox.let_go("one")
        assert outbox.hold("two", 10.0)

    def test_waiting_ends_with_a_commit(self, outboxed: Outboxed, topic: Topic[Any]) -> None:
        found: list[Sequence[Outgoing]] = []
        waiter = threading.Thread(
            target=lambda: found.append(outboxed.outbox.unsent(10, A_LOT, 30.0))
        )
        waiter.start()
        outboxed.put(topic, "a")
        waiter.join(20)
        assert texts(found[0]) == ["a"]

    def test_waiting_is_no_longer_than_asked(self, outboxed: Outboxed) -> None:
        before = time.monotonic()
        assert list(outboxed.outbox.unsent(10, A_LOT, 0.1)) == []
        assert 0.09 < time.monotonic() - before < 10

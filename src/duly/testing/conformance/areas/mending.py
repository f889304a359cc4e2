"""Dead letters brought back or removed by people: `duly.inspection.Mending`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest

from duly.broker import Delivery, Subscription
from duly.errors import ConfigurationError
from duly.guarantees import Dead, Release, Retry
from duly.inspection import DeadLetter, Selection
from duly.inspection import Mending as Mends
from duly.mending import Mender
from duly.testing.conformance.backend import (
    Backend,
    bodies,
    claim,
    drain,
    eventually,
    settle_done,
    together,
)

EVERY = Selection()
CALLS = ("select", "replay", "discard")


def bury(lane: Subscription, error: str = "no") -> list[Delivery]:
    """Give up on all that the lane can claim."""
    claimed = list(claim(lane))
    assert list(lane.settle([Dead(each.receipt, error) for each in claimed])) == []
    return claimed


def letters(backend: Backend) -> Sequence[DeadLetter]:
    """All dead letters, oldest first."""
    return backend.mender.select(EVERY, 100)[::-1]


class NoMending:
    """No mending: nothing pretends to be `duly.inspection.Mending`, and people are told."""

    @pytest.mark.parametrize("call", CALLS)
    def test_it_has_no_such_call(self, backend: Backend, call: str) -> None:
        assert not hasattr(backend.broker, call), "say mending = true in the page"

    def test_duly_dead_refuses_it(self, backend: Backend) -> None:
        with pytest.raises(ConfigurationError, match="keeps no dead letters"):
            Mender.of((backend.broker, None), ())


class Mending:
    """A dead letter is delivered once more or never again, as the person said."""

    def test_it_has_every_call(self, backend: Backend) -> None:
        assert isinstance(backend.broker, Mends)
        assert list(backend.mender.select(EVERY, 10)) == []
        assert list(backend.mender.replay([])) == []
        assert list(backend.mender.discard([])) == []

    def test_a_replay_is_the_same_message(self, backend: Backend) -> None:
        topic = backend.topic()
        [sent] = backend.publish(topic, "a", id="one", key="k", headers={"tenant": "blue"})
        lane = backend.lane(topic)
        bury(lane)
        assert list(backend.mender.replay(letters(backend))) == []
        [again] = claim(lane)
        assert (again.message.source, again.message.id) == (sent.source, "one")
        assert (again.message.body, again.message.key) == (b"a", "k")
        assert dict(again.message.headers) == {"tenant": "blue"}
        assert again.message.time_ms == sent.time_ms

    def test_a_replay_reaches_its_subscription_and_nobody_else(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "a")
        lane, done, waiting = (backend.lane(topic, name=name) for name in ("sub", "done", "wait"))
        drain(done)
        bury(lane)
        backend.mender.replay(letters(backend))
        assert list(claim(done)) == []
        assert drain(lane) == ["a"]
        assert drain(waiting) == ["a"], "once, as without the replay"

    def test_a_replay_begins_anew_and_is_delivered_once(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "a")
        lane = backend.lane(topic)
        [delivery] = claim(lane)
        lane.settle([Retry(delivery.receipt, 0.0, "once")])
        bury(lane)
        backend.mender.replay(letters(backend))
        assert letters(backend) == []
        [again] = claim(lane)
        assert (again.attempt, again.repeated) == (1, False)
        settle_done(lane, [again])
        backend.fall_silent()
        assert list(claim(lane)) == []
        [state] = backend.inside.subscriptions()
        assert state.is_drained
        assert state.dead == 0

    @pytest.mark.parametrize("end", ["retry", "release", "close", "silence", "dead"])
    def test_how_often_it_was_replayed_is_known(self, backend: Backend, end: str) -> None:
        """Whatever becomes of it then: stores tell by it that it may take effect after all."""
        topic = backend.topic()
        backend.publish(topic, "a")
        lane = backend.lane(topic)
        assert [delivery.replays for delivery in bury(lane)] == [0]
        backend.mender.replay(letters(backend))
        [delivery] = claim(lane)
        assert delivery.replays == 1
        match end:
            case "retry":
                lane.settle([Retry(delivery.receipt, 0.0, "again")])
            case "release":
                lane.settle([Release(delivery.receipt)])
            case "close":
                lane.close()
                lane = backend.lane(topic)
            case "silence":
                backend.fall_silent()
            case _:
                lane.settle([Dead(delivery.receipt, "again")])
                assert [letter.replays for letter in letters(backend)] == [1]
                backend.mender.replay(letters(backend))
        assert [each.replays for each in claim(lane)] == [2 if end == "dead" else 1]

    def test_many_are_replayed_in_one_call(self, backend: Backend) -> None:
        topic = backend.topic()
        sent = [f"{number}" for number in range(30)]
        backend.publish(topic, *sent)
        lane = backend.lane(topic)
        bury(lane)
        assert list(backend.mender.replay(letters(backend))) == []
        assert sorted(drain(lane), key=int) == sent

    def test_a_discarded_one_is_gone_for_good(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "a", "b")
        lane = backend.lane(topic)
        bury(lane)
        first, second = letters(backend)
        assert list(backend.mender.discard([first])) == []
        assert letters(backend) == [second]
        backend.fall_silent()
        assert list(claim(lane)) == []
        assert [state.dead for state in backend.inside.subscriptions()] == [1]

    @pytest.mark.parametrize("how", ["replay", "discard"])
    def test_what_is_no_dead_letter_any_more_is_told(self, backend: Backend, how: str) -> None:
        topic = backend.topic()
        backend.publish(topic, "a", "b")
        lane = backend.lane(topic)
        bury(lane)
        first, second = letters(backend)
        mend = getattr(backend.mender, how)
        assert list(mend([first])) == []
        assert list(mend([first, second])) == [first]
        assert list(backend.mender.replay([first])) == [first]
        assert list(backend.mender.discard([second])) == [second]
        assert sorted(drain(lane)) == (["a", "b"] if how == "replay" else [])

    def test_an_old_letter_does_not_stand_for_a_new_one(self, backend: Backend) -> None:
        """It died again since somebody looked, maybe of something else."""
        topic = backend.topic()
        backend.publish(topic, "a")
        lane = backend.lane(topic)
        bury(lane, "first")
        [old] = letters(backend)
        backend.mender.replay([old])
        bury(lane, "second")
        assert list(backend.mender.discard([old])) == [old]
        assert list(backend.mender.replay([old])) == [old]
        assert [letter.error for letter in letters(backend)] == ["second"]
        assert list(claim(lane)) == []

    def test_of_many_who_replay_one_succeeds(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "a")
        lane = backend.lane(topic)
        bury(lane)
        [letter] = letters(backend)
        gone: list[int] = []
        together(*(lambda: gone.append(len(backend.mender.replay([letter]))) for _ in range(4)))
        assert sorted(gone) == [0, 1, 1, 1]
        assert drain(lane) == ["a"]

    def test_the_log_may_have_forgotten_it(self, backend: Backend) -> None:
        topic = backend.topic(retention_s=1.0)
        backend.publish(topic, "a", "b")
        lane = backend.lane(topic)
        bury(lane)
        for _ in range(3):  # whenever it is that a broker looks for what it may forget
            backend.clock.advance(3600.0)
            backend.publish(topic, "later")
            assert drain(lane) == ["later"]
        assert list(backend.mender.replay(letters(backend))) == []
        assert sorted(drain(lane)) == ["a", "b"]

    def test_a_replay_wakes_who_waits(self, backend: Backend) -> None:
        backend.in_real_time()
        topic = backend.topic()
        backend.publish(topic, "a")
        lane = backend.lane(topic)
        bury(lane)
        found: list[Delivery] = []

        def wait() -> None:
            found.extend(lane.claim(10, 1 << 20, 20.0))

        def replay() -> None:
            backend.mender.replay(letters(backend))
            eventually(lambda: found, "the waiting claim has it", 10.0)

        together(wait, replay)
        assert bodies(found) == ["a"]

    @pytest.mark.parametrize(("how", "kind"), [("replay", "replayed"), ("discard", "discarded")])
    def test_each_is_noted(self, backend: Backend, how: str, kind: str) -> None:
        topic = backend.topic()
        backend.publish(topic, "a", id="one")
        backend.publish(topic, "b", id="two")
        lane = backend.lane(topic)
        bury(lane)
        getattr(backend.mender, how)(letters(backend))
        assert backend.inside.incident_counts()["sub", kind] == 2
        noted = backend.inside.incidents("sub", kind)
        assert sorted((each.id, each.topic) for each in noted) == [
            ("one", topic.name),
            ("two", topic.name),
        ]

    def test_which_are_meant(self, backend: Backend) -> None:
        topic, other = backend.topic(), backend.topic("other")
        lane = backend.lane(topic, other)
        told = [("a", topic, "ValueError: 100%"), ("b", other, "KeyError"), ("c", topic, "Value_")]
        for id, to, error in told:
            backend.publish(to, id, id=id)
            bury(lane, error)
            backend.clock.advance(60)
        second = letters(backend)[1]

        def ids(limit: int = 10, **which: Any) -> str:
            return "".join(d.message.id for d in backend.mender.select(Selection(**which), limit))

        assert (ids(), ids(2)) == ("cba", "cb")
        assert (ids(consumer="sub"), ids(consumer="su")) == ("cba", "")
        assert (ids(topic=topic.name), ids(topic="other"), ids(id="b")) == ("ca", "b", "b")
        assert (ids(error="Value"), ids(error="0%"), ids(error="e_"), ids(error="")) == (
            "ca",
            "a",
            "c",
            "cba",
        )
        assert (ids(since_ms=second.dead_ms), ids(before_ms=second.dead_ms)) == ("cb", "a")
        assert (ids(below=second.number), ids(error="Value", since_ms=second.dead_ms)) == ("a", "c")

    def test_a_list_goes_on_where_it_ended(self, backend: Backend) -> None:
        """Portion by portion, each mended before the next is read."""
        topic = backend.topic()
        backend.publish(topic, *"abcdefg")
        lane = backend.lane(topic)
        bury(lane)
        mender = Mender.of((backend.broker, None), ())
        seen: list[bytes] = []
        below: int | None = None
        for _ in itertools.repeat(None, 9):
            portion = mender.select(Selection(below=below), 3)
            if not portion:
                break
            seen += [letter.message.body for letter in portion]
            backend.mender.discard(portion)
            below = portion[-1].number
        assert seen == [b"g", b"f", b"e", b"d", b"c", b"b", b"a"]
        assert letters(backend) == []


class MendingInOrder:
    """A replay comes before the later ones of its key."""

    def test_a_replay_comes_first_of_its_key(self, backend: Backend) -> None:
        topic = backend.topic(partitions=2, in_order=True)
        backend.publish(topic, *"abc", key="k")
        lane = backend.lane(topic, order_by_key=True)
        first, *rest = claim(lane)
        lane.settle([Dead(first.receipt, "no"), *(Release(each.receipt) for each in rest)])
        backend.mender.replay(letters(backend))
        assert drain(lane) == ["a", "b", "c"]


class MendingHeldKeys:
    """A key that a dead letter holds goes on when that is mended."""

    @pytest.mark.parametrize("how", ["replay", "discard"])
    def test_a_held_key_goes_on(self, backend: Backend, how: str) -> None:
        topic = backend.topic(partitions=2, in_order=True)
        backend.publish(topic, *"abc", key="k")
        lane = backend.lane(topic, order_by_key=True, hold_key_on_dead=True)
        first, *rest = claim(lane)
        lane.settle([Dead(first.receipt, "no"), *(Release(each.receipt) for each in rest)])
        assert drain(lane) == []
        assert list(getattr(backend.mender, how)(letters(backend))) == []
        backend.publish(topic, "d", key="k")
        assert drain(lane, limit=2) == [*(["a"] if how == "replay" else []), *"bcd"]

    def test_of_two_dead_of_a_held_key_the_earlier_goes_first(self, backend: Backend) -> None:
        topic = backend.topic(partitions=2, in_order=True)
        backend.publish(topic, *"abc", key="k")
        lane = backend.lane(topic, order_by_key=True, hold_key_on_dead=True)
        first, second, third = claim(lane)
        lane.settle([Dead(first.receipt, "no"), Release(second.receipt), Release(third.receipt)])
        backend.mender.replay(letters(backend))
        again, *rest = claim(lane)
        lane.settle([Dead(again.receipt, "no"), *(Release(each.receipt) for each in rest)])
        assert drain(lane) == []
        backend.mender.discard(letters(backend))
        assert drain(lane) == ["b", "c"]


class DurableMending:
    """What was mended stays mended, whatever dies."""

    @pytest.mark.parametrize("end", ["restart", "crash"])
    def test_a_replay_survives(self, backend: Backend, end: str) -> None:
        topic = backend.topic()
        backend.publish(topic, "again", "never")
        bury(backend.lane(topic))
        again, never = letters(backend)
        backend.mender.replay([again])
        backend.mender.discard([never])
        getattr(backend, end)()
        assert letters(backend) == []
        lane = backend.lane(topic)
        [delivery] = claim(lane)
        assert (bodies([delivery]), delivery.attempt, delivery.replays) == (["again"], 1, 1)
        settle_done(lane, [delivery])
        assert backend.inside.incident_counts()["sub", "replayed"] == 1
        assert backend.inside.incident_counts()["sub", "discarded"] == 1

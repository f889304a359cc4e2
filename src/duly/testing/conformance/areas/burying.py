"""Dead letters of a broker that keeps none itself (`Buries`), kept elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest

from duly.broker import Broker, Delivery, Subscription
from duly.errors import BrokerError, BrokerUnavailable
from duly.guarantees import Dead, Retry
from duly.inspection import DeadLetter, Mending, Selection
from duly.inspection.graves import Buries
from duly.mending import Buried
from duly.stores.memory.graveyard import MemoryGraveyard
from duly.testing.conformance.backend import Backend, bodies, claim, drain, settle_done

EVERY = Selection()


class Watched(MemoryGraveyard):
    """A graveyard that can be made to fail."""

    def __init__(self) -> None:
        super().__init__(threading.RLock())
        self.before_bury: BaseException | None = None
        self.after_bury: BaseException | None = None
        self.before_remove: BaseException | None = None

    def bury(self, letters: Sequence[DeadLetter]) -> None:
        _raise(self.before_bury)
        super().bury(letters)
        _raise(self.after_bury)

    def remove(self, letters: Sequence[DeadLetter]) -> Sequence[DeadLetter]:
        _raise(self.before_remove)
        return super().remove(letters)


def _raise(error: BaseException | None) -> None:
    if error is not None:
        raise error


def buries(backend: Backend) -> Buries:
    """The broker as one that buries."""
    assert isinstance(backend.broker, Buries)
    return backend.broker


def bury(lane: Subscription, error: str = "no") -> list[Delivery]:
    """Give up on all that the lane can claim."""
    claimed = list(claim(lane))
    assert list(lane.settle([Dead(each.receipt, error) for each in claimed])) == []
    return claimed


def letters(backend: Backend) -> list[DeadLetter]:
    """All dead letters, oldest first."""
    return list(buries(backend).graveyard.select(EVERY, 100))[::-1]


def mender(backend: Backend) -> Buried:
    """What people's commands go through."""
    return Buried(buries(backend))


def watch(backend: Backend, yard: Watched) -> None:
    """Bury there from now on, whoever opens the broker."""

    def around(broker: Broker) -> Broker:
        assert isinstance(broker, Buries)
        broker.bury_in(yard)
        return broker

    backend.put_around(around)


class Burying:
    """What is given up on is kept before it is settled; a replay is one subscription's."""

    @pytest.fixture(params=["its own", "a store's"])
    def yard(self, request: pytest.FixtureRequest, backend: Backend) -> Any:
        """Where this test's dead letters go."""
        if request.param == "its own":
            return buries(backend).graveyard
        found = Watched()
        watch(backend, found)
        return found

    @pytest.fixture
    def watched(self, backend: Backend) -> Watched:
        found = Watched()
        watch(backend, found)
        return found

    def test_it_has_every_call_and_mends_nothing_itself(self, backend: Backend) -> None:
        broker = buries(backend)
        assert not isinstance(broker, Mending), "then nobody would ask the graveyard"
        assert list(broker.graveyard.select(EVERY, 10)) == []
        assert broker.carry() == 0
        broker.redeliver([])

    def test_a_letter_says_what_became_of_it(self, backend: Backend, yard: Any) -> None:
        topic = backend.topic()
        [sent] = backend.publish(topic, "a", id="one", key="k", headers={"tenant": "blue"})
        lane = backend.lane(topic)
        [delivery] = claim(lane)
        lane.settle([Retry(delivery.receipt, 0.0, "once")])
        bury(lane, "ValueError: no")
        [letter] = letters(backend)
        assert letter.number > 0
        assert (letter.subscription, letter.error, letter.attempts, letter.replays) == (
            "sub", "ValueError: no", 2, 0,
        )  # fmt: skip
        got = letter.message
        assert (got.topic, got.source, got.id, got.body, got.key, got.time_ms) == (
            topic.name, sent.source, "one", b"a", "k", sent.time_ms,
        )  # fmt: skip
        assert dict(got.headers) == {"tenant": "blue"}
        assert dict(yard.count()) == {("sub", topic.name): 1}
        assert list(claim(lane)) == []

    def test_what_is_not_kept_is_not_settled(self, backend: Backend, watched: Watched) -> None:
        topic = backend.topic()
        backend.publish(topic, "a")
        lane = backend.lane(topic)
        [delivery] = claim(lane)
        watched.before_bury = BrokerUnavailable("the store is away")
        with pytest.raises(BrokerUnavailable):
            lane.settle([Dead(delivery.receipt, "no")])
        assert list(watched.select(EVERY, 10)) == []
        watched.before_bury = None
        assert list(lane.settle([Dead(delivery.receipt, "no")])) == [], "it is claimed still"
        assert bodies_of(letters(backend)) == [b"a"]

    @pytest.mark.parametrize("fault", ["before_bury", "after_bury"])
    def test_a_crash_on_the_way_repeats_it(
        self, backend: Backend, watched: Watched, fault: str
    ) -> None:
        topic = backend.topic()
        backend.publish(topic, "a", "b")
        lane = backend.lane(topic)
        claimed = claim(lane)
        setattr(watched, fault, BrokerUnavailable("the process ends here"))
        with pytest.raises(BrokerError):
            lane.settle([Dead(delivery.receipt, "no") for delivery in claimed])
        setattr(watched, fault, None)
        backend.crash()
        lane = backend.lane(topic)
        again: list[Delivery] = []
        while some := bury(lane):
            again += some
        assert sorted(bodies(again)) == ["a", "b"]
        assert sorted(bodies_of(letters(backend))) == [b"a", b"b"], "each of them once"

    def test_a_replay_is_the_same_message_begun_anew(self, backend: Backend, yard: Any) -> None:
        topic = backend.topic()
        [sent] = backend.publish(topic, "a", id="one", key="k", headers={"tenant": "blue"})
        lane = backend.lane(topic)
        bury(lane)
        assert list(mender(backend).replay(letters(backend))) == []
        assert letters(backend) == list(yard.select(EVERY, 10)) == []
        [again] = claim(lane)
        assert (again.message.source, again.message.id) == (sent.source, "one")
        assert (again.message.body, again.message.key) == (b"a", "k")
        assert dict(again.message.headers) == {"tenant": "blue"}
        assert again.message.time_ms == sent.time_ms
        assert (again.attempt, again.repeated, again.replays) == (1, False, 1)

    def test_a_replay_reaches_its_subscription_and_nobody_else(self, backend: Backend) -> None:
        topic = backend.topic(read_by=("sub", "done", "wait"))
        lane, done, waiting = (backend.lane(topic, name=name) for name in ("sub", "done", "wait"))
        backend.publish(topic, "a")
        drain(done)
        bury(lane)
        mender(backend).replay(letters(backend))
        assert list(claim(done)) == []
        assert drain(lane) == ["a"]
        assert drain(waiting) == ["a"], "once, as without the replay"

    @pytest.mark.parametrize("end", ["retry", "silence", "dead"])
    def test_how_often_it_was_replayed_is_known(self, backend: Backend, end: str) -> None:
        """Whatever becomes of it then: stores tell by it that it may take effect after all."""
        topic = backend.topic()
        backend.publish(topic, "a")
        lane = backend.lane(topic)
        bury(lane)
        mender(backend).replay(letters(backend))
        [delivery] = claim(lane)
        match end:
            case "retry":
                lane.settle([Retry(delivery.receipt, 0.0, "again")])
            case "silence":
                backend.fall_silent()
            case _:
                lane.settle([Dead(delivery.receipt, "again")])
                assert [letter.replays for letter in letters(backend)] == [1]
                mender(backend).replay(letters(backend))
        assert [each.replays for each in claim(lane)] == [2 if end == "dead" else 1]

    def test_a_crash_before_the_removal_delivers_it_twice(
        self, backend: Backend, watched: Watched
    ) -> None:
        """Under one identity and with one count, so that an inbox drops the second."""
        topic = backend.topic()
        backend.publish(topic, "a", id="one")
        lane = backend.lane(topic)
        bury(lane)
        watched.before_remove = BrokerUnavailable("the process ends here")
        with pytest.raises(BrokerUnavailable):
            mender(backend).replay(letters(backend))
        watched.before_remove = None
        assert list(mender(backend).replay(letters(backend))) == []
        assert letters(backend) == []
        told = []
        while claimed := claim(lane):
            told += [(each.message.id, each.replays) for each in claimed]
            settle_done(lane, claimed)
        assert told == [("one", 1)] * 2

    def test_a_discarded_one_is_gone_for_good(self, backend: Backend, yard: Any) -> None:
        topic = backend.topic()
        backend.publish(topic, "a", "b")
        lane = backend.lane(topic)
        bury(lane)
        first, second = letters(backend)
        assert list(mender(backend).discard([first])) == []
        assert letters(backend) == [second]
        assert list(mender(backend).discard([first])) == [first]
        assert list(mender(backend).replay([first])) == [first]
        assert list(claim(lane)) == []
        assert dict(yard.count()) == {("sub", topic.name): 1}

    def test_an_old_letter_does_not_stand_for_a_new_one(self, backend: Backend, yard: Any) -> None:
        """It died again since somebody looked, maybe of something else."""
        topic = backend.topic()
        backend.publish(topic, "a")
        lane = backend.lane(topic)
        bury(lane, "first")
        [old] = letters(backend)
        mender(backend).replay([old])
        bury(lane, "second")
        assert list(mender(backend).discard([old])) == [old]
        assert list(mender(backend).replay([old])) == [old]
        assert [letter.error for letter in yard.select(EVERY, 10)] == ["second"]
        assert list(claim(lane)) == []


def bodies_of(letters: Sequence[DeadLetter]) -> list[bytes]:
    """What the messages say."""
    return [letter.message.body for letter in letters]

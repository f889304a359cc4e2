"""Faults at the seam of a broker: every call refused, cut before and after, one after another.

What is raised is what the protocol allows for that call. Whoever works the seam by its rules
loses nothing and, where the broker confirms settlements, handles nothing again that it settled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest

from duly.broker import Broker, Delivery, Published, RepeatDropped, Subscription
from duly.errors import BrokerError, CommitUnknown
from duly.guarantees import Done, Guarantee, Release
from duly.message import Topic
from duly.testing.conformance.backend import (
    LEASE_S,
    Backend,
    batches,
    bodies,
    claim,
    drain,
    settle_done,
)
from duly.testing.conformance.subject import Clock
from duly.testing.faulty import Faults as Seeded
from duly.testing.faulty import FaultyBroker, make
from duly.testing.seam import Call, WrappedBroker, WrappedSubscription

BODIES = [str(number) for number in range(8)]
ROUNDS = 12


@dataclass
class NthCall:
    """A fault at the n-th call of one name (1, 2, ...); ``hit`` tells whether it came to that."""

    name: str
    kind: str
    n: int
    seen: int = 0
    hit: bool = False

    def __call__(self, call: Call, perform: Callable[[Any], Any]) -> Any:
        if call.name == self.name:
            self.seen += 1
            if self.seen == self.n:
                self.hit = True
                return make(self.kind, call, perform, Random(0))
        return perform(call.given)

    def around(self, broker: Broker) -> Broker:
        """This fault around a broker."""
        return WrappedBroker(broker, self)


@dataclass
class Slow:
    """Every call of one name takes longer than a lease."""

    name: str
    when: str
    clock: Clock
    hits: int = 0

    def __call__(self, call: Call, perform: Callable[[Any], Any]) -> Any:
        hit = call.name == self.name
        self.hits += hit
        if hit and self.when == "before":
            self.clock.advance(LEASE_S + 1)
        answer = perform(call.given)
        if hit and self.when == "after":
            self.clock.advance(LEASE_S + 1)
        return answer


@dataclass(repr=False)
class Story:
    """A publisher and a worker that go by the rules of the seam, whatever it answers."""

    backend: Backend
    topic: Topic[Any]
    guarantee: Guarantee = Guarantee.AT_LEAST_ONCE
    handled: Counter[str] = field(default_factory=Counter)
    settled: set[str] = field(default_factory=set)
    again: list[str] = field(default_factory=list)
    lane: Subscription = field(init=False)

    def __post_init__(self) -> None:
        self.lane = self.backend.lane(self.topic, guarantee=self.guarantee)

    def publish(self, *texts: str) -> None:
        """Each of these until it is confirmed, under one id."""
        for text in texts:
            message = self.backend.message(self.topic, text, id=f"id-{text}")
            for _ in range(20):
                [outcome] = self.backend.broker.publish([message])
                if isinstance(outcome, Published | RepeatDropped):
                    break
            else:
                raise AssertionError(f"{text} could not be published")

    def work(self, rounds: int) -> None:
        """Claim, hold, handle and settle, in the order that the guarantee says."""
        for _ in range(rounds):
            try:
                deliveries = claim(self.lane, limit=3)
                lost = set(self.lane.extend([d.receipt for d in deliveries], LEASE_S))
            except BrokerError:
                self.backend.clock.advance(1.0)
                continue
            held = [delivery for delivery in deliveries if delivery.receipt not in lost]
            if self.guarantee is Guarantee.AT_MOST_ONCE:
                self.handle(self.settle(held))
            else:
                self.handle(held)
                self.settle(held)

    def handle(self, deliveries: Iterable[Delivery]) -> None:
        """The handler runs."""
        for body in bodies(list(deliveries)):
            self.handled[body] += 1
            if body in self.settled and self.guarantee is not Guarantee.AT_MOST_ONCE:
                self.again.append(body)

    def settle(self, deliveries: list[Delivery]) -> list[Delivery]:
        """Those of which the broker confirms that they are settled."""
        try:
            refused = set(self.lane.settle([Done(d.receipt) for d in deliveries]))
        except (BrokerError, CommitUnknown):
            return []
        done = [delivery for delivery in deliveries if delivery.receipt not in refused]
        self.settled.update(bodies(done))
        return done

    def finish(self) -> None:
        """The faults are over: what is left is worked off, as long as it takes."""
        for _ in range(4):
            self.backend.fall_silent()
            self.work(ROUNDS)
        assert list(claim(self.lane)) == [], "something is left"


def bare(lane: Subscription) -> Subscription:
    """The lane without what was put around it."""
    return lane.inner if isinstance(lane, WrappedSubscription) else lane


def stored_once(backend: Backend) -> bool:
    """Whether a repeat on an exactly-once topic is dropped here."""
    return backend.can.identity_retention


class Faults:
    """Nothing is lost, and nothing that was settled comes again, at a fault in any call."""

    @pytest.mark.parametrize("kind", ["unavailable", "cut before", "cut after"])
    @pytest.mark.parametrize("name", ["publish", "claim", "extend", "settle"])
    def test_at_least_once_at_a_fault_in_each_call(
        self, backend: Backend, name: str, kind: str
    ) -> None:
        hits = 0
        inner = backend.broker
        for n in range(1, 7):
            fault = NthCall(name, kind, n)
            backend.broker = fault.around(inner)
            story = Story(backend, backend.topic(f"t{n}", guarantee="exactly-once"))
            story.publish(*BODIES)
            story.work(ROUNDS)
            story.finish()
            story.lane.close()
            hits += fault.hit
            assert set(story.handled) == set(BODIES), f"lost at call {n}"
            if stored_once(backend) or name != "publish":
                assert not story.again or backend.deviates("prefix-only"), f"again at call {n}"
        assert hits >= 3, "the fault has to hit, or nothing is shown"

    @pytest.mark.parametrize("kind", ["unavailable", "cut before", "cut after"])
    @pytest.mark.parametrize("name", ["publish", "claim", "extend", "settle"])
    def test_at_most_once_at_a_fault_in_each_call(
        self, backend: Backend, name: str, kind: str
    ) -> None:
        inner = backend.broker
        for n in range(1, 7):
            backend.broker = NthCall(name, kind, n).around(inner)
            # At-least-once: the publisher repeats, so that only a topic that drops repeats
            # says anything about handling twice.
            once = Guarantee.AT_MOST_ONCE
            topic = backend.topic(f"t{n}", guarantee="exactly-once", read_as=once)
            story = Story(backend, topic, once)
            story.publish(*BODIES)
            story.work(ROUNDS)
            story.finish()
            story.lane.close()
            copies = 1 if stored_once(backend) or name != "publish" else 2
            assert max(story.handled.values()) <= copies, f"handled twice at call {n}"
            assert len(story.handled) >= len(BODIES) - 3, f"more lost at call {n} than one claim"

    @pytest.mark.parametrize("kind", ["unavailable", "cut before"])
    def test_what_certainly_failed_is_not_there(self, backend: Backend, kind: str) -> None:
        topic = backend.topic()
        inner = backend.broker
        backend.broker = NthCall("publish", kind, 1).around(inner)
        backend.broker.publish([backend.message(topic, "lost")])
        backend.publish(topic, "kept")
        assert drain(backend.lane(topic)) == ["kept"]

    @pytest.mark.parametrize("call", ["publish", "claim", "settle", "extend", "close"])
    def test_what_ends_a_worker_settles_nothing(self, backend: Backend, call: str) -> None:
        """A KeyboardInterrupt, a cancellation, a failed assertion: at any call of the seam."""
        topic = backend.topic()
        backend.publish(topic, *"abc")
        seen = 0

        def interrupted(made: Call, perform: Callable[[Any], Any]) -> Any:
            nonlocal seen
            if made.name == call:
                seen += 1
                raise KeyboardInterrupt
            return perform(made.given)

        backend.broker = WrappedBroker(backend.broker, interrupted)
        lane = backend.lane(topic)
        try:
            deliveries = claim(lane)
            lane.extend([d.receipt for d in deliveries], LEASE_S)
            backend.publish(topic, "d")
            lane.settle([Done(deliveries[0].receipt)])
            lane.close()
        except KeyboardInterrupt:
            pass
        assert seen == 1
        backend.fall_silent()
        left = {"publish": "abc", "claim": "abc", "settle": "abcd", "extend": "abc", "close": "bcd"}
        assert sorted(drain(bare(lane))) == list(left[call])

    @pytest.mark.parametrize("when", ["before", "after"])
    @pytest.mark.parametrize("name", ["publish", "claim", "extend", "settle"])
    def test_a_call_that_takes_longer_than_a_lease(
        self, backend: Backend, name: str, when: str
    ) -> None:
        """A slow link, or a process that stood still: what comes too late is refused, not lost."""
        topic = backend.topic(guarantee="exactly-once")
        other = Story(backend, topic)
        slow = Slow(name, when, backend.clock)
        backend.broker = WrappedBroker(backend.broker, slow)
        story = Story(backend, topic)
        story.publish(*BODIES)
        for _ in range(ROUNDS):
            story.work(1)
            other.work(1)
        slow.name = ""
        story.finish()
        other.finish()
        assert slow.hits > 1
        assert {*story.handled, *other.handled} == set(BODIES)

    @pytest.mark.parametrize("seed", range(6))
    def test_at_least_once_under_random_faults(self, backend: Backend, seed: int) -> None:
        topic = backend.topic(guarantee="exactly-once")
        inner = backend.broker
        faults = Seeded(seed, rate=0.25)
        backend.broker = FaultyBroker(inner, faults)
        story = Story(backend, topic)
        for body in map(str, range(30)):
            story.publish(body)
            story.work(1)
        story.work(20)
        backend.broker, story.lane = inner, bare(story.lane)
        story.finish()
        assert len({kind for _, _, kind in faults.hits}) >= 4, f"seed {seed} hit too little"
        assert set(story.handled) == {str(number) for number in range(30)}, f"seed {seed}"
        if stored_once(backend) and backend.can.confirms_settlement:
            assert not story.again or backend.deviates("prefix-only"), f"seed {seed}"

    def test_an_unknown_settlement_may_have_happened(self, backend: Backend) -> None:
        """Its answer was lost: settling again is refused or accepted, and never harms."""
        for n, kind in enumerate(("cut before", "cut after")):
            topic = backend.topic(f"t{n}")
            backend.publish(topic, "a", "b")
            inner = backend.broker
            backend.broker = NthCall("settle", kind, 1).around(inner)
            lane = backend.lane(topic)
            deliveries = claim(lane)
            with pytest.raises(CommitUnknown):
                settle_done(lane, deliveries)
            refused = list(lane.settle([Done(d.receipt) for d in deliveries]))
            happened = kind == "cut after"
            assert refused == ([d.receipt for d in deliveries] if happened else [])
            backend.fall_silent()
            assert list(claim(lane)) == []
            lane.close()
            backend.broker = inner

    def test_a_claim_whose_answer_was_lost_comes_again(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "a", "b")
        inner = backend.broker
        backend.broker = NthCall("claim", "cut after", 1).around(inner)
        lane = backend.lane(topic)
        with pytest.raises(BrokerError):
            claim(lane)
        assert list(claim(lane)) == [], "the broker takes them for claimed"
        backend.fall_silent()
        got: list[str] = []
        for batch in batches(lane):
            got += bodies(batch)
            settle_done(lane, batch)
        assert got == ["a", "b"]

    def test_a_lease_that_ends_at_once_costs_only_a_repeat(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "a")
        inner = backend.broker
        backend.broker = NthCall("claim", "expire", 1).around(inner)
        lane = backend.lane(topic)
        [before] = claim(lane)
        backend.clock.advance(0.5)  # the least often that anybody looks for ended leases
        [after] = claim(lane)
        assert after.message.id == before.message.id
        assert list(lane.settle([Release(before.receipt)])) == [before.receipt]
        settle_done(lane, [after])


class Unconfirmed:
    """A settlement may be lost though it was answered, and messages may double or change places:
    then they come again, say that they may be repeats, and none is lost.
    """

    def test_a_lost_settlement_comes_again_and_says_so(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "a", "b")
        inner = backend.broker
        backend.broker = NthCall("settle", "lose", 1).around(inner)
        lane = backend.lane(topic)
        held = claim(lane)
        settle_done(lane, held)
        assert list(claim(lane)) == []
        backend.fall_silent()
        again: list[str] = []
        for batch in batches(lane):
            assert all(delivery.repeated for delivery in batch)
            again += bodies(batch)
            settle_done(lane, batch)
        assert again == ["a", "b"]

    @pytest.mark.parametrize("kind", ["duplicate", "reorder"])
    def test_what_doubles_or_changes_places_is_all_there(self, backend: Backend, kind: str) -> None:
        topic = backend.topic()
        inner = backend.broker
        backend.broker = NthCall("publish", kind, 1).around(inner)
        backend.publish(topic, *BODIES)
        assert set(drain(backend.lane(topic))) == set(BODIES)


class Confirmed:
    """When settle has answered, a settled message is never delivered again."""

    def test_not_after_its_worker_is_gone(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, *BODIES)
        for _ in BODIES:
            lane = backend.lane(topic)
            [first, *_] = claim(lane)
            settle_done(lane, [first])
            lane.close()
        assert list(claim(backend.lane(topic))) == []

    def test_not_after_its_worker_fell_silent(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, *BODIES)
        lane = backend.lane(topic)
        handled: list[str] = []
        for _ in range(2 * len(BODIES)):
            for delivery in claim(lane)[:1]:
                handled += bodies([delivery])
                settle_done(lane, [delivery])
            backend.fall_silent()
        assert handled == BODIES

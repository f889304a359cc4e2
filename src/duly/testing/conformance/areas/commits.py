"""Faults at the seam of a store: every call of an exactly-once round refused, cut and ended."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from duly.broker import Subscription
from duly.errors import CommitUnknown, DulyError, TransactionFailed
from duly.guarantees import Admission, Done, Guarantee, Release
from duly.message import Topic
from duly.testing.conformance.areas.admission import expected, handle, work
from duly.testing.conformance.areas.faults import NthCall, bare
from duly.testing.conformance.backend import Place, bodies, claim
from duly.testing.faulty import Faults, FaultyBroker, FaultyStore, make
from duly.testing.seam import Around, Call, WrappedBroker, WrappedStore

BODIES = list("abcdef")
# What a worker calls in one round, with the faults each may meet.
FAULTS = [
    ("claim", "unavailable"),
    ("claim", "cut after"),
    ("begin", "unavailable"),
    ("admit", "cut before"),
    ("admit", "cut after"),
    ("publish in transaction", "cut before"),
    ("publish in transaction", "cut after"),
    ("settle in transaction", "cut before"),
    ("settle in transaction", "cut after"),
    ("commit", "unavailable"),
    ("commit", "cut before"),
    ("commit", "cut after"),
    ("settle", "unavailable"),
    ("settle", "cut before"),
    ("settle", "cut after"),
]


class Interrupted:
    """Raises at the n-th call of one name: what is no `Exception` ends the worker there."""

    def __init__(self, name: str, n: int) -> None:
        self.name, self.n, self.hit = name, n, False

    def __call__(self, call: Call, perform: Callable[[Any], Any]) -> Any:
        if call.name == self.name:
            self.n -= 1
            if self.n == 0:
                self.hit = True
                raise KeyboardInterrupt
        return perform(call.given)


class Doubtful:
    """A broker that loses settlements and doubles and mixes what is published, now and then."""

    def __init__(self) -> None:
        self.roll = Random(1)
        self.turns = {
            "publish": itertools.cycle(["duplicate", "reorder", ""]),
            "settle": itertools.cycle(["lose", ""]),
        }
        self.hits: set[str] = set()

    def __call__(self, call: Call, perform: Callable[[Any], Any]) -> Any:
        kind = next(self.turns[call.name]) if call.name in self.turns else ""
        if not kind:
            return perform(call.given)
        self.hits.add(kind)
        return make(kind, call, perform, self.roll)


def put_around(place: Place, around: Around) -> Callable[[], None]:
    """Wrap broker and store; returns what takes it off again."""
    broker, store = place.backend.broker, place.store
    place.backend.broker, place.store = WrappedBroker(broker, around), WrappedStore(store, around)

    def take_off() -> None:
        place.backend.broker, place.store = broker, store

    return take_off


def go_on(place: Place, lane: Subscription, out: Topic[Any], rounds: int) -> None:
    """A worker that begins anew, after its lease, whenever a call ended it."""
    for _ in range(rounds):
        try:
            for _ in range(3):
                work(place, lane, out)
        except (DulyError, KeyboardInterrupt):
            pass
        place.backend.fall_silent()


class FaultsInTransactions:
    """At a fault in any call of a round effects and outputs are there once, together."""

    @pytest.mark.parametrize(("name", "kind"), FAULTS, ids=[" ".join(each) for each in FAULTS])
    def test_a_fault_in_each_call(self, place: Place, name: str, kind: str) -> None:
        out = place.topic("receipts")
        topic = place.backend.topic("orders")
        place.backend.publish(topic, *BODIES)
        fault = NthCall(name, kind, 1)
        take_off = put_around(place, fault)
        lane = place.backend.lane(topic, guarantee=Guarantee.EXACTLY_ONCE)
        go_on(place, lane, out, 4)
        take_off()
        go_on(place, bare(lane), out, len(BODIES))
        # By claim the commit settles, and without an outbox nothing is published.
        never = {"settle"} if place.admission is Admission.BY_CLAIM else set()
        never |= set() if place.publishes else {"publish in transaction"}
        assert fault.hit is (name not in never)
        assert dict(place.effects.rows()) == expected(*BODIES)
        place.check_outputs(out, [f"receipt of {body}" for body in BODIES])

    @pytest.mark.parametrize("name", ["claim", "begin", "admit", "settle in transaction", "commit"])
    def test_a_worker_that_is_ended_in_each_call(self, place: Place, name: str) -> None:
        out = place.topic("receipts")
        topic = place.backend.topic("orders")
        place.backend.publish(topic, *BODIES)
        fault = Interrupted(name, 1)
        take_off = put_around(place, fault)
        lane = place.backend.lane(topic, guarantee=Guarantee.EXACTLY_ONCE)
        with pytest.raises(KeyboardInterrupt):
            work(place, lane, out)
        assert fault.hit
        assert dict(place.effects.rows()) == {}, "a worker that was ended has settled nothing"
        take_off()
        place.backend.fall_silent()
        go_on(place, bare(lane), out, len(BODIES))
        assert dict(place.effects.rows()) == expected(*BODIES)
        place.check_outputs(out, [f"receipt of {body}" for body in BODIES])

    @pytest.mark.parametrize("seed", range(4))
    def test_random_faults(self, place: Place, seed: int) -> None:
        out = place.topic("receipts")
        topic = place.backend.topic("orders")
        names = [str(number) for number in range(20)]
        broker, store = place.backend.broker, place.store
        faults = Faults(seed, rate=0.15, kinds={"unavailable", "cut before", "cut after"})
        place.backend.broker = FaultyBroker(broker, faults)
        place.store = FaultyStore(store, faults)
        lane = place.backend.lane(topic, guarantee=Guarantee.EXACTLY_ONCE)
        for name in names:
            broker.publish([place.backend.message(topic, name)])
            go_on(place, lane, out, 1)
        place.backend.broker, place.store = broker, store
        go_on(place, bare(lane), out, len(names))
        assert len({kind for _, _, kind in faults.hits}) == 3, f"seed {seed} hit too little"
        assert dict(place.effects.rows()) == expected(*names), f"seed {seed}"
        place.check_outputs(out, [f"receipt of {name}" for name in names])

    def test_a_commit_that_failed_charges_nothing(self, place: Place) -> None:
        """A serialization failure or a deadlock is no failure of the handler."""
        out = place.topic("receipts")
        topic = place.backend.topic("orders")
        place.backend.publish(topic, "a")
        take_off = put_around(place, NthCall("commit", "unavailable", 1))
        lane = place.backend.lane(topic, guarantee=Guarantee.EXACTLY_ONCE)
        deliveries = claim(lane)
        session = place.begin()
        session.admit(deliveries)
        handle(place, session, out, deliveries[0])
        session.settle([Done(deliveries[0].receipt)], deliveries)
        with pytest.raises(TransactionFailed):
            session.commit()
        session.rollback()
        assert list(lane.settle([Release(deliveries[0].receipt)])) == []
        take_off()
        [again] = claim(lane)
        assert (again.attempt, again.alone) == (1, False)

    @pytest.mark.parametrize("kind", ["cut before", "cut after"])
    def test_a_commit_whose_answer_is_lost(self, place: Place, kind: str) -> None:
        """Neither success nor failure: the next one's admission finds out."""
        out = place.topic("receipts")
        topic = place.backend.topic("orders")
        place.backend.publish(topic, "a")
        take_off = put_around(place, NthCall("commit", kind, 1))
        lane = place.backend.lane(topic, guarantee=Guarantee.EXACTLY_ONCE)
        with pytest.raises(CommitUnknown):
            work(place, lane, out)
        take_off()
        applied = kind == "cut after"
        assert dict(place.effects.rows()) == (expected("a") if applied else {})
        place.store.begin(None).rollback()
        place.backend.fall_silent()
        fresh = [*work(place, lane, out), *work(place, lane, out)]
        assert bodies(fresh) == ([] if applied else ["a"])
        assert dict(place.effects.rows()) == expected("a")
        place.check_outputs(out, ["receipt of a"])


class DoubtInTransactions:
    """Beside a broker that confirms nothing: doubled, mixed and not forgotten, and once all the
    same.
    """

    admissions = frozenset({Admission.BY_INBOX})

    def test_effects_are_once_all_the_same(self, place: Place) -> None:
        out = place.topic("receipts")
        topic = place.backend.topic("orders", guarantee="exactly-once")
        doubt = Doubtful()
        take_off = put_around(place, doubt)
        lane = place.backend.lane(topic, guarantee=Guarantee.EXACTLY_ONCE)
        for number in range(0, 20, 4):
            place.backend.publish(topic, *(str(n) for n in range(number, number + 4)))
            go_on(place, lane, out, 2)
        take_off()
        go_on(place, bare(lane), out, 20)
        assert doubt.hits == {"duplicate", "reorder", "lose"}
        names = [str(number) for number in range(20)]
        assert dict(place.effects.rows()) == expected(*names)
        place.check_outputs(out, [f"receipt of {name}" for name in names])

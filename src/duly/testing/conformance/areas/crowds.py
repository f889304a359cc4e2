"""Many threads at once: nothing lost, nothing twice, nobody stuck."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

from duly.broker import Published
from duly.guarantees import Done, Guarantee, Release
from duly.testing.conformance.backend import (
    A_LOT,
    Backend,
    Patience,
    Place,
    bodies,
    claim,
    drain,
    kinds,
    together,
)

MESSAGES = 600


PUBLISHERS = 4


WORKERS = 4
A_MOMENT = threading.Event()  # nobody sets it


class Crowds:
    """Many threads at once: nothing lost, nothing twice, nobody stuck."""

    def test_publishers_and_workers_side_by_side(self, backend: Backend) -> None:
        backend.in_real_time()
        topic = backend.topic(partitions=8)
        lanes = [backend.lane(topic) for _ in range(WORKERS)]
        handled: Counter[str] = Counter()
        lock = threading.Lock()
        patience = Patience()

        def publish(n: int) -> None:
            for number in range(n, MESSAGES, PUBLISHERS):
                message = backend.message(topic, str(number), key=str(number % 50))
                assert isinstance(backend.broker.publish([message])[0], Published)

        def work(n: int) -> None:
            lane, count = lanes[n], 0
            while sum(handled.values()) < MESSAGES and patience:
                deliveries = lane.claim(20, A_LOT, 0.02)
                count += 1
                # Some give back now and then, as a worker does that is told to stop.
                end = Release if count % 7 == n else Done
                refused = set(lane.settle([end(delivery.receipt) for delivery in deliveries]))
                if end is Done:
                    with lock:
                        handled.update(bodies([d for d in deliveries if d.receipt not in refused]))

        together(
            *(lambda n=n: publish(n) for n in range(PUBLISHERS)),
            *(lambda n=n: work(n) for n in range(WORKERS)),
        )
        assert handled == Counter({str(number): 1 for number in range(MESSAGES)})

    def test_settling_and_extending_while_another_claims(self, backend: Backend) -> None:
        backend.in_real_time()
        topic = backend.topic(partitions=4)
        lane = backend.lane(topic)
        for number in range(200):
            backend.publish(topic, str(number), key=str(number))
        done: list[str] = []
        waiting: list[Any] = []
        finished = threading.Event()
        patience = Patience()

        def claim() -> None:
            while not finished.is_set() and patience:
                waiting.append(lane.claim(10, A_LOT, 0.01))

        def settle() -> None:
            while len(done) < 200 and patience:
                deliveries = waiting.pop(0) if waiting else ()
                receipts = [delivery.receipt for delivery in deliveries]
                assert list(lane.extend(receipts, 30.0)) == []
                assert list(lane.settle([Done(receipt) for receipt in receipts])) == []
                done.extend(bodies(deliveries))
            finished.set()

        together(claim, settle)
        assert sorted(done, key=int) == [str(number) for number in range(200)]

    def test_workers_come_and_go(self, backend: Backend) -> None:
        """They give back what they hold when they go, and lose it when others come."""
        backend.in_real_time()
        topic = backend.topic(partitions=8)
        for number in range(200):
            backend.publish(topic, str(number), key=str(number))
        handled: Counter[str] = Counter()
        lock = threading.Lock()
        patience = Patience()

        def work(n: int) -> None:
            while len(handled) < 200 and patience:
                lane = backend.lane(topic)
                # Of the first claim one is done and the rest given back, of others all is done.
                for some in (1, *[10] * n):
                    deliveries = lane.claim(10, A_LOT, 0.02)[:some]
                    refused = set(lane.settle([Done(d.receipt) for d in deliveries]))
                    with lock:
                        handled.update(bodies([d for d in deliveries if d.receipt not in refused]))
                lane.close()

        together(*(lambda n=n: work(n) for n in range(WORKERS)))
        assert set(handled) == {str(number) for number in range(200)}
        if not backend.deviates("prefix-only"):
            assert set(handled.values()) == {1}, "nothing that was settled came again"

    def test_settling_from_many_threads(self, backend: Backend) -> None:
        """Of several who settle one message, one is taken and the others are refused."""
        topic = backend.topic()
        backend.publish(topic, *(str(number) for number in range(40)))
        lane = backend.lane(topic)
        deliveries = claim(lane)
        taken: list[Any] = []

        def settle() -> None:
            for delivery in deliveries:
                refused = lane.settle([Done(delivery.receipt)])
                taken.extend({delivery.receipt} - set(refused))

        together(*([settle] * PUBLISHERS))
        assert Counter(taken) == {delivery.receipt: 1 for delivery in deliveries}


class IdentityInCrowds:
    """Many threads publish the same."""

    def test_one_identity_from_many_threads(self, backend: Backend) -> None:
        """One of them is published, whoever comes first."""
        topic = backend.topic(guarantee="exactly-once")
        outcomes: list[Any] = []

        def publish() -> None:
            for number in range(20):
                outcomes.extend(
                    backend.broker.publish([backend.message(topic, "same", id=str(number))])
                )

        together(*([publish] * PUBLISHERS))
        counted = Counter(kinds(outcomes))
        assert counted == {"Published": 20, "RepeatDropped": 20 * (PUBLISHERS - 1)}
        assert len(drain(backend.lane(topic))) == 20


class NoIdentityInCrowds:
    """Many threads publish the same, and nobody remembers."""

    def test_one_identity_from_many_threads(self, backend: Backend) -> None:
        """Each of them is stored: none is dropped by chance."""
        topic = backend.topic(guarantee="exactly-once")

        def publish() -> None:
            for number in range(20):
                backend.publish(topic, "same", id=str(number))

        together(*([publish] * PUBLISHERS))
        assert len(drain(backend.lane(topic))) == 20 * PUBLISHERS


class CrowdsInTransactions:
    """Exactly-once workers side by side."""

    def test_exactly_once_workers_side_by_side(self, place: Place) -> None:
        """Their transactions queue for the store; each message takes effect once."""
        backend = place.backend
        topic = backend.topic(partitions=4)
        lanes = [backend.lane(topic, guarantee=Guarantee.EXACTLY_ONCE) for _ in range(3)]
        for number in range(60):
            backend.publish(topic, str(number), key=str(number))
        turn = threading.Lock()  # the stores here wait for a turn only a moment

        def work(n: int) -> None:
            # Nothing to claim, again and again: whoever held the rest has long been done.
            idle = 0
            while len(place.effects.rows()) < 60 and idle < 100:
                deliveries = lanes[n].claim(5, A_LOT, 0.0)
                if not deliveries:
                    idle += 1
                    A_MOMENT.wait(0.01)
                    continue
                idle = 0
                with turn:
                    session = place.begin()
                    fresh = session.admit(deliveries).fresh
                    for body in bodies(fresh):
                        place.effects.insert(session.connection, body, f"worker {n}")
                    session.settle([Done(d.receipt) for d in fresh], fresh)
                    session.commit()
                place.settle(lanes[n], [Done(d.receipt) for d in deliveries])

        together(*(lambda n=n: work(n) for n in range(3)))
        assert sorted(place.effects.rows(), key=int) == [str(number) for number in range(60)]

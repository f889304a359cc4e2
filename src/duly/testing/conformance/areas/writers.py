"""How many transactions a store has open at once, and what the fence of admission does then."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import pytest

from duly.broker import Delivery
from duly.errors import BrokerUnavailable, Superseded, TransactionFailed
from duly.guarantees import Done, Guarantee
from duly.testing.conformance.backend import Place, bodies, claim

# Long enough for a second copy that does not wait to have come through.
A_MOMENT_S = 0.2


class OneWriter:
    """One transaction at a time."""

    def test_one_writer_at_a_time(self, place: Place) -> None:
        session = place.store.begin(None)
        with pytest.raises(BrokerUnavailable):
            place.store.begin(None)
        session.rollback()
        place.store.begin(None).rollback()


class ManyWriters:
    """Several at once. A second copy of a message waits at the fence, or is refused."""

    def test_transactions_stand_side_by_side(self, place: Place) -> None:
        sessions = [place.store.begin(None) for _ in range(3)]
        for number, session in enumerate(sessions):
            place.effects.insert(session.connection, str(number), "row")
        assert dict(place.effects.rows()) == {}, "nobody sees what is not committed"
        for session in sessions:
            session.commit()
        assert dict(place.effects.rows()) == {"0": "row", "1": "row", "2": "row"}

    def test_different_messages_do_not_wait_for_each_other(self, place: Place) -> None:
        topic = place.backend.topic("orders", partitions=8)
        for number in range(2):
            place.backend.publish(topic, str(number), key=str(number))
        lane = place.backend.lane(topic, guarantee=Guarantee.EXACTLY_ONCE)
        deliveries = claim(lane)
        if len({delivery.position and delivery.position.log for delivery in deliveries}) == 1:
            deliveries = deliveries[:1]  # of one partition: its cursor is one
        sessions = [place.begin() for _ in deliveries]
        for session, delivery in zip(sessions, deliveries, strict=True):
            assert list(session.admit([delivery]).fresh) == [delivery]
        for session, delivery in zip(sessions, deliveries, strict=True):
            [body] = bodies([delivery])
            place.effects.insert(session.connection, body, "row")
            session.settle([Done(delivery.receipt)], [delivery])
            session.commit()
        assert len(place.effects.rows()) == len(deliveries)

    @pytest.mark.parametrize("end", ["commit", "rollback"])
    def test_a_second_copy_does_not_run_beside_the_first(self, place: Place, end: str) -> None:
        topic = place.backend.topic("orders")
        place.backend.publish(topic, "a")
        deliveries = claim(place.backend.lane(topic, guarantee=Guarantee.EXACTLY_ONCE))
        first = place.begin()
        assert list(first.admit(deliveries).fresh) == list(deliveries)
        with ThreadPoolExecutor(1) as pool:
            second = pool.submit(fresh_in, place, deliveries)
            wait([second], A_MOMENT_S)
            ran_beside = second.done() and bool(second.result())
            place.effects.insert(first.connection, "a", "row")
            first.settle([Done(deliveries[0].receipt)], deliveries)
            getattr(first, end)()
            if end == "rollback":
                first.rollback()
            assert not ran_beside, "a second copy was admitted while the first was open"
            assert second.result(10) == (["a"] if end == "rollback" else [])

    def test_many_copies_at_once_take_effect_once(self, place: Place) -> None:
        topic = place.backend.topic("orders")
        place.backend.publish(topic, "a")
        deliveries = claim(place.backend.lane(topic, guarantee=Guarantee.EXACTLY_ONCE))
        start = threading.Barrier(4)

        def work() -> list[str]:
            start.wait(10)
            return fresh_in(place, deliveries)

        with ThreadPoolExecutor(4) as pool:
            copies: list[Future[list[str]]] = [pool.submit(work) for _ in range(4)]
        assert sorted(copy.result() for copy in copies) == [[], [], [], ["a"]]
        assert dict(place.effects.rows()) == {"a": "row"}


def fresh_in(place: Place, deliveries: Sequence[Delivery]) -> list[str]:
    """One transaction with these; which were fresh and took effect."""
    session = place.begin()
    try:
        fresh = session.admit(deliveries).fresh
        for body in bodies(fresh):
            place.effects.insert(session.connection, body, "row")
        session.settle([Done(delivery.receipt) for delivery in fresh], fresh)
        session.commit()
    except (Superseded, TransactionFailed):
        return []
    finally:
        session.rollback()
    return bodies(fresh)

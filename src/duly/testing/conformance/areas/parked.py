"""What a store parks of a log: with the transaction that passes it, and taken by one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from duly.broker import Delivery
from duly.errors import Superseded
from duly.guarantees import Admission, Dead, Done, Release, Retry, Settlement
from duly.inspection import Selection
from duly.inspection.graves import graveyard_of
from duly.message import Topic
from duly.store import Parked, ParkedReceipt
from duly.testing.conformance.areas.cursor import lane_of
from duly.testing.conformance.backend import A_LOT, LEASE_S, Place, bodies, claim, together

TOPICS = ("orders",)


def parked(place: Place) -> Parked:
    """What the store has parked."""
    assert place.parked is not None, "the page says that it parks"
    return place.parked


def fail(
    place: Place, deliveries: Sequence[Delivery], delay_s: float = 0.0, *, charged: bool = True
) -> None:
    """One transaction by cursor, in which these fail."""
    session = place.begin(parks=True)
    session.admit(deliveries)
    session.settle([Retry(d.receipt, delay_s, "no", charged) for d in deliveries], deliveries)
    session.commit()


def park(place: Place, topic: Topic[Any], *names: str, delay_s: float = 0.0) -> list[Delivery]:
    """Messages that have failed once, and wait."""
    place.backend.publish(topic, *names)
    lane = lane_of(place, topic)
    deliveries = [*claim(lane)]
    fail(place, deliveries, delay_s)
    lane.settle([Done(delivery.receipt) for delivery in deliveries])
    lane.close()
    a_moment(place)
    return deliveries


def a_moment(place: Place) -> None:
    """What parks may go by the real clock, which is a little ahead."""
    place.backend.clock.advance(1)


def take(place: Place, limit: int = 100, max_bytes: int = A_LOT) -> list[Delivery]:
    """What may be taken now."""
    return [*parked(place).take("sub", TOPICS, limit, max_bytes, LEASE_S)]


def settle(place: Place, deliveries: Sequence[Delivery], *ends: Settlement, **scope: Any) -> None:
    """One transaction with parked messages; those that are done have an effect."""
    settlements = ends or [Done(delivery.receipt) for delivery in deliveries]
    session = place.begin(parks=True, **scope)
    try:
        session.admit(deliveries)
        for delivery, settlement in zip(deliveries, settlements, strict=True):
            if isinstance(settlement, Done):
                place.effects.insert(session.connection, bodies([delivery])[0], "row")
        session.settle(settlements, deliveries)
        session.commit()
    finally:
        session.rollback()


def left(place: Place) -> tuple[int, int]:
    """How many wait, and are taken."""
    found = [each for each in parked(place).waiting() if each.consumer == "sub"]
    return sum(each.parked for each in found), sum(each.in_flight for each in found)


class Parking:
    """A retry waits in the store, behind the cursor: one has it at a time, and it ends once."""

    admissions = frozenset({Admission.BY_CURSOR})

    @pytest.fixture
    def topic(self, place: Place) -> Topic[Any]:
        return place.backend.topic("orders")

    # --- parking

    def test_the_cursor_passes_what_is_parked(self, place: Place, topic: Topic[Any]) -> None:
        place.backend.publish(topic, *"abc")
        deliveries = claim(lane_of(place, topic))
        first, bad, last = (delivery.receipt for delivery in deliveries)
        session = place.begin(parks=True)
        session.admit(deliveries)
        session.settle([Done(first), Retry(bad, 0.0, "no"), Done(last)], deliveries)
        session.commit()
        session = place.begin(parks=True)
        assert bodies(session.admit(deliveries).repeated) == ["a", "b", "c"]
        session.rollback()
        a_moment(place)
        assert bodies(take(place)) == ["b"]

    def test_it_is_parked_by_the_transaction_or_not_at_all(
        self, place: Place, topic: Topic[Any]
    ) -> None:
        place.backend.publish(topic, "a")
        deliveries = claim(lane_of(place, topic))
        session = place.begin(parks=True)
        session.admit(deliveries)
        session.settle([Retry(deliveries[0].receipt, 0.0, "no")], deliveries)
        session.rollback()
        a_moment(place)
        assert take(place) == []
        session = place.begin(parks=True)
        assert bodies(session.admit(deliveries).fresh) == ["a"]
        session.rollback()

    def test_where_the_scope_does_not_say_so_nothing_is_parked(
        self, place: Place, topic: Topic[Any]
    ) -> None:
        place.backend.publish(topic, "a")
        deliveries = claim(lane_of(place, topic))
        session = place.begin()
        session.admit(deliveries)
        session.settle([Retry(deliveries[0].receipt, 0.0, "no")], deliveries)
        session.commit()
        assert left(place) == (0, 0)
        session = place.begin()
        assert bodies(session.admit(deliveries).fresh) == ["a"]
        session.rollback()

    def test_what_is_given_back_stays_in_its_place(self, place: Place, topic: Topic[Any]) -> None:
        place.backend.publish(topic, "a")
        deliveries = claim(lane_of(place, topic))
        session = place.begin(parks=True)
        session.admit(deliveries)
        session.settle([Release(deliveries[0].receipt)], deliveries)
        session.commit()
        assert left(place) == (0, 0)

    def test_it_comes_back_whole(self, place: Place, topic: Topic[Any]) -> None:
        headers = {"tenant": "blue"}
        [message] = place.backend.publish(topic, "grüße", key="k", headers=headers)
        [delivery] = claim(lane_of(place, topic))
        fail(place, [delivery])
        a_moment(place)
        [taken] = take(place)
        assert taken.message == message
        assert (taken.attempt, taken.repeated, taken.alone, taken.replays) == (2, True, False, 0)
        assert taken.position is not None
        assert delivery.position is not None
        assert taken.position.log == delivery.position.log
        assert taken.position.offset == delivery.position.offset

    def test_what_was_never_started_is_not_charged(self, place: Place, topic: Topic[Any]) -> None:
        place.backend.publish(topic, "a")
        fail(place, claim(lane_of(place, topic)), charged=False)
        a_moment(place)
        [taken] = take(place)
        assert (taken.attempt, taken.repeated) == (1, False)

    # --- taking

    def test_it_waits_until_it_is_due(self, place: Place, topic: Topic[Any]) -> None:
        assert parked(place).next_s("sub", TOPICS) is None
        park(place, topic, "a", delay_s=60.0)
        next_s = parked(place).next_s("sub", TOPICS)
        assert next_s is not None
        assert 50 < next_s <= 60
        assert take(place) == []
        place.backend.clock.advance(61)
        next_s = parked(place).next_s("sub", TOPICS)
        assert next_s is not None
        assert next_s <= 0
        assert bodies(take(place)) == ["a"]

    def test_a_clock_that_is_set_back_lets_nothing_wait_for_it(
        self, place: Place, topic: Topic[Any]
    ) -> None:
        park(place, topic, "a", delay_s=60.0)
        place.backend.clock.step(-3600.0)
        assert take(place) == []
        next_s = parked(place).next_s("sub", TOPICS)
        assert next_s is not None
        assert 50 < next_s <= 60
        place.backend.clock.advance(61)
        [again] = take(place)
        settle(place, [again], Retry(again.receipt, 60.0, "no"))
        place.backend.clock.step(-3600.0)
        assert take(place) == []
        place.backend.clock.advance(61)
        assert bodies(take(place)) == ["a"]

    def test_nobody_else_takes_what_is_taken(self, place: Place, topic: Topic[Any]) -> None:
        park(place, topic, *"abc")
        assert bodies(take(place, 2)) == ["a", "b"]
        assert bodies(take(place)) == ["c"]
        assert take(place) == []
        assert left(place) == (0, 3)
        next_s = parked(place).next_s("sub", TOPICS)
        assert next_s is not None
        assert LEASE_S - 5 < next_s <= LEASE_S

    def test_a_claim_has_so_many_bytes(self, place: Place, topic: Topic[Any]) -> None:
        park(place, topic, "a" * 100, "b" * 100, "c" * 100)
        assert len(take(place, max_bytes=250)) == 2
        assert len(take(place, max_bytes=1)) == 1, "at least one"

    def test_from_many_threads_each_is_taken_once(self, place: Place, topic: Topic[Any]) -> None:
        names = [str(number) for number in range(40)]
        park(place, topic, *names)
        taken: list[str] = []

        def work() -> None:
            for _ in range(40):
                taken.extend(bodies(take(place, 3)))

        together(*[work] * 4)
        assert sorted(taken) == sorted(names)

    def test_consumers_and_topics_are_told_apart(self, place: Place, topic: Topic[Any]) -> None:
        park(place, topic, "a")
        can = parked(place)
        assert list(can.take("another", TOPICS, 9, A_LOT, LEASE_S)) == []
        assert list(can.take("sub", ("news",), 9, A_LOT, LEASE_S)) == []
        assert can.next_s("sub", ("news",)) is None
        assert bodies(can.take("sub", ("news", "orders"), 9, A_LOT, LEASE_S)) == ["a"]

    def test_they_are_counted(self, place: Place, topic: Topic[Any]) -> None:
        assert list(parked(place).waiting()) == []
        messages = park(place, topic, *"abc")
        take(place, 1)
        [waits] = parked(place).waiting()
        assert (waits.consumer, waits.topic, waits.parked, waits.in_flight) == (
            "sub",
            "orders",
            2,
            1,
        )
        assert waits.oldest_ms == min(each.message.time_ms for each in messages)

    # --- one transaction

    def test_its_end_and_its_effects_are_one(self, place: Place, topic: Topic[Any]) -> None:
        park(place, topic, "a")
        taken = take(place)
        session = place.begin(parks=True)
        session.admit(taken)
        place.effects.insert(session.connection, "a", "row")
        session.settle([Done(taken[0].receipt)], taken)
        session.rollback()
        assert (left(place), dict(place.effects.rows())) == ((0, 1), {})
        settle(place, taken)
        assert (left(place), dict(place.effects.rows())) == ((0, 0), {"a": "row"})

    def test_what_has_ended_does_not_end_again(self, place: Place, topic: Topic[Any]) -> None:
        park(place, topic, "a")
        taken = take(place)
        settle(place, taken)
        session = place.begin(parks=True)
        with pytest.raises(Superseded):
            session.admit(taken)
        session.rollback()
        assert list(parked(place).give_back([Release(taken[0].receipt)])) == [taken[0].receipt]
        assert take(place) == []

    def test_it_fails_again(self, place: Place, topic: Topic[Any]) -> None:
        park(place, topic, "a", "b")
        taken = take(place)
        settle(place, taken, Retry(taken[0].receipt, 60.0, "still no"), Done(taken[1].receipt))
        assert (left(place), take(place)) == ((1, 0), [])
        place.backend.clock.advance(61)
        [again] = take(place)
        assert (bodies([again]), again.attempt) == (["a"], 3)
        assert again.receipt.token > taken[0].receipt.token, "a token only grows"

    def test_given_up_on_it_is_dead_and_shown(self, place: Place, topic: Topic[Any]) -> None:
        [original] = park(place, topic, "a")
        taken = take(place)
        settle(place, taken, Dead(taken[0].receipt, "never"), buries=True)
        assert left(place) == (0, 0)
        session = place.begin(parks=True)
        assert bodies(session.admit([original]).dead) == ["a"], "the log delivers it again"
        session.rollback()
        yard = graveyard_of(place.store)
        if yard is not None:
            [letter] = yard.select(Selection("sub"), 10)
            assert (letter.error, letter.attempts, letter.replays) == ("never", 2, 0)
            assert letter.message == original.message

    def test_what_another_shows_is_not_shown_by_the_store(
        self, place: Place, topic: Topic[Any]
    ) -> None:
        park(place, topic, "a")
        taken = take(place)
        settle(place, taken, Dead(taken[0].receipt, "never"))
        yard = graveyard_of(place.store)
        assert yard is None or list(yard.select(Selection(), 10)) == []

    # --- leases

    def test_a_lease_that_is_over_is_another_ones(self, place: Place, topic: Topic[Any]) -> None:
        park(place, topic, "a")
        lost = take(place)
        place.backend.fall_silent()
        [found] = take(place)
        assert found.receipt.token > lost[0].receipt.token
        session = place.begin(parks=True)
        with pytest.raises(Superseded):
            session.admit(lost)
        session.rollback()
        old = lost[0].receipt
        assert list(parked(place).extend([old], LEASE_S)) == [old]
        assert list(parked(place).give_back([Release(old)])) == [old]
        settle(place, [found])
        assert left(place) == (0, 0)

    def test_a_lease_can_be_made_longer(self, place: Place, topic: Topic[Any]) -> None:
        park(place, topic, "a")
        [taken] = take(place)
        place.backend.clock.advance(LEASE_S - 5)
        assert list(parked(place).extend([taken.receipt], LEASE_S)) == []
        place.backend.clock.advance(LEASE_S - 5)
        assert take(place) == []
        settle(place, [taken])

    def test_a_lease_is_made_longer_while_its_transaction_is_open(
        self, place: Place, topic: Topic[Any]
    ) -> None:
        if place.store.capabilities.one_writer:
            return  # who extends waits for the writer
        park(place, topic, "a")
        taken = take(place)
        session = place.begin(parks=True)
        session.admit(taken)
        assert list(parked(place).extend([taken[0].receipt], LEASE_S)) == []
        place.backend.fall_silent()
        assert take(place) == [], "it is fenced"
        session.settle([Done(taken[0].receipt)], taken)
        session.commit()
        assert left(place) == (0, 0)

    def test_a_death_among_several_is_nobodys_and_then_each_comes_alone(
        self, place: Place, topic: Topic[Any]
    ) -> None:
        park(place, topic, "a", "b")
        assert [each.attempt for each in take(place)] == [2, 2]
        place.backend.fall_silent()
        [first] = take(place)
        assert (first.attempt, first.alone, first.repeated) == (2, True, True)
        [second] = take(place)
        assert (second.attempt, second.alone) == (2, True)
        assert {*bodies([first, second])} == {"a", "b"}

    def test_a_death_alone_is_charged_before_the_start(
        self, place: Place, topic: Topic[Any]
    ) -> None:
        park(place, topic, "a")
        take(place)
        attempts = []
        for _ in range(3):
            place.backend.fall_silent()
            [taken] = take(place)
            attempts.append(taken.attempt)
        assert attempts == [2, 3, 4]

    def test_one_that_was_asked_for_singly_is_charged(
        self, place: Place, topic: Topic[Any]
    ) -> None:
        park(place, topic, "a")
        take(place, 1)
        place.backend.fall_silent()
        assert [each.attempt for each in take(place, 1)] == [3]

    def test_what_is_given_back_is_not_charged(self, place: Place, topic: Topic[Any]) -> None:
        park(place, topic, "a")
        take(place)
        place.backend.fall_silent()
        [alone] = take(place)
        assert list(parked(place).give_back([Release(alone.receipt)])) == []
        [again] = take(place)
        assert (again.attempt, again.alone) == (2, True)
        with pytest.raises(Superseded):
            settle(place, [alone])

    # --- what people do

    def test_a_replay_is_parked_and_due_at_once(self, place: Place, topic: Topic[Any]) -> None:
        yard = graveyard_of(place.store)
        if yard is None:
            return
        [original] = park(place, topic, "a")
        taken = take(place)
        settle(place, taken, Dead(taken[0].receipt, "never"), buries=True)
        [letter] = yard.select(Selection("sub"), 10)
        assert list(parked(place).replay([letter])) == []
        assert list(parked(place).replay([letter])) == [letter], "it is no dead letter any more"
        a_moment(place)
        [again] = take(place)
        assert again.message == original.message
        assert (again.attempt, again.replays, again.repeated) == (1, 1, False)
        session = place.begin(parks=True)
        assert bodies(session.admit([original]).repeated) == ["a"], "the log delivers it again"
        session.rollback()
        settle(place, [again], Dead(again.receipt, "never ever"), buries=True)
        assert [each.replays for each in yard.select(Selection("sub"), 10)] == [1]

    def test_what_another_has_removed_is_brought_back(
        self, place: Place, topic: Topic[Any]
    ) -> None:
        yard = graveyard_of(place.store)
        if yard is None:
            return
        park(place, topic, "a")
        taken = take(place)
        settle(place, taken, Dead(taken[0].receipt, "never"), buries=True)
        letters = yard.select(Selection("sub"), 10)
        yard.remove(letters)
        parked(place).bring_back(letters)
        a_moment(place)
        assert [(each.attempt, each.replays) for each in take(place)] == [(1, 1)]


class ParkingDurably:
    """What is parked is there, whatever dies."""

    admissions = frozenset({Admission.BY_CURSOR})

    def test_it_survives(self, place: Place) -> None:
        park(place, place.backend.topic("orders"), *"abc")
        [first, *_] = take(place, 1)
        place.reopen()
        assert left(place) == (2, 1)
        assert bodies(take(place)) == ["b", "c"]
        receipt = first.receipt
        assert isinstance(receipt, ParkedReceipt)
        assert list(parked(place).extend([receipt], LEASE_S)) == []
        settle(place, [first])
        assert left(place) == (0, 2)

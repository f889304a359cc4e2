"""Admission: effects, outputs and the memory of the message become true together, once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from duly.broker import Delivery
from duly.errors import Superseded
from duly.guarantees import Admission, Dead, Done, Guarantee, Release, Retry, Settlement
from duly.message import Topic
from duly.store import Session
from duly.testing.conformance.backend import Place, bodies, claim

EXACTLY = Guarantee.EXACTLY_ONCE


class Crash(BaseException):
    """The worker dies here."""


def handle(place: Place, session: Session[Any], out: Topic[Any], delivery: Delivery) -> None:
    """Two rows and an output, as a torn transaction would show."""
    body = bodies([delivery])[0]
    place.effects.insert(session.connection, f"{body} first", "row")
    place.effects.insert(session.connection, f"{body} second", "row")
    if place.publishes:
        session.publish([place.backend.message(out, f"receipt of {body}")])


def work(place: Place, lane: Any, out: Topic[Any], *, die_at: str = "") -> Sequence[Delivery]:
    """One round of an exactly-once worker, that dies at a step. Returns what was fresh."""

    def step(name: str) -> None:
        if name == die_at:
            raise Crash(name)

    deliveries = claim(lane)
    if not deliveries:
        return ()
    step("claimed")
    session = place.begin()
    try:
        step("begun")
        admitted = session.admit(deliveries)
        step("admitted")
        for delivery in admitted.fresh:
            handle(place, session, out, delivery)
        step("handled")
        session.settle([Done(d.receipt) for d in admitted.fresh], admitted.fresh)
        step("settled")
        session.commit()
    except BaseException:
        session.rollback()
        raise
    step("committed")
    place.settle(lane, [Done(d.receipt) for d in (*admitted.fresh, *admitted.repeated)])
    step("told")
    return admitted.fresh


def expected(*names: str) -> dict[str, str]:
    """The rows of those that took effect."""
    return {f"{body} {which}": "row" for body in names for which in ("first", "second")}


STEPS = ["claimed", "begun", "admitted", "handled", "settled", "committed", "told"]


class ExactlyOnce:
    """Effects, outputs and the memory of the message become true together, once."""

    @pytest.fixture
    def topic(self, place: Place) -> Topic[Any]:
        return place.backend.topic("orders")

    @pytest.fixture
    def out(self, place: Place) -> Topic[Any]:
        return place.topic("receipts")

    @pytest.mark.parametrize("die_at", ["", *STEPS])
    def test_a_crash_at_any_step_leaves_effects_and_outputs_once(
        self, place: Place, topic: Topic[Any], out: Topic[Any], die_at: str
    ) -> None:
        place.backend.publish(topic, "a", "b")
        lane = place.backend.lane(topic, guarantee=EXACTLY)
        try:
            work(place, lane, out, die_at=die_at)
        except Crash:
            before = die_at in STEPS[: STEPS.index("committed")]
            assert place.effects.rows() == ({} if before else expected("a", "b"))
        for _ in range(4):
            place.backend.fall_silent()
            work(place, lane, out)
        assert place.effects.rows() == expected("a", "b")
        place.check_outputs(out, ["receipt of a", "receipt of b"])

    @pytest.mark.parametrize("first", STEPS)
    def test_two_crashes_at_any_steps_leave_effects_and_outputs_once(
        self, place: Place, out: Topic[Any], first: str
    ) -> None:
        for second in STEPS:
            topic = place.backend.topic(f"orders-{second}", read_by=(f"sub-{second}",))
            place.backend.publish(topic, second)
            lane = place.backend.lane(topic, name=f"sub-{second}", guarantee=EXACTLY)
            for die_at in (first, second, ""):
                try:
                    work(place, lane, out, die_at=die_at)
                except Crash:
                    place.backend.fall_silent()
            place.backend.fall_silent()
            work(place, lane, out)
            lane.close()
        assert place.effects.rows() == expected(*STEPS)
        place.check_outputs(out, [f"receipt of {body}" for body in STEPS])

    def test_nobody_sees_effects_before_the_commit(
        self, place: Place, topic: Topic[Any], out: Topic[Any]
    ) -> None:
        place.backend.publish(topic, "a")
        lane = place.backend.lane(topic, guarantee=EXACTLY)
        [delivery] = claim(lane)
        session = place.begin()
        session.admit([delivery])
        handle(place, session, out, delivery)
        session.settle([Done(delivery.receipt)], [delivery])
        assert place.effects.rows() == {}
        session.commit()
        assert place.effects.rows() == expected("a")

    def test_a_superseded_claim_does_not_commit(
        self, place: Place, topic: Topic[Any], out: Topic[Any]
    ) -> None:
        """The zombie wakes up after its successor has finished."""
        place.backend.publish(topic, "a")
        zombie = place.backend.lane(topic, guarantee=EXACTLY)
        held = claim(zombie)
        successor = place.backend.lane(topic, guarantee=EXACTLY)
        place.backend.fall_silent()
        assert len(work(place, successor, out)) == 1 or len(work(place, successor, out)) == 1
        session = place.begin()
        try:
            admitted = session.admit(held)
        except Superseded:
            assert place.admission is Admission.BY_CLAIM
        else:
            assert admitted.fresh == []
            assert list(admitted.repeated) == list(held)
        session.rollback()
        assert place.effects.rows() == expected("a")

    def test_a_claim_lost_before_admission_is_superseded(
        self, place: Place, topic: Topic[Any], out: Topic[Any]
    ) -> None:
        """The successor has claimed and not started: by claim the zombie is fenced at once, by
        cursor and inbox the first to commit wins.
        """
        place.backend.publish(topic, "a")
        zombie = place.backend.lane(topic, guarantee=EXACTLY)
        held = claim(zombie)
        successor = place.backend.lane(topic, guarantee=EXACTLY)
        place.backend.fall_silent()
        taken = claim(successor) or claim(successor)
        assert len(taken) == 1
        session = place.begin()
        if place.admission is Admission.BY_CLAIM:
            with pytest.raises(Superseded):
                session.admit(held)
            session.rollback()
            return
        assert list(session.admit(held).fresh) == list(held)
        handle(place, session, out, held[0])
        session.settle([Done(held[0].receipt)], held)
        session.commit()
        session = place.begin()
        admitted = session.admit(taken)
        assert list(admitted.fresh) == []
        assert list(admitted.repeated) == list(taken)
        session.rollback()
        assert place.effects.rows() == expected("a")

    def test_only_what_ran_is_settled(
        self, place: Place, topic: Topic[Any], out: Topic[Any]
    ) -> None:
        place.backend.publish(topic, "a", "b", "c")
        lane = place.backend.lane(topic, guarantee=EXACTLY)
        deliveries = claim(lane)
        session = place.begin()
        admitted = session.admit(deliveries)
        handle(place, session, out, admitted.fresh[0])
        ends: list[Settlement] = [Done(admitted.fresh[0].receipt)]
        told = admitted.fresh[:1]
        if place.admission is Admission.BY_INBOX:
            # An inbox has taken the ids of all; those that did not run are given back.
            ends += [Release(d.receipt) for d in admitted.fresh[1:]]
            told = admitted.fresh
        session.settle(ends, told)
        session.commit()
        place.settle(lane, [Done(deliveries[0].receipt)])
        session = place.begin()
        rest = session.admit(deliveries[1:])
        assert bodies(rest.fresh) == ["b", "c"]
        for delivery in rest.fresh:
            handle(place, session, out, delivery)
        session.settle([Done(d.receipt) for d in rest.fresh], rest.fresh)
        session.commit()
        place.settle(lane, [Done(d.receipt) for d in rest.fresh])
        place.backend.fall_silent()
        assert list(claim(lane)) == []
        assert place.effects.rows() == expected("a", "b", "c")

    @pytest.mark.parametrize("kind", [Retry, Release])
    def test_what_is_not_done_may_run_again(
        self, place: Place, topic: Topic[Any], out: Topic[Any], kind: Any
    ) -> None:
        place.backend.publish(topic, "a")
        lane = place.backend.lane(topic, guarantee=EXACTLY)
        deliveries = claim(lane)
        session = place.begin()
        session.admit(deliveries)
        receipt = deliveries[0].receipt
        end: Settlement = Release(receipt) if kind is Release else Retry(receipt, 0.0, "no")
        session.settle([end], deliveries)
        session.commit()
        place.settle(lane, [end])
        place.backend.clock.advance(1)  # a store may go by the real clock, which is a little ahead
        assert bodies(work(place, lane, out)) == ["a"]
        assert place.effects.rows() == expected("a")

    def test_a_dead_one_does_not_run_again(
        self, place: Place, topic: Topic[Any], out: Topic[Any]
    ) -> None:
        place.backend.publish(topic, "bad", "good")
        lane = place.backend.lane(topic, guarantee=EXACTLY)
        deliveries = claim(lane)
        session = place.begin()
        session.admit(deliveries)
        handle(place, session, out, deliveries[1])
        ends: list[Settlement] = [
            Dead(deliveries[0].receipt, "never"),
            Done(deliveries[1].receipt),
        ]
        session.settle(ends, deliveries)
        session.commit()
        place.settle(lane, ends)
        place.backend.fall_silent()
        assert list(work(place, lane, out)) == []
        assert place.effects.rows() == expected("good")


class Savepoints:
    """One message is undone and no more."""

    @pytest.fixture
    def topic(self, place: Place) -> Topic[Any]:
        return place.backend.topic("orders")

    @pytest.fixture
    def out(self, place: Place) -> Topic[Any]:
        return place.topic("receipts")

    def test_a_savepoint_undoes_one_message_and_no_more(
        self, place: Place, topic: Topic[Any], out: Topic[Any]
    ) -> None:
        place.backend.publish(topic, "good", "bad", "fine")
        lane = place.backend.lane(topic, guarantee=EXACTLY)
        good, bad, fine = deliveries = claim(lane)
        session = place.begin()
        session.admit(deliveries)
        for delivery in deliveries:
            session.savepoint()
            handle(place, session, out, delivery)
            if delivery is bad:
                session.rollback_to_savepoint()
            else:
                session.release_savepoint()
        ends: list[Settlement] = [
            Done(good.receipt),
            Dead(bad.receipt, "rolled back"),
            Done(fine.receipt),
        ]
        session.settle(ends, deliveries)
        session.commit()
        assert place.effects.rows() == expected("good", "fine")
        place.check_outputs(out, ["receipt of fine", "receipt of good"])

    def test_the_same_key_can_be_used_again_after_an_undo(self, place: Place) -> None:
        session = place.store.begin(None)
        session.savepoint()
        place.effects.insert(session.connection, "k", "undone")
        session.rollback_to_savepoint()
        place.effects.insert(session.connection, "k", "kept")
        session.commit()
        assert place.effects.rows() == {"k": "kept"}

"""One accused message at a time has its worker to itself, and nobody waits for it for ever."""

from __future__ import annotations

from pathlib import Path

import pytest

from duly.brokers.sqlite import SQLiteBroker
from duly.guarantees import Dead
from duly.message import Topic
from duly.sql.solitude import FIRST_PATIENCE_S, Solitude
from tests.sqlite.brokers import BIG, Hands, bodies, claim, done, drain, opened, options, publish

LEFT = Topic("left", bytes, guarantee="at-least-once")
RIGHT = Topic("right", bytes, guarantee="at-least-once")


class Office:
    """A worker with two consumers, each of which has one message that was claimed alone."""

    def __init__(self, path: Path, hands: Hands | None = None) -> None:
        self.path = path
        self.hands = hands or Hands()
        self.broker = opened(path, LEFT, RIGHT, hands=self.hands)
        self.left = self.broker.subscribe([LEFT], "left", options())
        self.right = self.broker.subscribe([RIGHT], "right", options())

    def successor(self) -> Office:
        """Another process, when what this one held is lost."""
        self.hands.advance(31)
        return Office(self.path, self.hands)

    def accuse_both(self) -> None:
        """Two losses: of calls for one, and of what was alone in its claim."""
        publish(self.broker, LEFT, ["poison"])
        publish(self.broker, RIGHT, ["innocent"])
        for alone in (False, True):
            held = [*claim(self.left, 1), *claim(self.right, 1)]
            assert [(d.attempt, d.alone) for d in held] == [(1, alone)] * 2
            self.hands.advance(31)


@pytest.fixture
def office(tmp_path: Path) -> Office:
    return Office(tmp_path / "duly.db")


def charged(broker: SQLiteBroker) -> list[str | None]:
    return [i.subscription for i in broker.incidents() if i.detail.endswith(", charged")]


def test_who_was_alone_in_its_claim_only_is_charged_nothing(office: Office):
    office.accuse_both()
    assert bodies(claim(office.left)) == ["poison"]
    assert charged(office.broker) == []


def test_each_further_death_has_one_culprit(office: Office):
    office.accuse_both()
    for attempt in (1, 2, 3):
        [poison] = claim(office.left)
        assert (poison.attempt, poison.alone) == (attempt, True)
        assert claim(office.right) == [], "nothing beside it"
        office = office.successor()
    [poison] = claim(office.left)
    office.left.settle(done([poison]))
    assert claim(office.left) == []
    [innocent] = claim(office.right)
    assert (innocent.message.body, innocent.attempt) == (b"innocent", 1)
    assert charged(office.broker) == ["left"] * 3


def test_new_messages_wait_while_one_has_the_worker_and_go_on_after_it(office: Office):
    office.accuse_both()
    [poison] = claim(office.left)
    publish(office.broker, RIGHT, ["new"])
    assert claim(office.right) == []
    office.left.settle(done([poison]))  # and does not come back before the other looks
    assert bodies(claim(office.right)) in (["new"], ["innocent"])


def test_a_lane_that_hangs_with_it_keeps_the_others_for_its_lease_only(office: Office):
    office.accuse_both()
    assert bodies(claim(office.left)) == ["poison"]
    publish(office.broker, RIGHT, ["new"])
    assert claim(office.right) == []
    office.hands.advance(31)
    assert bodies(claim(office.right, 1)) in (["new"], ["innocent"])


def test_who_is_under_way_ends_first(office: Office):
    office.accuse_both()
    publish(office.broker, RIGHT, ["slow"] * 3)
    slow = claim(office.right, 1)
    assert len(slow) == 1
    assert claim(office.right) == [], "the worker holds another"
    assert claim(office.left) == []
    assert office.right.settle(done(slow)) == []
    [innocent] = claim(office.right)
    assert (innocent.message.body, innocent.alone) == (b"innocent", True)


def test_patience_ends_and_grows(office: Office):
    """Healthy messages are not kept waiting for ever by one that waits for the worker."""
    clock = office.hands
    door = Solitude(lambda: clock.boot / 1000)
    patience_s = FIRST_PATIENCE_S
    for _ in range(4):
        door.close(1)
        assert (door.is_closed_to(2), door.is_closed_for(1)) == (True, True)
        clock.advance(patience_s)
        assert not door.is_closed_to(2)
        door.close(1)
        assert not door.is_closed, "the others first, for as long"
        clock.advance(patience_s)
        patience_s *= 2
    door.close(1)
    lane = object()
    door.run(1, lane)
    clock.advance(1000)
    assert door.is_closed_to(1), "while it runs, no patience ends"
    assert door.is_closed_to(2)
    door.end(lane)
    assert not door.is_closed


def test_a_closed_lane_keeps_nobody_waiting(office: Office):
    office.accuse_both()
    [innocent] = claim(office.right)
    publish(office.broker, RIGHT, ["new"])
    assert claim(office.left) == []
    office.left.close()
    office.right.settle(done([innocent]))
    assert office.right.claim(1, BIG, 0.0)


@pytest.mark.parametrize("ordered", [False, True])
def test_the_accused_keep_no_suspects_waiting_that_stand_behind_them(tmp_path: Path, ordered: bool):
    """A consumer that claims one at a time sees past those that wait for their worker."""
    hands = Hands()
    topic = Topic("left", bytes, guarantee="at-least-once", partitions=8)
    broker = opened(tmp_path / "duly.db", topic, RIGHT, hands=hands)
    left = broker.subscribe([topic], "left", options(order_by_key=ordered))
    right = broker.subscribe([RIGHT], "right", options())
    for key in "abcdefgh":
        publish(broker, topic, [key], key=key)
    publish(broker, RIGHT, ["busy"])
    assert len(claim(left)) == 8  # suspects, all of them
    hands.advance(31)
    [first] = claim(left, 1)
    assert claim(right), "so that both are alone in their claims, and not in their worker"
    hands.advance(31)
    [busy] = claim(right)
    [second] = claim(left, 1)
    assert second.message.body != first.message.body
    assert [*left.settle(done([second])), *right.settle(done([busy]))] == []
    [accused] = claim(left, 1)
    assert accused.message.body == first.message.body
    assert left.settle(done([accused])) == []
    assert len(drain(left, 1)) == 6


def test_two_that_are_lost_in_turns_are_both_charged_in_the_end(office: Office):
    """The leases of one end while the other runs, over and over."""
    publish(office.broker, LEFT, ["one"])
    publish(office.broker, RIGHT, ["other"])
    given_up: list[str] = []
    for turn in range(80):
        lane = (office.left, office.right)[turn % 2]
        for delivery in claim(lane, 1):
            if delivery.attempt > 3:
                lane.settle([Dead(delivery.receipt, "given up")])
                given_up += bodies([delivery])
        office.hands.advance(16)
    assert sorted(given_up) == ["one", "other"]

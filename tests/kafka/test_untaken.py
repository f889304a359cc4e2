"""What the group gave and a process did not take."""

from __future__ import annotations

from typing import Any

import pytest
from confluent_kafka import TopicPartition

from duly.brokers.kafka.untaken import Untaken


def places(*numbers: int) -> list[TopicPartition]:
    return [TopicPartition("orders", number) for number in numbers]


class Driver:
    """A consumer with these partitions, as far as it is told of them."""

    def __init__(self, *assigned: int) -> None:
        self.assigned = set(assigned)

    def assignment(self) -> list[TopicPartition]:
        return places(*self.assigned)

    def unassign(self) -> None:
        self.assigned.clear()

    def incremental_unassign(self, given: Any) -> None:
        for each in given:
            self.assigned.remove(each.partition)  # as the driver, which refuses others


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_what_was_taken_is_never_overdue():
    clock = Clock()
    untaken = Untaken(clock)
    untaken.given(places(0, 1), {("orders", 0), ("orders", 1)})
    clock.now += 100
    assert not untaken.overdue()


def test_what_was_not_taken_is_overdue_after_a_while_and_told_once():
    clock = Clock()
    untaken = Untaken(clock)
    untaken.given(places(0, 1, 2), {("orders", 1)})
    clock.now += 2.9
    assert not untaken.overdue()
    clock.now += 0.2
    assert sorted(untaken.overdue()) == [("orders", 0), ("orders", 2)]
    clock.now += 100
    assert not untaken.overdue()


def test_what_is_given_again_and_taken_is_not_overdue():
    clock = Clock()
    untaken = Untaken(clock)
    untaken.given(places(0), ())
    untaken.given(places(0), {("orders", 0)})
    clock.now += 100
    assert not untaken.overdue()


@pytest.mark.parametrize("is_eager", [False, True])
def test_what_others_have_is_not_overdue_and_only_what_is_there_is_let_go(is_eager: bool):
    clock = Clock()
    untaken, driver = Untaken(clock), Driver(1)
    untaken.given(places(0, 1), {("orders", 1)})
    untaken.give_up(driver, places(0, 1), is_eager=is_eager)
    assert not driver.assigned
    clock.now += 100
    assert not untaken.overdue()

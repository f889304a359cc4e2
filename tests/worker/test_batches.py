"""Batch handlers after a failure: batches of one, for as many rounds as that takes."""

from __future__ import annotations

from typing import Any

import pytest

import duly
from duly.message import Topic
from tests.worker.lanes import Bench

numbers: Topic[int] = Topic("numbers", int, guarantee="at-least-once", key=str, partitions=2)


@pytest.mark.parametrize("guarantee", ["at-least-once", "exactly-once"])
@pytest.mark.parametrize("order_by_key", [False, True])
def test_what_a_round_had_no_time_for_is_still_given_in_batches_of_one(
    guarantee: Any, order_by_key: bool
):
    """Each call takes longer than a round may: the rest is kept for the next, and again."""
    bench = Bench()
    calls: list[list[int]] = []

    def handle(batch: list[int]) -> None:
        calls.append(batch)
        bench.clock.now += 10
        if 0 in batch:
            raise duly.Reject("none")

    def handle_within(batch: list[int], tx: duly.Transaction[Any]) -> None:
        handle(batch)

    declare: Any = bench.app.batch_consumer(
        numbers, name="c", guarantee=guarantee, order_by_key=order_by_key, lease_s=1000
    )
    declare(handle_within if guarantee == "exactly-once" else handle)
    lane = bench.lane("c")
    bench.publish(numbers, *range(5))
    bench.drain(lane)
    assert sorted(call for call in calls if len(call) == 1) == [[n] for n in range(5)]
    assert {number.__class__ for call in calls for number in call} == {int}
    assert [letter.message.body for letter in bench.dead("c")] == [b"0"]


def take_one(batch: list[int]) -> list[int]:
    batch.pop()
    return batch


def take_all(batch: list[int]) -> list[int]:
    taken = [*batch]
    batch.clear()
    return taken


@pytest.mark.parametrize("guarantee", ["at-most-once", "at-least-once", "exactly-once"])
@pytest.mark.parametrize("take", [take_one, take_all])
@pytest.mark.parametrize("fails", [False, True])
def test_a_handler_that_takes_its_list_apart_has_handled_what_it_was_given(
    guarantee: Any, take: Any, fails: bool
):
    """What was handled is settled, and what failed is not, by what was claimed and by no list."""
    bench = Bench()
    calls: list[list[int]] = []

    def handle(batch: list[int]) -> None:
        calls.append([*batch])
        take(batch)
        if fails and len(calls) == 1:
            raise RuntimeError("once")

    def handle_within(batch: list[int], tx: duly.Transaction[Any]) -> None:
        handle(batch)

    declare: Any = bench.app.batch_consumer(numbers, name="c", guarantee=guarantee)
    declare(handle_within if guarantee == "exactly-once" else handle)
    lane = bench.lane("c")
    bench.publish(numbers, *range(9))
    bench.drain(lane)
    again = calls[1:] if fails and guarantee != "at-most-once" else calls
    assert sorted(number for call in again for number in call) == [*range(9)]
    [state] = bench.broker.subscriptions()
    assert (state.backlog, state.in_flight, state.parked, state.dead) == (0, 0, 0, 0)

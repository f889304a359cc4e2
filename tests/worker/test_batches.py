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

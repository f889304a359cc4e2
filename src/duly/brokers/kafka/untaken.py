"""`Untaken`: what the group gave this process, and it did not take."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from typing import Any

from confluent_kafka import TopicPartition

Place = tuple[str, int]

# Whoever was thrown out is told so within this time, and is given them anew.
_PATIENCE_S = 3.0


class Untaken:
    """As long as this process stays a member, the group does not give such a partition again, and
    nobody else reads it: to be left and joined again.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since: dict[Place, float] = {}

    def given(self, given: Iterable[TopicPartition], taken: Collection[Place]) -> None:
        """These were given, and those of them are taken."""
        now = self._clock()
        for place in _places(given):
            if place in taken:
                self._since.pop(place, None)
            else:
                self._since[place] = now

    def give_up(self, consumer: Any, places: Collection[TopicPartition], *, is_eager: bool) -> None:
        """These are others' now: tell the driver that they were let go."""
        for place in _places(places):
            self._since.pop(place, None)
        if is_eager:
            consumer.unassign()
            return
        # What was not taken the driver refuses to let go, and then waits for that for ever.
        there = {*_places(consumer.assignment())}
        consumer.incremental_unassign([p for p in places if (p.topic, p.partition) in there])

    def overdue(self) -> Collection[Place]:
        """Those that are still this process's after a while; asked again, there are none."""
        now = self._clock()
        if not any(now - since >= _PATIENCE_S for since in self._since.values()):
            return ()
        found = [*self._since]
        self._since.clear()
        return found


def _places(partitions: Iterable[TopicPartition]) -> Iterable[Place]:
    return [(each.topic, each.partition) for each in partitions]

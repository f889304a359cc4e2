"""Mistakes with lanes of keys."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from duly.broker import LogPosition
from duly.errors import ConfigurationError
from duly.testing.conformance.memory import LOG
from tests.contract.broken.coats import Broken, Coat
from tests.contract.broken.mistake import Mistake


class DealsLanesByTurns(Broken):
    """A key has another cursor with each of its messages."""

    class lane(Coat):  # noqa: N801
        def claim(self, limit: int, max_bytes: int, wait_s: float):
            found = self.inner.claim(limit, max_bytes, wait_s)
            return [replace(each, position=self.dealt(each.position)) for each in found]

        def dealt(self, position: LogPosition):
            whole, _, _ = position.log.rpartition("#")
            return LogPosition(f"{whole}#{position.offset % 4}/4", position.offset)


class RefusesLanes(Broken):
    def subscribe(self, topics: Any, subscription: str, options: Any):
        if options.key_lanes > 1:
            raise ConfigurationError(f"subscription {subscription!r}: this is no log")
        return super().subscribe(topics, subscription, options)


LANES = (
    Mistake(DealsLanesByTurns, ("KeyLanes::test_each_lane_comes_in_order",), LOG),
    Mistake(RefusesLanes, ("NoKeyLanes::test_everything_comes_as_ever",)),
)

"""What goes through a broker, as counts whose differences are rates; and who is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@runtime_checkable
class Counting(Protocol):
    """What a broker can count without keeping anything for it."""

    def published(self) -> Mapping[str, int]:
        """How many messages each topic ever stored, by its name."""
        ...

    def workers(self) -> Sequence[str]:
        """The worker processes that are alive, also those that hold nothing now."""
        ...


@dataclass(frozen=True, slots=True)
class Queued:
    """What waits to be claimed of one topic by one subscription, and how many processes consume it.

    ``workers``: so many are connected, whatever they do; None: that cannot be seen just now.
    """

    subscription: str
    topic: str
    backlog: int
    workers: int | None


@runtime_checkable
class Queueing(Protocol):
    """What a broker can count that offers no `duly.inspection.Inspection`."""

    def queued(self) -> Sequence[Queued]:
        """One for each topic of each subscription that was made known here, by name."""
        ...

    def delayed(self) -> int:
        """How many messages wait for their time, of all subscriptions together."""
        ...

"""Looking inside a broker: what its subscriptions have before them, gave up on, and met.

A second small protocol, for brokers that can tell. It reads what is stored, so that it also
tells about processes that are dead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from duly.message import Message


@dataclass(frozen=True, slots=True)
class SubscriptionState:
    """How far a subscription is with one topic, in messages.

    ``backlog`` waits to be claimed, ``in_flight`` is claimed, ``parked`` waits for a retry, a
    due time or an earlier one of its key, ``dead`` was given up on.
    """

    name: str
    topic: str
    backlog: int
    in_flight: int
    parked: int
    dead: int

    @property
    def is_drained(self) -> bool:
        """Whether nothing is left to do: all is settled or dead."""
        return not (self.backlog or self.in_flight or self.parked)


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that a subscription gave up on, with the last error and the attempts made."""

    subscription: str
    message: Message[Any]
    error: str
    attempts: int
    dead_ms: int


@dataclass(frozen=True, slots=True)
class Incident:
    """Something that was not plain success.

    ``kind`` is one of `KINDS`. ``count`` messages met it, from ``position`` on where it is
    known; ``source`` and ``id`` name the first. ``worker`` is the one that held the claim.
    """

    time_ms: int
    kind: str
    topic: str | None
    subscription: str | None
    source: str | None
    id: str | None
    position: int | None
    count: int
    worker: str | None
    detail: str

    @property
    def time(self) -> datetime:
        """When it happened, in UTC."""
        return datetime.fromtimestamp(self.time_ms / 1000, UTC)


KINDS: Mapping[str, str] = {
    "redelivery": "claimed by a worker that died or lost its lease, and given out again",
    "retry": "its handler failed; it waits for another attempt",
    "dead-letter": "given up on",
    "stale-settle": "settled after its claim was lost; refused",
    "repeat-dropped": "published again under the same identity; dropped",
    "identity-conflict": "published under a used identity with another body; refused",
    "dropped": "an at-most-once publish that was never stored",
}


class Inspection(Protocol):
    """What can be asked of a broker that can look inside itself."""

    def subscriptions(self) -> Sequence[SubscriptionState]:
        """One state for each topic of each subscription, by name."""
        ...

    def dead_letters(
        self, subscription: str | None = None, limit: int = 100
    ) -> Sequence[DeadLetter]:
        """The latest dead letters, newest first; of one subscription or of all."""
        ...

    def incidents(
        self, subscription: str | None = None, kind: str | None = None, limit: int = 100
    ) -> Sequence[Incident]:
        """The latest incidents, newest first."""
        ...

    def incident_counts(self) -> Mapping[tuple[str, str], int]:
        """How many messages met which kind: by (subscription, or topic where none, kind)."""
        ...

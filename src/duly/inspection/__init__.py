"""Looking inside a broker, and mending: what its subscriptions have before them, gave up on, met.

More small protocols, for brokers that can. `Inspection` and `Observing` read what is stored, so
that they also tell about processes that are dead; `Mending` brings back or removes what was
given up on. Beside them: `duly.inspection.steering` holds subscriptions back and takes them
back, `duly.inspection.tracing` tells the life of a message and follows a topic,
`duly.inspection.erasing` removes a person's messages, `duly.inspection.health` says what
endangers a promise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol, runtime_checkable

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
    """A message that a subscription gave up on, with the last error and the attempts made.

    ``number`` tells it from every other dead letter of the broker. ``replays`` counts how often
    it had been brought back before it was given up on this time.
    """

    subscription: str
    message: Message[Any]
    error: str
    attempts: int
    dead_ms: int
    number: int = 0
    replays: int = 0

    @property
    def died(self) -> datetime:
        """When it was given up on, in UTC."""
        return datetime.fromtimestamp(self.dead_ms / 1000, UTC)


@dataclass(frozen=True, slots=True)
class Selection:
    """Which dead letters are meant; what is None does not narrow.

    ``error`` is a part of the error's text. ``since_ms`` and ``before_ms`` bound the time at
    which they were given up on, ``below`` their number: to go on where a list ended.
    """

    consumer: str | None = None
    topic: str | None = None
    id: str | None = None
    error: str | None = None
    since_ms: int | None = None
    before_ms: int | None = None
    below: int | None = None

    def matches(self, letter: DeadLetter) -> bool:
        """Whether this one is meant."""
        return (
            self.consumer in (None, letter.subscription)
            and self.topic in (None, letter.message.topic)
            and self.id in (None, letter.message.id)
            and (self.error is None or self.error in letter.error)
            and (self.since_ms is None or letter.dead_ms >= self.since_ms)
            and (self.before_ms is None or letter.dead_ms < self.before_ms)
            and (self.below is None or letter.number < self.below)
        )


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
    "repeat-suppressed": "delivered again after it had taken effect; not run a second time",
    "repeat-dropped": "published again under the same identity; dropped",
    "identity-conflict": "published under a used identity with another body; refused",
    "dropped": "an at-most-once publish that was never stored",
    "replayed": "brought back from the dead letters by a person",
    "discarded": "removed from the dead letters by a person, for good",
    "paused": "held back by a person",
    "resumed": "let go on by a person",
    "rewound": "taken back to an earlier message by a person",
    "removed": "a subscription that a person removed",
    "erased": "a message that a person removed from everywhere",
}


@runtime_checkable
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


@dataclass(frozen=True, slots=True)
class Holder:
    """A worker that has claimed messages of a subscription's topic, and how many.

    ``alive`` says whether its process runs: what a dead one holds is given out again as soon as
    another works the subscription.
    """

    worker: str
    alive: bool
    subscription: str
    topic: str
    messages: int


@runtime_checkable
class Observing(Inspection, Protocol):
    """What more a broker can tell of what is being worked on, where it keeps that."""

    def holders(self) -> Sequence[Holder]:
        """Who has claimed messages, by subscription, topic and worker."""
        ...

    def oldest(self) -> Mapping[tuple[str, str], int]:
        """When the oldest message was made that (subscription, topic) has still before it,
        in milliseconds since 1970 UTC; only those that have one.
        """
        ...


@runtime_checkable
class Mending(Inspection, Protocol):
    """What can be done about dead letters, by a broker that keeps them."""

    def select(self, which: Selection, limit: int) -> Sequence[DeadLetter]:
        """The dead letters that are meant, the highest number first."""
        ...

    def replay(self, letters: Sequence[DeadLetter]) -> Sequence[DeadLetter]:
        """Deliver them to their subscriptions, and to nobody else, as if for the first time.

        Each keeps its identity and comes before the later ones of its key. In one step with
        its removal from the dead letters: a crash neither loses nor doubles it. Each is noted
        as an incident. Returns those that are no dead letters any more.
        """
        ...

    def discard(self, letters: Sequence[DeadLetter]) -> Sequence[DeadLetter]:
        """Remove them for good; a key that one held goes on. Each is noted as an incident.

        Returns those that are no dead letters any more.
        """
        ...

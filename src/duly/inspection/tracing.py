"""The life of one message, and following what is published without taking part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, Protocol, runtime_checkable

from duly.broker import Start
from duly.inspection import Incident
from duly.message import Message

State = Literal["waiting", "claimed", "parked", "behind", "dead", "done"]

MEANING: dict[State, str] = {
    "waiting": "not given out yet, or given back",
    "claimed": "claimed by a worker",
    "parked": "waits until it is due",
    "behind": "waits behind an earlier message of its key",
    "dead": "given up on",
    "done": "done; or it was there before this subscription began",
}


@dataclass(frozen=True, slots=True)
class Logged:
    """A message with the broker's own position of it."""

    position: Any
    message: Message[Any]


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a message stands for one subscription.

    ``attempt`` is the one under way or to come, None where that is not kept. ``at_ms`` is when
    a parked one is due and when a dead one was given up on (milliseconds since 1970 UTC).
    """

    subscription: str
    state: State
    attempt: int | None = None
    worker: str | None = None
    at_ms: int | None = None
    error: str | None = None
    replays: int = 0


@dataclass(frozen=True, slots=True)
class Trace:
    """What is kept of one message's life.

    ``message`` is None where the log has forgotten it, ``stored_ms`` where the broker does not
    keep when it was stored. A subscription that handled it without incident leaves no record of
    when: its standing is done.
    """

    topic: str
    source: str
    id: str
    position: Any
    message: Message[Any] | None
    stored_ms: int | None
    standings: Sequence[Standing]
    incidents: Sequence[Incident]

    @property
    def stored(self) -> datetime | None:
        """When it was stored, in UTC."""
        return (
            None if self.stored_ms is None else datetime.fromtimestamp(self.stored_ms / 1000, UTC)
        )


@runtime_checkable
class Tracing(Protocol):
    """What a broker can tell of single messages. Only reads; may look through the whole log."""

    def trace(self, id: str, source: str, topic: str | None = None) -> Sequence[Trace]:
        """The life of every message with this identity, one for each topic."""
        ...

    def caused_by(self, cause: str, limit: int) -> Sequence[Logged]:
        """The kept messages whose header ``causationid`` is this, the oldest first."""
        ...


@dataclass(frozen=True, slots=True)
class Followed:
    """What was published since a mark; ``mark`` is where to go on.

    ``missed`` counts the messages that were gone before they were looked at.
    """

    messages: Sequence[Logged]
    mark: Any
    missed: int = 0


@runtime_checkable
class Following(Protocol):
    """What a broker can show of a topic, without a subscription and without a claim."""

    def mark(self, topic: str, start: Start) -> Any:
        """Where to begin. Raises `ConfigurationError` where there is no such topic."""
        ...

    def follow(self, topic: str, mark: Any, limit: int) -> Followed:
        """Up to about ``limit`` kept messages from there on, each partition in its order."""
        ...


@runtime_checkable
class Remembering(Protocol):
    """What a store can tell of a message that took effect in it."""

    def effect_ms(self, consumer: str, topic: str, source: str, id: str) -> int | None:
        """When it was admitted by the transaction that took effect, in milliseconds since 1970
        UTC; None where that is not remembered.
        """
        ...

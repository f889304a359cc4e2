"""What can be watched: one small value for each thing that happens.

Watchers only watch. They are called after the fact, on the thread it happened on, and what
they raise is logged and changes nothing; no guarantee may ever depend on one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

log = logging.getLogger("duly")


@dataclass(frozen=True, slots=True)
class Published:
    """Messages became durable (``repeats`` of them had been published before)."""

    topic: str
    count: int
    repeats: int
    seconds: float


@dataclass(frozen=True, slots=True)
class PublishDropped:
    """At-most-once messages were dropped before they reached the broker."""

    topic: str
    count: int
    why: str


@dataclass(frozen=True, slots=True)
class Claimed:
    """A lane claimed messages."""

    consumer: str
    deliveries: Sequence[Any]


@dataclass(frozen=True, slots=True)
class Handled:
    """Handlers ended for these messages; ``seconds`` is the time for all of them."""

    consumer: str
    count: int
    seconds: float


@dataclass(frozen=True, slots=True)
class HandlerFailed:
    """A handler raised; the message is tried again in ``retry_in_s``, or dead (None)."""

    consumer: str
    delivery: Any
    error: BaseException
    retry_in_s: float | None


@dataclass(frozen=True, slots=True)
class RepeatsSuppressed:
    """Admission found that these had taken effect before; they were settled, not run."""

    consumer: str
    deliveries: Sequence[Any]


@dataclass(frozen=True, slots=True)
class Committed:
    """A transaction with the effects of ``count`` messages and ``published`` outputs stands."""

    consumer: str
    count: int
    published: int


@dataclass(frozen=True, slots=True)
class RolledBack:
    """A transaction was rolled back; its messages come again."""

    consumer: str
    count: int
    error: BaseException


@dataclass(frozen=True, slots=True)
class SettleRefused:
    """The claim on these receipts was lost before they were settled."""

    consumer: str
    receipts: Sequence[Any]


@dataclass(frozen=True, slots=True)
class LeaseLost:
    """The lease on these receipts could not be extended."""

    consumer: str
    receipts: Sequence[Any]


@dataclass(frozen=True, slots=True)
class Relayed:
    """The broker confirmed messages of an outbox; ``repeats`` more it knew already."""

    count: int
    repeats: int


@dataclass(frozen=True, slots=True)
class RelayRefused:
    """The broker refused a message of an outbox; it is tried again in ``retry_in_s``, or given
    up on and kept there (None).
    """

    message: Any
    error: BaseException
    retry_in_s: float | None


Event = (
    Published
    | PublishDropped
    | Claimed
    | Handled
    | HandlerFailed
    | RepeatsSuppressed
    | Committed
    | RolledBack
    | SettleRefused
    | LeaseLost
    | Relayed
    | RelayRefused
)

Watcher = Callable[[Event], None]


def tell(watchers: Iterable[Watcher], event: Event) -> None:
    """Show an event to every watcher; what one raises is logged and goes no further."""
    for watcher in watchers:
        try:
            watcher(event)
        except Exception:
            log.exception("a watcher failed on %s", type(event).__name__)

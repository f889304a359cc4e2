"""What can be watched: one small value for each thing that happens.

Watchers only watch. They are called after the fact, on the thread it happened on, and what
they raise is logged and changes nothing; no guarantee may ever depend on one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from duly.guarantees import Settlement

log = logging.getLogger("duly")


@dataclass(frozen=True, slots=True)
class Published:
    """``messages`` became durable: ``count`` of them now, ``repeats`` had been before.

    What is published within a transaction is part of `Committed` instead.
    """

    topic: str
    count: int
    repeats: int
    seconds: float
    messages: Sequence[Any] = ()


@dataclass(frozen=True, slots=True)
class PublishErred:
    """``messages`` of one topic were not plainly published; ``error`` is that of the first.

    A `duly.PublishUnknown` says that they may be stored, any other that they are not.
    """

    topic: str
    messages: Sequence[Any]
    error: Exception
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
    """Calls of the handler returned for ``count`` messages, after ``seconds`` for all of them
    and for a call behind them that raised. What they did may still be rolled back.
    """

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
class Settled:
    """The broker is told how messages ended; ``seconds`` is 0 where that was part of a commit, or
    is not waited for, because the store knows.

    ``refused`` are the receipts among them whose claim was lost before.
    """

    consumer: str
    settlements: Sequence[Settlement]
    refused: Sequence[Any]
    seconds: float


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


ConsumerEvent = (
    Claimed
    | Handled
    | HandlerFailed
    | RepeatsSuppressed
    | Committed
    | RolledBack
    | Settled
    | SettleRefused
    | LeaseLost
)

Event = Published | PublishErred | PublishDropped | ConsumerEvent | Relayed | RelayRefused

Watcher = Callable[[Event], None]


def tell(watchers: Iterable[Watcher], event: Event) -> None:
    """Show an event to every watcher; what one raises is logged and goes no further."""
    for watcher in watchers:
        try:
            watcher(event)
        except Exception:
            log.exception("a watcher failed on %s", type(event).__name__)

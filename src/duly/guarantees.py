"""The three guarantees as a table, how one claim may end, and when a failure is tried again.

Pure: no clock, no I/O, no randomness. This is the page a sceptic opens first; `duly.worker`
has one short function per guarantee that does what the table says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from math import isfinite
from typing import Any, Literal

import msgspec

from duly.errors import ConfigurationError, DecodeError, IdentityConflict, InvalidMessage

GuaranteeName = Literal["at-most-once", "at-least-once", "exactly-once"]


class Guarantee(StrEnum):
    """What may happen to a message when networks drop packets and processes die."""

    AT_MOST_ONCE = "at-most-once"
    AT_LEAST_ONCE = "at-least-once"
    EXACTLY_ONCE = "exactly-once"


@dataclass(frozen=True, slots=True)
class Promise:
    """One row of the table: what a guarantee means and what it costs."""

    promise: str
    a_crash_costs: str
    publish: str
    consume: str
    fits: str


PROMISES: Mapping[Guarantee, Promise] = {
    Guarantee.AT_MOST_ONCE: Promise(
        promise="never handled twice",
        a_crash_costs="possibly messages",
        publish="fire and forget: bounded buffer, drops are counted",
        consume="settled, durably, before the handler runs",
        fits="metrics, sensor readings, view pings",
    ),
    Guarantee.AT_LEAST_ONCE: Promise(
        promise="handled, or dead-lettered in sight",
        a_crash_costs="possibly a repeat: handlers must be idempotent",
        publish="confirmed durable",
        consume="settled after the handler ran",
        fits="most business events, with idempotent handlers",
    ),
    Guarantee.EXACTLY_ONCE: Promise(
        promise="effects commit once, or the message is dead-lettered with none",
        a_crash_costs="time, and a second run",
        publish="confirmed durable, a repeat under the same id is dropped",
        consume="effects, the memory of the message and what it publishes commit together",
        fits="payments, withdrawals, ad-click billing",
    ),
}


def guarantee_of(word: str | None, where: str) -> Guarantee:
    """The guarantee a declaration named.

    Raises `ConfigurationError` that explains the three when the word is missing or unknown;
    there is no default, because the wrong one loses money silently.
    """
    try:
        return Guarantee(word or "")
    except ValueError:
        said = "has no guarantee" if word is None else f"says guarantee={word!r}"
        table = "\n".join(
            f'  "{name}": {row.promise}; a crash costs {row.a_crash_costs} (for {row.fits})'
            for name, row in PROMISES.items()
        )
        raise ConfigurationError(f"{where} {said}. Choose one of:\n{table}") from None


class Admission(StrEnum):
    """How a batch of deliveries enters a transaction so that each takes effect once."""

    BY_CLAIM = "by claim"
    """Broker and store are one database: the claim row is locked and compared."""
    BY_CURSOR = "by cursor"
    """The source is an ordered log: the store keeps the next position and compares it."""
    BY_INBOX = "by inbox"
    """Anything else: the store remembers (consumer, source, id) for a retention."""


# --- How one claim ends. ``receipt`` is the broker's own opaque value and fences each of them.
# msgspec.Struct because a worker makes one per message; a frozen dataclass costs four times that.


class Done(msgspec.Struct, frozen=True, gc=False):
    """Handled; the subscription forgets the message.

    ``count``: of how many messages, where the receipt stands for a span of them.
    """

    receipt: Any
    count: int = 1


class Retry(msgspec.Struct, frozen=True, gc=False):
    """Failed; deliver it again, not before ``delay_s`` seconds have passed. Counts an attempt.

    Not ``charged``: its handler was never started, because this code cannot read it yet. The next
    delivery has the same attempt and is marked no more than this one.
    """

    receipt: Any
    delay_s: float
    error: str
    charged: bool = True


class Dead(msgspec.Struct, frozen=True, gc=False):
    """Given up on; kept as a dead letter with ``error``. One step with the original's removal."""

    receipt: Any
    error: str


class Release(msgspec.Struct, frozen=True, gc=False):
    """Not done; deliver it again at once. Charges nothing.

    ``started``: its transaction may stand, which nobody can say. The next delivery is marked as
    repeated, as one of a message that was never started is not.
    """

    receipt: Any
    started: bool = False


Settlement = Done | Retry | Dead | Release


# --- When a failure is tried again.


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how soon a failed message is tried again.

    ``attempts`` counts starts, the first one included; a worker's death counts where the
    message was all that it had claimed. Waiting grows from ``first_s`` by ``factor`` up to
    ``longest_s``, each time shortened by a random share of up to ``jitter`` (0 to 1), so that
    messages which failed together do not return together. ``reject`` are exceptions that no
    further attempt can help; ``rules`` give other policies to some exceptions, first match wins.
    """

    attempts: int = 10
    first_s: float = 1.0
    factor: float = 2.0
    longest_s: float = 600.0
    jitter: float = 0.2
    reject: tuple[type[Exception], ...] = (DecodeError, IdentityConflict, InvalidMessage)
    rules: Sequence[tuple[type[Exception], RetryPolicy]] = field(default=())

    def __post_init__(self) -> None:
        times = (self.first_s, self.factor, self.longest_s, self.jitter)
        if not isinstance(self.attempts, int) or not all(map(isfinite, times)):
            raise ConfigurationError(f"{self}: attempts is a whole number, the others are finite")
        if self.attempts < 1:
            raise ConfigurationError(f"RetryPolicy(attempts={self.attempts}): at least 1 attempt")
        if self.first_s < 0 or self.longest_s < self.first_s or self.factor < 1:
            raise ConfigurationError(
                f"RetryPolicy(first_s={self.first_s}, factor={self.factor}, "
                f"longest_s={self.longest_s}): waiting starts at 0 or more, may not shrink, "
                "and longest_s is at least first_s"
            )
        if not 0 <= self.jitter <= 1:
            raise ConfigurationError(f"RetryPolicy(jitter={self.jitter}): a share from 0 to 1")

    def for_error(self, error: BaseException) -> RetryPolicy:
        """The policy that applies to this exception: the first matching rule's, or this one."""
        return next((policy for kind, policy in self.rules if isinstance(error, kind)), self)

    def delay_s(self, attempt: int, roll: float) -> float:
        """Seconds to wait after the failed ``attempt`` (1, 2, ...); ``roll`` is from [0, 1)."""
        # The exponent is capped because 2.0 ** 1100 overflows; longest_s bounds it long before.
        grown = self.first_s * self.factor ** min(attempt - 1, 64)
        return min(grown, self.longest_s) * (1 - self.jitter * roll)

    def after_failure(self, attempt: int, error: BaseException, roll: float) -> float | None:
        """Seconds until the next attempt, or None: dead-letter it now."""
        policy = self.for_error(error)
        if isinstance(error, policy.reject) or attempt >= policy.attempts:
            return None
        return policy.delay_s(attempt, roll)

"""Subscriptions held back, taken back to an earlier message, or removed.

`Steering` is the broker's part. Where effects live in another database, the memory of what has
taken effect is the store's, and `Forgetting` its part of a new life.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol, runtime_checkable

# What a subscription is under, beside paused: see `Steered`.
REWINDING = "rewinding"
REMOVING = "removing"


@dataclass(frozen=True, slots=True)
class Steered:
    """A subscription that a person holds back.

    ``state`` is paused, rewinding or removing: the last two are finished by doing the same again.
    """

    subscription: str
    state: str
    since_ms: int

    @property
    def since(self) -> datetime:
        """When that began, in UTC."""
        return datetime.fromtimestamp(self.since_ms / 1000, UTC)


@dataclass(frozen=True, slots=True)
class Target:
    """Where a rewind begins in one stream of a topic: the broker's own ``position``, and how
    many messages it keeps that stand from there to where the subscription is now.
    """

    topic: str
    position: Any
    messages: int


@runtime_checkable
class Steering(Protocol):
    """What can be done about subscriptions, by a broker that keeps where each one stands.

    Every call is safe to repeat. One that names no subscription raises `ConfigurationError`.
    """

    def recorded(self) -> Mapping[str, str]:
        """Every subscription by name, with the guarantee it was made with."""
        ...

    def steered(self) -> Sequence[Steered]:
        """Those that are held back, by name."""
        ...

    def pause(self, subscription: str) -> bool:
        """Let nothing of it be claimed, by any process, until `resume`; what is claimed goes on.

        Whether it was not paused before.
        """
        ...

    def resume(self, subscription: str) -> bool:
        """Let it be claimed again; whether it was paused. Raises `ConfigurationError` where a
        rewind was begun and not finished.
        """
        ...

    def targets(self, subscription: str, to: datetime | int | None) -> Sequence[Target]:
        """Where a rewind to the messages made since then (a position; None: the oldest kept)
        would begin; only what lies behind the subscription's place.
        """
        ...

    def rewind(
        self, subscription: str, targets: Sequence[Target], epoch: str | None, *, quiet: bool
    ) -> bool:
        """Take it back to these places, and let nothing be claimed until `finish`.

        From then on a claim on what comes again is lost: it settles nothing, and a transaction
        by claim cannot commit. An ``epoch`` is begun once: False where it was begun and
        finished before, and nothing was done. ``quiet``: raises `ConfigurationError` unless the
        subscription is paused and nothing of it is claimed.
        """
        ...

    def drop(self, subscription: str) -> bool:
        """Remove it; whether it was there. A worker that still goes by it claims nothing any
        more, whoever makes the name anew, and its `Subscription.claim` raises.
        """
        ...

    def tidy(self, subscription: str, limit: int) -> int:
        """Remove up to about ``limit`` rows of what a rewind or a removal left behind; returns
        how many, 0 when nothing is left. Dead letters that a rewind reaches come again.
        """
        ...

    def finish(self, subscription: str) -> None:
        """Let a rewound subscription be claimed again, unless it is paused.

        Raises `ConfigurationError` where `tidy` has something left to do.
        """
        ...


@runtime_checkable
class Forgetting(Protocol):
    """What a store can do for a new life of an exactly-once consumer admitted by inbox."""

    def forget(self, consumer: str, limit: int) -> int:
        """Forget up to ``limit`` messages that took effect for this consumer; returns how many,
        0 when none is left.
        """
        ...

"""The outbox: what transactions have published and no broker has confirmed yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from duly.message import Message


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message in the outbox. ``position`` grows in the order of commits; ``attempts`` counts
    how often the broker has refused it.
    """

    position: int
    message: Message[Any]
    attempts: int = 0


@dataclass(frozen=True, slots=True)
class Refusal:
    """What the broker refused: to be tried again in so many seconds, or never (None).

    Not ``charged``: the broker refused everything, so that it does not count as an attempt.
    """

    position: int
    error: str
    retry_in_s: float | None
    charged: bool = True


@dataclass(frozen=True, slots=True)
class GivenUp:
    """A message that the broker will not take, kept in the outbox for a person to look at."""

    position: int
    message: Message[Any]
    attempts: int
    error: str


@dataclass(frozen=True, slots=True)
class Backlog:
    """How much an outbox holds: ``unsent`` on its way, ``given_up`` not. ``oldest_ms`` is when
    the oldest unsent message was made (milliseconds since 1970 UTC); None: there is none.
    """

    unsent: int
    given_up: int
    oldest_ms: int | None


class Outbox(Protocol):
    """What transactions have published and no broker has confirmed yet.

    A second small protocol, for stores that can be another database than the broker: their
    attribute ``outbox``. Safe to use from any thread. All but `hold` and `unsent` may raise
    `BrokerUnavailable`, having changed nothing, and `CommitUnknown`; doing it again is harmless.
    """

    def hold(self, relay: str, lease_s: float) -> bool:
        """Be the one relay of this outbox for ``lease_s`` more seconds; False: another is."""
        ...

    def let_go(self, relay: str) -> None:
        """Be it no longer, if it was."""
        ...

    def unsent(self, limit: int, max_bytes: int, wait_s: float) -> Sequence[Outgoing]:
        """The oldest messages to send now, at least one whatever its size, in order.

        Waits up to ``wait_s`` seconds for the first. What has to wait after a refusal is left
        out, and so is everything behind it with its topic and key.
        """
        ...

    def left(self, positions: Sequence[int]) -> Sequence[Outgoing]:
        """Those of these that are in it still, whether they are to be sent now or not."""
        ...

    def sent(self, positions: Sequence[int]) -> None:
        """Drop what the broker has confirmed."""
        ...

    def refused(self, refusals: Sequence[Refusal]) -> None:
        """Note what the broker refused, and when to try again."""
        ...

    def given_up(self, limit: int = 100) -> Sequence[GivenUp]:
        """The oldest messages that will not be tried again by themselves."""
        ...

    def try_again(self, positions: Sequence[int]) -> None:
        """Send given-up messages again, as if for the first time, at their old positions."""
        ...

    def backlog(self) -> Backlog:
        """How much there is."""
        ...

"""What a store has beside its transactions, its outbox and what it has parked: every call seen
through an `Around`. Part of `duly.testing.seam`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from duly.broker import Delivery
from duly.guarantees import Release
from duly.inspection import DeadLetter
from duly.store import (
    Backlog,
    GivenUp,
    Outbox,
    Outgoing,
    Parked,
    ParkedReceipt,
    Refusal,
    Waiting,
)
from duly.testing.calls import Around, Call, Name


class WrappedOutbox:
    """An outbox as its relay sees it, through ``around``."""

    def __init__(self, inner: Outbox, around: Around) -> None:
        self.inner = inner
        self._around = around

    def _call(self, name: Name, given: Any, perform: Callable[[Any], Any]) -> Any:
        return self._around(Call(name, given, inner=self.inner), perform)

    def hold(self, relay: str, lease_s: float) -> bool:
        """As `Outbox.hold`."""
        held: bool = self._call("hold", relay, lambda given: self.inner.hold(given, lease_s))
        return held

    def let_go(self, relay: str) -> None:
        """As `Outbox.let_go`."""
        self._call("let go", relay, self.inner.let_go)

    def unsent(self, limit: int, max_bytes: int, wait_s: float) -> Sequence[Outgoing]:
        """As `Outbox.unsent`."""
        found: Sequence[Outgoing] = self._call(
            "unsent", limit, lambda given: self.inner.unsent(given, max_bytes, wait_s)
        )
        return found

    def left(self, positions: Sequence[int]) -> Sequence[Outgoing]:
        """As `Outbox.left`."""
        return self.inner.left(positions)

    def sent(self, positions: Sequence[int]) -> None:
        """As `Outbox.sent`."""
        self._call("sent", positions, self.inner.sent)

    def refused(self, refusals: Sequence[Refusal]) -> None:
        """As `Outbox.refused`."""
        self._call("refused", refusals, self.inner.refused)

    def given_up(self, limit: int = 100) -> Sequence[GivenUp]:
        """As `Outbox.given_up`."""
        return self.inner.given_up(limit)

    def try_again(self, positions: Sequence[int]) -> None:
        """As `Outbox.try_again`."""
        self.inner.try_again(positions)

    def backlog(self) -> Backlog:
        """As `Outbox.backlog`."""
        return self.inner.backlog()


class WrappedParked:
    """What a store has parked: taking it is seen as a claim, giving it back as settling. Looking
    is not watched, nor what people do.
    """

    def __init__(self, inner: Parked, around: Around) -> None:
        self.inner = inner
        self._around = around

    def take(
        self, consumer: str, topics: Sequence[str], limit: int, max_bytes: int, lease_s: float
    ) -> Sequence[Delivery]:
        """As `Parked.take`."""
        deliveries: Sequence[Delivery] = self._around(
            Call("claim", limit, consumer, inner=self.inner),
            lambda given: self.inner.take(consumer, topics, given, max_bytes, lease_s),
        )
        return deliveries

    def next_s(self, consumer: str, topics: Sequence[str]) -> float | None:
        """As `Parked.next_s`."""
        return self.inner.next_s(consumer, topics)

    def extend(self, receipts: Sequence[ParkedReceipt], lease_s: float) -> Sequence[ParkedReceipt]:
        """As `Parked.extend`."""
        lost: Sequence[ParkedReceipt] = self._around(
            Call("extend", list(receipts), inner=self.inner),
            lambda given: self.inner.extend(given, lease_s),
        )
        return lost

    def give_back(self, releases: Sequence[Release]) -> Sequence[ParkedReceipt]:
        """As `Parked.give_back`."""
        refused: Sequence[ParkedReceipt] = self._around(
            Call("settle", releases, inner=self.inner), self.inner.give_back
        )
        return refused

    def waiting(self) -> Sequence[Waiting]:
        """As `Parked.waiting`."""
        return self.inner.waiting()

    def replay(self, letters: Sequence[DeadLetter]) -> Sequence[DeadLetter]:
        """As `Parked.replay`."""
        return self.inner.replay(letters)

    def bring_back(self, letters: Sequence[DeadLetter]) -> None:
        """As `Parked.bring_back`."""
        self.inner.bring_back(letters)

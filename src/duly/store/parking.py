"""What a store has parked of a log: messages that wait for a retry, behind whose back it goes on.

A cursor cannot pass what is not done. So the transaction that moves it past a failed message keeps
the message in the store, whole, and from then on that row is what is left to do: the log's own
delivery of it lies below the cursor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import msgspec

from duly.broker import Delivery, LogPosition
from duly.guarantees import Release
from duly.inspection import DeadLetter, SubscriptionState

REPLAYED = LogPosition("", -1, -1)
"""Where a message stands that people brought back from the dead letters: in no log any more."""


class ParkedReceipt(msgspec.Struct, frozen=True, gc=False):
    """The receipt of a parked message. ``token`` grows each time it is taken or given back."""

    number: int
    token: int


@dataclass(frozen=True, slots=True)
class Waiting:
    """What is parked of one topic for a consumer: ``parked`` wait, ``in_flight`` are taken.
    ``oldest_ms`` is when the oldest of them was made (milliseconds since 1970 UTC).
    """

    consumer: str
    topic: str
    parked: int
    in_flight: int
    oldest_ms: int


class Parked(Protocol):
    """What a store has parked, for those who work it.

    A small protocol beside `Store`, of stores whose capabilities say ``parks``: their attribute
    ``parked``. Safe to use from any thread. Raises `BrokerError`, having changed nothing, and
    `CommitUnknown`; what was taken then comes again when its lease is over.
    """

    def take(
        self, consumer: str, topics: Sequence[str], limit: int, max_bytes: int, lease_s: float
    ) -> Sequence[Delivery]:
        """Some that are due and that nobody has, for ``lease_s`` seconds; as `Subscription.claim`.

        One whose lease ran out is a suspect, and comes alone from then on, its start counted
        before it is made.
        """
        ...

    def next_s(self, consumer: str, topics: Sequence[str]) -> float | None:
        """In how many seconds something may be taken, 0 or less: now; None: nothing is parked."""
        ...

    def extend(self, receipts: Sequence[ParkedReceipt], lease_s: float) -> Sequence[ParkedReceipt]:
        """Hold these for ``lease_s`` more seconds; returns the lost."""
        ...

    def give_back(self, releases: Sequence[Release]) -> Sequence[ParkedReceipt]:
        """As `Subscription.settle` does with these: uncharged, due at once. Returns the refused."""
        ...

    def waiting(self) -> Sequence[Waiting]:
        """How much there is, by consumer and topic."""
        ...

    def replay(self, letters: Sequence[DeadLetter]) -> Sequence[DeadLetter]:
        """Park these, due at once and with all attempts before them, and remove them from the
        store's graveyard, in one transaction; returns those that were there no more.
        """
        ...

    def bring_back(self, letters: Sequence[DeadLetter]) -> None:
        """The same with letters that another keeps, and has removed."""
        ...


def parked_of(store: Any) -> Parked | None:
    """What a store has parked, of one that can."""
    return store.parked if store is not None and store.capabilities.parks else None


def parked_beside(broker: Any, store: Any) -> Parked | None:
    """What the store of a log has parked; None: nothing ever is."""
    return parked_of(store) if broker.capabilities.is_log else None


def are_parked(deliveries: Sequence[Delivery]) -> bool:
    """Whether these come out of the store: a claim is of one kind."""
    return bool(deliveries) and isinstance(deliveries[0].receipt, ParkedReceipt)


def with_parked(
    states: Iterable[SubscriptionState], waiting: Iterable[Waiting]
) -> list[SubscriptionState]:
    """What a broker tells of its subscriptions, and what the store has parked of them."""
    left = {(each.consumer, each.topic): each for each in waiting}
    found = [_with(state, left.pop((state.name, state.topic), None)) for state in states]
    return found + [
        SubscriptionState(each.consumer, each.topic, 0, each.in_flight, each.parked, 0)
        for each in left.values()
    ]


def _with(state: SubscriptionState, more: Waiting | None) -> SubscriptionState:
    if more is None:
        return state
    parked, in_flight = state.parked + more.parked, state.in_flight + more.in_flight
    return replace(state, parked=parked, in_flight=in_flight)

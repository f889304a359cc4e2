"""What the store needs of a broker that is the same database: its log, as steps.

The store runs them in the handler's transaction, and knows nothing else of the broker.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from duly.broker import Ahead, Outcome, Receipt
from duly.guarantees import Settlement
from duly.message import Message, Topic
from duly.sql.steps import Steps


class BrokerLog(Protocol):
    """The log of a broker in the same database and schema."""

    def unknown(self, topics: Iterable[Topic[Any]]) -> Sequence[Topic[Any]]:
        """Those that have to be declared before they can be published to."""
        ...

    def declare(self, topics: Iterable[Topic[Any]]) -> Steps[Any]:
        """Make topics known as part of the transaction; returns what `learn` is told."""
        ...

    def learn(self, declared: Sequence[Any]) -> None:
        """What a committed transaction declared."""
        ...

    def publish(
        self, messages: Sequence[Message[Any]], now_ms: int, declared: Sequence[Any]
    ) -> Steps[Sequence[Outcome]]:
        """Append messages. ``declared``: what this transaction declared, known to it only."""
        ...

    def fence(self, receipts: Sequence[Receipt], mark: int) -> Steps[int]:
        """Lock these claims for the transaction of this mark; how many are still held."""
        ...

    def settle(
        self, settlements: Sequence[Settlement], now_ms: int, mark: int, turns: set[int]
    ) -> Steps[None]:
        """End the claims. Raises `TransactionLost` where they are not of this transaction.

        ``turns``, empty at the beginning of the transaction, are for `claim`.
        """
        ...

    def claim(self, ahead: Ahead, turns: set[int]) -> Steps[None]:
        """Make the next claim, as part of the transaction."""
        ...

    def committed(self) -> None:
        """A transaction that published here stands: whoever waits may be woken."""
        ...

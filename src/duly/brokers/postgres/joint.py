"""The log in somebody else's transaction: a store's, in the same database and schema."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from duly.broker import Ahead, Outcome, Receipt
from duly.guarantees import Settlement
from duly.message import Message, Topic
from duly.sql import arrivals, locks, log
from duly.sql.steps import Steps


class JointLog:
    """What happens to the log as part of a transaction that this broker did not begin.

    ``topics`` are those that the broker knows, ``now_ms`` is the server's time, for retries wait
    by that, and ``published`` is called when a transaction that published here stands.
    """

    def __init__(
        self,
        topics: dict[str, log.TopicRecord],
        now_ms: Callable[[], int],
        published: Callable[[], None],
    ) -> None:
        self._topics = topics
        self._now_ms = now_ms
        self._published = published

    def unknown(self, topics: Iterable[Topic[Any]]) -> Sequence[Topic[Any]]:
        """Those that have to be declared before they can be published to."""
        return [topic for topic in topics if topic.name not in self._topics]

    def declare(self, topics: Iterable[Topic[Any]]) -> Steps[log.Catalog]:
        """Make topics known as part of the transaction; nobody else declares until it ends."""
        return locks.declare(topics)

    def learn(self, declared: Sequence[log.Catalog]) -> None:
        """What a committed transaction declared."""
        for catalog in declared:
            self._topics.update(catalog)

    def publish(
        self, messages: Sequence[Message[Any]], now_ms: int, declared: Sequence[log.Catalog]
    ) -> Steps[Sequence[Outcome]]:
        """Append messages. ``declared``: what this transaction declared, known to it only."""
        catalog = dict(self._topics)
        for more in declared:
            catalog.update(more)
        return (yield from arrivals.publish(catalog, messages, now_ms))

    def fence(self, receipts: Sequence[Receipt], mark: int) -> Steps[int]:
        """Lock these claims for the transaction of this mark; how many are still held."""
        return len((yield from log.fence(receipts, mark)))

    def settle(
        self,
        settlements: Sequence[Settlement],
        now_ms: int,  # noqa: ARG002 - by the store's clock, which is this host's
        mark: int,
        turns: set[int],
    ) -> Steps[None]:
        """End the claims. Raises `TransactionLost` where they are not of this transaction."""
        ends = log.settle(settlements, self._now_ms(), mark)
        yield from locks.with_turn(turns, ends)

    def claim(self, ahead: Ahead, turns: set[int]) -> Steps[None]:
        """Make the next claim, as part of the transaction. ``turns``: those that `settle` noted."""
        if not isinstance(ahead, log.Ahead):
            raise TypeError(f"{type(ahead).__name__} is no claim of this log")
        return locks.with_turn(turns, ahead.steps())

    def committed(self) -> None:
        """A transaction that published here stands: whoever waits is woken."""
        self._published()

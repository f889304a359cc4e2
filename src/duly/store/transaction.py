"""`Transaction`: what an exactly-once handler works through, and what becomes of its buffers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, TypeVar

from duly.errors import ConfigurationError, TransactionFailed
from duly.message import Message, Topic, checked_topic, due_ms
from duly.stamps import Stamp, stamped
from duly.store.session import Session

C = TypeVar("C")
T = TypeVar("T")


class Transaction(Generic[C]):
    """What an exactly-once handler works through.

    Rows written through ``connection``, messages given to `publish` and the memory that the
    message was handled become true together, or none of them does. ``connection`` is the
    driver's own: do not commit or roll back, duly does, once.
    """

    __slots__ = (
        "_after_commit",
        "_ended",
        "_flushed",
        "_messages",
        "_source",
        "_stamps",
        "_topics",
        "connection",
    )

    def __init__(self, connection: C, source: str, stamps: Sequence[Stamp] = ()) -> None:
        self.connection = connection
        self._source = source
        self._stamps = stamps
        self._flushed = 0
        self._ended = False
        self._messages: list[Message[Any]] = []
        self._topics: dict[str, Topic[Any]] = {}
        self._after_commit: list[Callable[[], object]] = []

    def publish(
        self,
        topic: Topic[T],
        payload: T,
        *,
        id: str | None = None,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        delay_s: float | None = None,
        due: datetime | None = None,
    ) -> str:
        """Publish with the transaction: seen when it commits, never if it does not.

        Returns the message's id. Buffered until commit, so nothing to await. Raises
        `InvalidMessage` or `MessageTooLarge`; `TransactionFailed` once the transaction ended.
        """
        message = checked_topic(topic).message(
            payload,
            source=self._source,
            id=id,
            key=key,
            headers=stamped(self._stamps, topic.name, headers) if self._stamps else headers,
            due_ms=None if delay_s is None and due is None else due_ms(topic.name, delay_s, due),
        )
        if self._ended or self._topics.get(topic.name) is not topic:
            self._check(topic)
        self._messages.append(message)
        return message.id

    def add(self, topic: Topic[Any], messages: Sequence[Message[Any]]) -> None:
        """Publish messages that were made before, as `publish` does."""
        self._check(topic)
        self._messages.extend(messages)

    def _check(self, topic: Topic[Any]) -> None:
        self._check_open("tx.publish")
        if topic.guarantee == "at-most-once":
            raise ConfigurationError(
                f"tx.publish to topic {topic.name!r}: it is declared at-most-once, which a "
                "transaction cannot loosen. Publish with app.publish, or declare the topic "
                "at-least-once."
            )
        self._topics[topic.name] = topic

    def after_commit(self, call: Callable[[], object]) -> None:
        """Run ``call`` once the transaction stands. A crash in between loses the call; what it
        raises is logged. Raises `ConfigurationError` for an ``async def``, which nothing awaits.
        """
        self._check_open("tx.after_commit")
        if not callable(call) or inspect.iscoroutinefunction(call):
            raise ConfigurationError(
                f"tx.after_commit({call!r}): give a def without parameters. Nothing awaits what it "
                "returns; what is to be awaited after the commit is a message: tx.publish."
            )
        self._after_commit.append(call)

    def _check_open(self, call: str) -> None:
        if self._ended:
            raise TransactionFailed(
                f"{call} after the transaction ended: it would never happen. Use the transaction "
                "within its handler or block only."
            )


@dataclass(frozen=True, slots=True)
class Mark:
    """How much a transaction had buffered, and flushed, at some point, to return to it."""

    messages: int
    calls: int
    flushed: int


def mark(tx: Transaction[Any]) -> Mark:
    """Where the transaction's buffers stand now."""
    return Mark(len(tx._messages), len(tx._after_commit), tx._flushed)


def forget_since(tx: Transaction[Any], point: Mark) -> None:
    """Drop what was buffered since ``point``: its handler failed."""
    del tx._messages[point.messages :]
    del tx._after_commit[point.calls :]
    tx._flushed = point.flushed


Declare = Callable[[Iterable[Topic[Any]], Sequence[Message[Any]]], None]
"""Makes topics known to a broker in another database, before the outbox has messages for it:
whoever relays them later may know nothing but a topic's name. Raises the `PublishFailed` of a
message that the broker could not take.
"""


def flush(
    tx: Transaction[Any],
    session: Session[Any],
    declare: Declare | None = None,
) -> int:
    """Move buffered messages into the session; returns how many it was given by now.

    Raises the `IdentityConflict` of a message whose id was taken by another body, and what
    ``declare`` raises. A repeat is dropped silently: the event is published already.
    """
    if not tx._messages:
        return tx._flushed
    if declare is not None:
        declare(tx._topics.values(), tx._messages)
    session.declare(tx._topics.values())
    outcomes = session.publish(tx._messages)
    tx._flushed += len(tx._messages)
    tx._messages.clear()
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return tx._flushed


def waits_for_commit(tx: Transaction[Any]) -> bool:
    """Whether there are calls to make once the transaction stands."""
    return bool(tx._after_commit)


def take_after_commit(tx: Transaction[Any]) -> Sequence[Callable[[], object]]:
    """The calls to make now that the transaction stands."""
    calls, tx._after_commit = tx._after_commit, []
    return calls


def end(tx: Transaction[Any]) -> None:
    """Committed or rolled back: from now on its calls raise instead of being forgotten."""
    tx._ended = True


OpenTransaction = AbstractContextManager[Transaction[C]]
"""``with app.transaction() as tx``: commits at the end of the block, rolls back if it raises."""

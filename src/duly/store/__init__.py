"""The seam to where effects live: `Store`, its `Session`, and the `Transaction` handlers get.

A store holds the inbox (what has taken effect), the cursor (how far an ordered source has
taken effect) and the outbox (what is to be published). Handlers see only `Transaction`; the
worker drives the `Session` beneath it: fence first (`admit`), settlement last (`settle`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from duly.broker import Outcome
from duly.message import Message, Topic
from duly.store.endings import covered, not_done, paired
from duly.store.outbox import Backlog, GivenUp, Outbox, Outgoing, Refusal
from duly.store.parking import (
    Parked,
    ParkedReceipt,
    Waiting,
    are_parked,
    parked_beside,
    parked_of,
    with_parked,
)
from duly.store.session import (
    Admitted,
    ClaimsAhead,
    Excuses,
    Pipelines,
    Scope,
    SeesSavepoints,
    Session,
)
from duly.store.transaction import (
    Declare,
    Mark,
    OpenTransaction,
    Transaction,
    end,
    flush,
    forget_since,
    mark,
    take_after_commit,
    waits_for_commit,
)

__all__ = [
    "Admitted",
    "Backlog",
    "BeginsOnLoop",
    "ClaimsAhead",
    "Declare",
    "Excuses",
    "GivenUp",
    "Mark",
    "OpenTransaction",
    "Outbox",
    "Outgoing",
    "Parked",
    "ParkedReceipt",
    "Pipelines",
    "PublishesOnLoop",
    "Refusal",
    "Scope",
    "SeesSavepoints",
    "Session",
    "Store",
    "StoreCapabilities",
    "Transaction",
    "Waiting",
    "are_parked",
    "covered",
    "end",
    "flush",
    "forget_since",
    "mark",
    "not_done",
    "outbox_of",
    "paired",
    "parked_beside",
    "parked_of",
    "take_after_commit",
    "waits_for_commit",
    "with_parked",
]


@dataclass(frozen=True, slots=True)
class StoreCapabilities:
    """What a store provides.

    - ``name``: for people ("SQLite").
    - ``database``: identity of the database, to be compared with the broker's.
    - ``durable``: committed effects survive the death of every process.
    - ``one_writer``: one transaction at a time, over all processes.
    - ``outbox``: `Session.publish` works where the broker is another database.
    - ``tx_s``: after this many seconds a transaction should start no further handler.
    - ``savepoints``: a transaction should set at most so many; None: any number.
    - ``async_connections``: ``async def`` handlers get a connection of their loop (`BeginsOnLoop`).
    - ``pipelines``: statements need not wait for one another's answer (`Pipelines`).
    - ``parks``: what a consumer by cursor has to try again can wait in the store (`Parked`), so
      that its log goes on.
    - ``effects``: handlers write through `Transaction.connection`. Without, a transaction covers
      what is published, and how far the source was handled.
    - ``limits``: what else holds for its transactions, as the contract is to tell it.
    """

    name: str
    database: str
    durable: bool = True
    one_writer: bool = False
    outbox: bool = False
    tx_s: float = 1.0
    savepoints: int | None = None
    async_connections: bool = False
    pipelines: bool = False
    parks: bool = False
    effects: bool = True
    limits: tuple[str, ...] = ()


class Store(Protocol):
    """Where effects live. Safe to use from any thread."""

    @property
    def capabilities(self) -> StoreCapabilities:
        """What this store provides."""
        ...

    def declare(self, topics: Sequence[Topic[Any]]) -> None:
        """Make known the topics that transactions publish to, creating what they need."""
        ...

    def begin(self, scope: Scope | None) -> Session[Any]:
        """Open a transaction; without a scope, one that admits nothing (a caller's own)."""
        ...

    def joins(self, connection: Any) -> bool:
        """Whether ``within=connection`` can publish: it is open on this very database."""
        ...

    def publish_within(
        self,
        connection: Any,
        messages: Sequence[Message[Any]],
        topics: Sequence[Topic[Any]] = (),
    ) -> Sequence[Outcome]:
        """Put messages into the caller's own open transaction on this database.

        ``topics`` are made known as part of it: nothing else could, while it holds the
        database's write lock.
        """
        ...

    def close(self) -> None:
        """Close every connection."""
        ...


class BeginsOnLoop(Protocol):
    """What a `Store` can also do that has async connections, for ``async def`` handlers."""

    def begin_on_loop(
        self, scope: Scope | None, on_loop: Callable[[Awaitable[Any]], Any]
    ) -> Session[Any]:
        """`Store.begin`, with everything that happens on the connection awaited on a loop.

        ``on_loop`` awaits there and returns the result. The session's calls block, and come
        from any thread but the loop's own.
        """
        ...


@runtime_checkable
class PublishesOnLoop(Protocol):
    """What such a store can do for ``await app.apublish(..., within=connection)``."""

    async def apublish_within(
        self,
        connection: Any,
        messages: Sequence[Message[Any]],
        topics: Sequence[Topic[Any]] = (),
    ) -> Sequence[Outcome]:
        """`Store.publish_within` on a connection of either colour."""
        ...


def outbox_of(store: Store) -> Outbox | None:
    """The outbox of a store that has one."""
    return getattr(store, "outbox", None) if store.capabilities.outbox else None

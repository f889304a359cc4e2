"""A store with many transactions at once and no outbox, as small as one can be: none that is
shipped has either, and the areas for them have to be seen to pass and to fail.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from duly.broker import Delivery, Outcome
from duly.errors import ConfigurationError, PublishFailed, TransactionFailed
from duly.guarantees import Dead, Done, Settlement
from duly.message import Message
from duly.store import Admitted, Scope, Store, StoreCapabilities
from duly.testing.conformance import Effects, OwnTransaction, Site, StoreSubject

Identity = tuple[str, str, str, str]


class Ledger:
    """Rows and an inbox in memory; what admits a message holds its identity until it ends."""

    def __init__(self, *, fence: bool = True) -> None:
        self.capabilities = StoreCapabilities("ledger", f"ledger:{id(self)}", durable=False)
        self.rows: dict[str, str] = {}
        self.inbox: dict[Identity, bytes] = {}
        self.fence = fence
        self.lock = threading.Lock()
        self.identities: dict[Identity, threading.Lock] = defaultdict(threading.Lock)

    def declare(self, topics: Any) -> None:
        """Nothing is published here."""

    def begin(self, scope: Scope | None) -> LedgerSession:
        return LedgerSession(self, scope)

    def joins(self, connection: Any) -> bool:
        return False

    def publish_within(self, connection: Any, messages: Any, topics: Any = ()) -> Any:
        raise ConfigurationError("a ledger has no outbox")

    def close(self) -> None:
        """Nothing is open."""


class LedgerSession:
    """One transaction: what it wrote, and the identities it holds."""

    def __init__(self, ledger: Ledger, scope: Scope | None) -> None:
        self.ledger, self.scope = ledger, scope
        self.connection: dict[str, str] = {}
        self.saved: dict[str, str] = {}
        self.pending: dict[Identity, bytes] = {}
        self.held: list[threading.Lock] = []
        self.over = False

    def admit(self, deliveries: Sequence[Delivery]) -> Admitted:
        if self.scope is None:
            raise TypeError("a session without a scope admits nothing")
        found: dict[str, list[Delivery]] = {"fresh": [], "repeated": [], "conflicting": []}
        identities = {self.identity(delivery): delivery for delivery in deliveries}
        for identity in sorted(identities) if self.ledger.fence else ():
            lock = self.ledger.identities[identity]
            assert lock.acquire(timeout=10)
            self.held.append(lock)
        for delivery in deliveries:
            identity, body = self.identity(delivery), delivery.message.body_hash()
            earlier = {**self.ledger.inbox, **self.pending}.get(identity)
            self.pending.setdefault(identity, body)
            kind = {None: "fresh", body: "repeated"}.get(earlier, "conflicting")
            found[kind].append(delivery)
        return Admitted(**found)

    def identity(self, delivery: Delivery) -> Identity:
        assert self.scope is not None
        message = delivery.message
        return self.scope.consumer, message.topic, message.source, message.id

    def settle(self, settlements: Sequence[Settlement], deliveries: Sequence[Delivery]) -> None:
        for settlement, delivery in zip(settlements, deliveries, strict=True):
            if not isinstance(settlement, Done | Dead):
                self.pending.pop(self.identity(delivery), None)

    def savepoint(self) -> None:
        self.saved = dict(self.connection)

    def rollback_to_savepoint(self) -> None:
        self.connection.clear()
        self.connection.update(self.saved)

    def release_savepoint(self) -> None:
        """What is written is kept."""

    def declare(self, topics: Any) -> None:
        """Nothing is published here."""

    def publish(self, messages: Sequence[Message[Any]]) -> Sequence[Outcome]:
        return [PublishFailed("a ledger has no outbox", message_id=m.id) for m in messages]

    def commit(self) -> None:
        if self.over:
            raise TransactionFailed("it has ended")
        with self.ledger.lock:
            if self.ledger.rows.keys() & self.connection.keys():
                raise TransactionFailed("a key is there already")
            self.ledger.rows |= self.connection
            self.ledger.inbox |= self.pending
        self.rollback()

    def rollback(self) -> None:
        if self.over:
            return
        self.over = True
        while self.held:
            self.held.pop().release()


def insert(connection: dict[str, str], key: str, value: str) -> None:
    if key in connection:
        raise KeyError(key)
    connection[key] = value


def no_transaction(_: Site, __: Store) -> AbstractContextManager[OwnTransaction]:
    raise ConfigurationError("a ledger joins nobody's transaction")


def subject(**how: bool) -> StoreSubject:
    return StoreSubject(
        name="ledger",
        open=lambda _site, _broker: Ledger(**how),
        effects=lambda _, ledger: Effects(insert, lambda: dict(ledger.rows)),  # type: ignore[attr-defined]
        own=no_transaction,
    )

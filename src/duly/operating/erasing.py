"""A person's messages removed from wherever an app keeps them."""

from __future__ import annotations

from collections.abc import Sequence

from duly.broker import Broker
from duly.errors import ConfigurationError
from duly.inspection.erasing import Erasing, Whose
from duly.store import Store, outbox_of


def whose_messages(key: str | None, id: str | None, source: str, topic: str | None) -> Whose:
    """Which are meant. Raises `ConfigurationError` where that would be everything."""
    if key is None and id is None:
        raise ConfigurationError("say whose messages to erase: their key, or a message's id")
    return Whose(key, id, None if id is None else source, topic)


def erasers(backends: tuple[Broker, Store | None]) -> Sequence[Erasing]:
    """Where such messages may be, in the order in which they move: outbox, then broker.

    Raises `ConfigurationError` where one of them cannot erase: half of it would be a lie.
    """
    broker, store = backends
    found: list[Erasing] = []
    apart = store is not None and store.capabilities.database != broker.capabilities.database
    if store is not None and apart and outbox_of(store) is not None:
        found.append(_able(store, store.capabilities.name))
    found.append(_able(broker, broker.capabilities.name))
    return found


def _able(backend: object, name: str) -> Erasing:
    if not isinstance(backend, Erasing):
        raise ConfigurationError(
            f"{name} cannot remove single messages for duly; nothing was erased. Use its own tools"
        )
    return backend

"""A person's messages removed from wherever an app keeps them."""

from __future__ import annotations

from collections.abc import Sequence

from duly.broker import Broker
from duly.errors import ConfigurationError
from duly.inspection.erasing import Erasing, Whose
from duly.inspection.graves import Buries, graveyard_of
from duly.store import Store, outbox_of


def whose_messages(key: str | None, id: str | None, source: str, topic: str | None) -> Whose:
    """Which are meant. Raises `ConfigurationError` where that would be everything."""
    if key is None and id is None:
        raise ConfigurationError("say whose messages to erase: their key, or a message's id")
    return Whose(key, id, None if id is None else source, topic)


def erasers(backends: tuple[Broker, Store | None]) -> Sequence[Erasing]:
    """Where such messages may be, in the order in which they move: outbox, then broker.

    Raises `ConfigurationError` where one of them cannot erase: half of it would be a lie. A broker
    that keeps nothing but what is on its way to handlers is `out_of_reach` instead.
    """
    broker, store = backends
    found: list[Erasing] = []
    apart = store is not None and store.capabilities.database != broker.capabilities.database
    if store is not None and apart and outbox_of(store) is not None:
        found.append(_able(store, store.capabilities.name))
    if out_of_reach(backends) is None:
        found.append(_able(broker, broker.capabilities.name))
    elif isinstance(broker, Buries):
        broker.carry()
    return found


def out_of_reach(backends: tuple[Broker, Store | None]) -> str | None:
    """What `erasers` does not reach, for people to know; None: nothing."""
    broker, store = backends
    passes_on = isinstance(broker, Buries) and not broker.capabilities.replays
    if isinstance(broker, Erasing) or not passes_on or graveyard_of(store) is None:
        return None
    return (
        f"{broker.capabilities.name} cannot remove what waits in its queues: it goes when it was "
        "handled. What is given up on until then is among the dead letters: erase again"
    )


def _able(backend: object, name: str) -> Erasing:
    if not isinstance(backend, Erasing):
        raise ConfigurationError(
            f"{name} cannot remove single messages for duly; nothing was erased. Use its own tools"
        )
    return backend

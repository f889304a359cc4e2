"""The broker and store as the application sees them in a test: with faults, and watched."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from duly.broker import Broker, Published
from duly.message import Message
from duly.store import Outbox, Store, outbox_of
from duly.testing.faulty import Faults
from duly.testing.seam import Around, Call, WrappedBroker, WrappedOutbox, WrappedStore, inside


class SeenBroker(WrappedBroker):
    """What a `WrappedBroker` does, and whatever else the broker inside can."""

    def __getattr__(self, name: str) -> Any:
        # Looking inside, counting drops: what a broker may have beside the protocol.
        return getattr(self.inner, name)


class SeenStore(WrappedStore):
    """What a `WrappedStore` does, and its outbox."""

    @property
    def outbox(self) -> Outbox | None:
        """What a relay sees of it."""
        outbox = outbox_of(self.inner)
        return None if outbox is None else WrappedOutbox(outbox, self._around)


class Seen:
    """What a test has to know of the calls that pass.

    ``messages`` are those published to be delivered later: nobody sees them in the broker yet.
    ``topics`` are the names of all that were published to, for certain or not.
    """

    def __init__(self) -> None:
        self.messages: list[Message[Any]] = []
        self.topics: set[str] = set()
        self._begun: set[str] = set()
        self._open: defaultdict[str, list[Message[Any]]] = defaultdict(list)

    def __call__(self, call: Call, perform: Callable[[Any], Any]) -> Any:
        if call.name in ("publish", "publish in transaction"):
            self.topics.update(message.topic for message in call.given)
        answer = perform(call.given)
        if call.name in ("publish", "publish in transaction"):
            stored = [m for m, o in zip(call.given, answer, strict=True) if type(o) is Published]
            self._note(call.tx, stored)
        elif call.name == "begin":
            self._begun.add(call.tx)
        elif call.name == "commit":
            self._begun.discard(call.tx)
            self.messages += self._open.pop(call.tx, ())
        elif call.name == "rollback":
            self._begun.discard(call.tx)
            self._open.pop(call.tx, None)
        return answer

    @property
    def transactions(self) -> int:
        """How many are open; each may keep everybody else waiting."""
        return len(self._begun)

    def _note(self, tx: str, stored: Sequence[Message[Any]]) -> None:
        late = [message for message in stored if message.due_ms is not None]
        if tx:
            self._open[tx] += late
        else:
            self.messages += late


def seen(
    broker: Broker, store: Store | None, calls: Seen, faults: Faults | None
) -> tuple[SeenBroker, SeenStore | None]:
    """Both, as the application is to see them."""
    around: Around = calls
    if faults is not None:
        faults.meet(broker.capabilities)
        around = inside(faults, calls)
    return SeenBroker(broker, around), None if store is None else SeenStore(store, around)

"""A relay process that dies at a step: ``python -m tests.kafka.relaying BROKER STORE STEP NTH``."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

import duly
from duly.brokers.kafka.gate import Gate
from duly.brokers.kafka.transactions import TransactionalProducer
from duly.relay import Relay, RelayOptions
from duly.store import outbox_of

ORDERS: duly.Topic[int] = duly.Topic("orders", int, guarantee="exactly-once", partitions=4)
QUICK = RelayOptions(batch=7, lease_s=1.0, first_s=0.02, longest_s=0.2)

STEPS = (
    "resumed",  # nothing was looked at by its note
    "looked",  # a batch is in its hands
    "begun",
    "half sent",  # some of a batch's records are on the cluster
    "sent",  # all of them and the note, and no commit
    "committing",  # the commit is on its way, and perhaps there
    "committed",  # and the outbox does not know
    "dropped",  # now it does
)


def die() -> NoReturn:
    """Without a word to anybody."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("nobody survives it")


class Count:
    """Calls of one function, of which the nth is the last."""

    def __init__(self, nth: int) -> None:
        self._nth = nth
        self._calls = 0

    def after(self, owner: Any, name: str, do: Callable[..., object]) -> None:
        """Do this when it has returned."""
        inner = getattr(owner, name)

        def call(*given: Any, **more: Any) -> Any:
            found = inner(*given, **more)
            if self._is_last():
                do(*given)
            return found

        setattr(owner, name, call)

    def before(self, owner: Any, name: str, do: Callable[..., object]) -> None:
        """Do this when it is called."""
        inner = getattr(owner, name)

        def call(*given: Any, **more: Any) -> Any:
            if self._is_last():
                do(*given)
            return inner(*given, **more)

        setattr(owner, name, call)

    def _is_last(self) -> bool:
        self._calls += 1
        return self._calls == self._nth


SEND = TransactionalProducer.send


def arrived(producer: Any, *_: Any) -> NoReturn:
    """The cluster has all that was sent."""
    assert producer._producer.flush(20) == 0
    die()


def in_the_middle(producer: Any, sendings: Any) -> NoReturn:
    """And half of the rest."""
    SEND(producer, sendings[: len(sendings) // 2])
    arrived(producer)


def die_at(step: str, nth: int, relay: Any) -> None:
    """Have this process die when it comes to a step for the nth time."""
    count, kafka = Count(nth), TransactionalProducer
    at: dict[str, Callable[[], None]] = {
        "resumed": lambda: count.after(Gate, "resume", lambda *_: die()),
        "looked": lambda: count.after(relay._outbox, "unsent", lambda *_: die()),
        "begun": lambda: count.after(kafka, "begin", lambda *_: die()),
        "half sent": lambda: count.before(kafka, "send", in_the_middle),
        "sent": lambda: count.after(kafka, "send", arrived),
        # The second commit takes some milliseconds, and in one of them it ends.
        "committing": lambda: Count(2).before(
            kafka, "commit", lambda *_: threading.Timer(nth * 0.001, die).start()
        ),
        "committed": lambda: count.after(kafka, "commit", lambda *_: die()),
        "dropped": lambda: count.after(relay._outbox, "sent", lambda *_: die()),
    }
    assert list(at) == list(STEPS)
    at[step]()


def relay_of(app: duly.App, **more: Any) -> Relay:
    """A relay of the app's outbox, as its workers have one."""
    broker, store = app.backends()
    assert store is not None
    outbox = more.pop("outbox", None) or outbox_of(store)
    assert outbox is not None
    given: dict[str, Any] = {"wait_s": 0.0, "outbox_name": store.capabilities.database, **more}
    return Relay(outbox, broker, QUICK, **given)


def shop_at(broker: str, store: str) -> duly.App:
    """An app that publishes orders."""
    app = duly.App("shop", broker=broker, store=store)
    app.declare(ORDERS)
    return app


def main(broker: str, store: str, step: str = "", nth: str = "1") -> None:
    """Relay, until it dies."""
    relay = relay_of(shop_at(broker, store))
    if step:
        die_at(step, int(nth), relay)
    sys.stdout.write("at work\n")
    sys.stdout.flush()
    relay.run(threading.Event())


if __name__ == "__main__":
    main(*sys.argv[1:])

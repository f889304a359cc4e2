"""Publishers and a worker on a PostgreSQL broker that go on whatever happens to it."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

from duly.broker import Delivery
from duly.brokers.postgres import PostgresBroker
from duly.brokers.postgres.lane import Lane
from duly.errors import BrokerError, CommitUnknown
from duly.guarantees import Done
from tests.postgres.brokers import lane, message, topic
from tests.waiting import eventually

ONCE = topic("once", "exactly-once")


def kinds(outcomes: Any) -> list[str]:
    return [type(outcome).__name__ for outcome in outcomes]


class Crowd:
    """Publishers and a worker on one broker, which go on whatever happens to the server."""

    def __init__(self, broker: PostgresBroker) -> None:
        self._broker = broker
        self.acknowledged: list[str] = []
        self.maybe: set[str] = set()
        self.handled: Counter[str] = Counter()
        # Of these nobody confirmed that they were settled.
        self.in_doubt: set[str] = set()
        self._published = threading.Event()
        self._drained = threading.Event()
        self._publishers = [
            threading.Thread(target=self._publish, args=(name,)) for name in ("a", "b")
        ]
        self._worker = threading.Thread(target=self._work)
        for thread in (*self._publishers, self._worker):
            thread.start()

    def some_more(self) -> None:
        """Wait until publishing has gone on for a while."""
        enough = len(self.acknowledged) + 30
        eventually(lambda: len(self.acknowledged) > enough, "publishing goes on")

    def end(self) -> None:
        """Publish no more, handle what is there, and stop."""
        self._published.set()
        for thread in self._publishers:
            thread.join(30)
        eventually(lambda: set(self.acknowledged) <= set(self.handled), "everything is handled")
        self._drained.set()
        self._worker.join(30)

    def judge(self) -> None:
        """What was acknowledged was handled, and nothing twice whose settlement was confirmed."""
        assert len(set(self.acknowledged)) == len(self.acknowledged)
        invented = set(self.handled) - set(self.acknowledged) - self.maybe
        assert not invented, "nobody published these"
        repeats = {id for id, times in self.handled.items() if times > 1}
        assert repeats <= self.in_doubt, "handled again though its settlement was confirmed"

    def _publish(self, name: str) -> None:
        number = 0
        while not self._published.is_set():
            id = f"{name}-{number}"
            if self._is_published(id):
                self.acknowledged.append(id)
                number += 1

    def _is_published(self, id: str) -> bool:
        with contextlib.suppress(BrokerError):
            [outcome] = kinds(self._broker.publish([message(ONCE, id, id=id)]))
            if outcome == "PublishUnknown":
                self.maybe.add(id)
            return outcome in ("Published", "RepeatDropped")
        return False

    def _work(self) -> None:
        sub: Lane | None = None
        while not self._drained.is_set():
            with contextlib.suppress(BrokerError, CommitUnknown):
                sub = sub or lane(self._broker, ONCE, lease_s=2.0)
                self._handle(sub, sub.claim(10, 1 << 20, 0.05))

    def _handle(self, sub: Lane, deliveries: Sequence[Delivery]) -> None:
        ids = {delivery.receipt: delivery.message.id for delivery in deliveries}
        self.handled.update(ids.values())
        before = set(self.in_doubt)
        self.in_doubt.update(ids.values())
        refused = sub.settle([Done(receipt) for receipt in ids])
        self.in_doubt = before | {ids[receipt] for receipt in refused}

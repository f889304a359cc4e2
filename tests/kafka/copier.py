"""A worker that copies one topic into another, and dies where it is told to.

``COPIER_BROKER`` is the broker's URL. ``COPIER_STRIKES=step:n:signal`` sends that signal to itself
at this step of the n-th transaction that stores records: ``begun``, ``sent`` (the records),
``stored`` (the cluster has them), ``placed`` (the positions), ``committed``; or, as ``told``, when
the positions are there, in the n-th transaction that stores none.
``COPIER_FAILS=n:m``: of these transactions, from the n-th to the m-th, none can be committed.
``COPIER_TAKES=payloads``: its handler takes those, which are claimed and settled many at a time.
``COPIER_KILLS=n:attempts:batch``: this number kills its process each time, and so on.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence

import duly
from duly.brokers.kafka import producers
from duly.brokers.kafka.producer import Sending
from duly.brokers.kafka.transactions import TransactionalProducer
from duly.errors import TransactionInterrupted
from duly.worker import Worker

HERE = duly.Topic("here", int, guarantee="at-least-once", partitions=4)
THERE = duly.Topic("there", int, guarantee="at-least-once", partitions=4)
KEYS = 23
RETRY = duly.RetryPolicy(first_s=0.05, longest_s=0.1)

_never = threading.Event()


def copier(broker: str, *, batch: int = 25, tx_s: float = 0.1, takes_s: float = 0.0) -> duly.App:
    """An application that does that and nothing else, and takes so long for each message."""
    app, retry, kills = duly.App("copier", broker=broker), RETRY, -1
    if told := os.environ.get("COPIER_KILLS"):
        kills, attempts, batch = map(int, told.split(":"))
        retry = duly.RetryPolicy(attempts=attempts)
    consumer = app.consumer(
        HERE, name="copy", guarantee="exactly-once", batch=batch, retry=retry, tx_s=tx_s
    )

    def copy(order: duly.Message[int], tx: duly.Transaction[None]) -> None:
        if order.payload == kills:
            os.kill(os.getpid(), signal.SIGKILL)
        _never.wait(takes_s)
        tx.publish(THERE, order.payload, id=order.id, key=order.key)

    def copy_payload(order: int, tx: duly.Transaction[None]) -> None:
        _never.wait(takes_s)
        tx.publish(THERE, order, id=str(order), key=str(order % KEYS))

    if os.environ.get("COPIER_TAKES") == "payloads":
        consumer(copy_payload)
    else:
        consumer(copy)
    return app


class Struck(TransactionalProducer):
    """Of all producers of this process the n-th transaction is struck."""

    step, at, by = "", 0, signal.SIGKILL
    failing = range(0)
    count = told = 0
    stores = False

    def send(self, sendings: Sequence[Sending]) -> None:
        self.stores = bool(sendings)
        Struck.count += self.stores
        self._strike("begun")
        super().send(sendings)
        if self.stores and self.count in self.failing:
            self.abort()
            raise TransactionInterrupted("rolled back: it is to fail")
        self._strike("sent")
        if self.step == "stored":
            self._producer.flush(10)
        self._strike("stored")

    def send_offsets(self, places: Sequence[object], group: bytes) -> None:
        super().send_offsets(places, group)  # type: ignore[arg-type]
        self._strike("placed")
        if not self.stores:
            Struck.told += 1
            if self.step == "told" and self.told == self.at:
                os.kill(os.getpid(), self.by)

    def commit(self) -> None:
        super().commit()
        self._strike("committed")

    def _strike(self, step: str) -> None:
        if step == self.step and self.stores and self.count == self.at:
            os.kill(os.getpid(), self.by)


def main() -> None:
    """Work until SIGTERM."""
    if strikes := os.environ.get("COPIER_STRIKES"):
        step, at, by = strikes.split(":")
        Struck.step, Struck.at, Struck.by = step, int(at), signal.Signals[by]
        first, last = map(int, os.environ.get("COPIER_FAILS", "0:-1").split(":"))
        Struck.failing = range(first, last + 1)
        setattr(producers, "TransactionalProducer", Struck)  # noqa: B010 - types
    over = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    with Worker(copier(os.environ["COPIER_BROKER"])) as worker:
        while not over.wait(0.1):
            assert not worker.wait(0), "a lane has ended"


if __name__ == "__main__":
    main()

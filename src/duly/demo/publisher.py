"""`Publisher`: what the shop's customers, cars and sensors do, slice by slice."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, TypeVar

from duly.app import App
from duly.broker import Published, RepeatDropped
from duly.demo.book import Book, Outcome
from duly.demo.pace import Pace, slices
from duly.demo.shop import Payment, Reading, RideUpdate, checkout, rides, sensors
from duly.errors import PublishFailed, PublishIncomplete
from duly.message import Topic
from duly.publishing import Buffered

T = TypeVar("T")

ACCOUNTS = 200
OPENING_CENTS = 1_000_000
SENSORS = 20
STATUSES = ("requested", "accepted", "arriving", "riding", "arrived")
# Messages of each topic by turns, as they would come in a shop; one commit each.
CHUNK = 250
# Small slices come in so many pieces, so that there is work for longer than a moment.
PIECES = 20
# One chunk of payments in so many is published twice, as after a lost answer.
TWICE_IN = 10


class Publisher(threading.Thread):
    """Publishes ``messages`` to each topic and writes down what it asked for and what it heard."""

    def __init__(self, app: App, book: Book, pace: Pace, messages: int, seed: int) -> None:
        super().__init__(name="duly-demo-publisher", daemon=True)
        self.error: Exception | None = None
        self.published = 0
        self._chunks = 0
        self._app = app
        self._book = book
        self._pace = pace
        self._messages = messages
        self._random = Random(seed)
        self._stopping = threading.Event()

    def run(self) -> None:
        """Publish everything, in step with the killer."""
        try:
            for number, part in enumerate(slices(self._messages, self._pace.kills + 1)):
                self._pace.wait_for_slice(number)
                step = max(1, min(CHUNK, len(part) // PIECES))
                for start in range(part.start, part.stop, step):
                    if self._stopping.is_set():
                        return
                    self._publish_chunk(range(start, min(start + step, part.stop)))
                    self._pace.wait_a_bit()
        except Exception as error:  # noqa: BLE001 - raised again by whoever waits for this thread
            self.error = error

    def stop(self) -> None:
        """Publish no further chunk."""
        self._stopping.set()
        self._pace.let_go()

    def _publish_chunk(self, numbers: range) -> None:
        readings = [self._reading(number) for number in numbers]
        self._publish(
            sensors, readings, [str(number) for number in numbers],
            lambda r: (r.sensor, r.number, r.value),
        )  # fmt: skip
        updates = [_update(number) for number in numbers]
        self._publish(
            rides, updates, [f"{update.ride}-{update.step}" for update in updates],
            lambda u: (u.ride, u.step, u.status),
        )  # fmt: skip
        payments = [self._payment(number) for number in numbers]
        ids = [payment.order for payment in payments]
        self._publish(checkout, payments, ids, lambda p: (p.payer, p.payee, p.cents))
        self._chunks += 1
        if self._chunks % TWICE_IN == 0:
            self._book.repeat(ids)
            self._ask(checkout, payments, ids)
        self.published += len(numbers)

    def _publish(
        self,
        topic: Topic[T],
        payloads: Sequence[T],
        ids: Sequence[str],
        fields: Callable[[T], tuple[Any, ...]],
    ) -> None:
        rows = [(id, *fields(payload)) for id, payload in zip(ids, payloads, strict=True)]
        self._book.invoke(topic.name, rows)
        self._book.end(topic.name, zip(self._ask(topic, payloads, ids), ids, strict=True))

    def _ask(self, topic: Topic[T], payloads: Sequence[T], ids: Sequence[str]) -> Sequence[Outcome]:
        try:
            return [_outcome(each) for each in self._app.publish_many(topic, payloads, ids=ids)]
        except PublishIncomplete as error:
            return [_outcome(each) for each in error.outcomes]

    def _reading(self, number: int) -> Reading:
        return Reading(number % SENSORS, number, round(self._random.gauss(20.0, 5.0), 2))

    def _payment(self, number: int) -> Payment:
        payer, payee = self._random.sample(range(ACCOUNTS), 2)
        return Payment(f"order-{number:06}", payer, payee, self._random.randint(1, 50_000))


def accounts() -> Sequence[tuple[int, int]]:
    """Every account and the cents it starts with."""
    return [(account, OPENING_CENTS) for account in range(ACCOUNTS)]


def _update(number: int) -> RideUpdate:
    ride, step = divmod(number, len(STATUSES))
    return RideUpdate(ride, step, STATUSES[step])


def _outcome(answer: object) -> Outcome:
    """What is certain after this answer. A reading that is only buffered may still be lost."""
    if isinstance(answer, Published | RepeatDropped | Buffered):
        return "ok"
    return "unknown" if not isinstance(answer, PublishFailed) else "fail"

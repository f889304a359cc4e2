"""`Reader`: a topic of duly's own with one partition, read from its beginning to its end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from duly.brokers.kafka.address import Address
from duly.brokers.kafka.client import MOVING, broker_error, reading
from duly.errors import BrokerUnavailable

_SILENCE_S = 15.0
_BACK = 16
_never = threading.Event()


class Reader:
    """Goes on where it was: each call gives the records that came since the last. One thread at a
    time reads.
    """

    def __init__(self, address: Address, topic: str) -> None:
        self.lock = threading.Lock()
        self._address = address
        self._topic = topic
        self._next = 0
        self._assigned = False
        self._consumer: Any = None

    def read(self) -> Iterator[Any]:
        """What is new, up to what is there now. Raises `BrokerError`."""
        self._open()
        first, end = self._bounds()
        if self._next < first or (end and not self._assigned):
            yield from self._between(first, end)
        else:
            yield from self._until(end)

    def _open(self) -> None:
        if self._consumer is None:
            self._consumer = Consumer(reading(self._address, self._topic))

    def _between(self, start: int, end: int) -> Iterator[Any]:
        self._consumer.assign([TopicPartition(self._topic, 0, start)])
        self._next, self._assigned = start, True
        yield from self._until(end)

    def _until(self, end: int) -> Iterator[Any]:
        heard_s = time.monotonic()
        while self._next < end:
            for record in self._records():
                heard_s = time.monotonic()
                error = record.error()
                if error is None:
                    yield record
                elif error.code() != KafkaError._PARTITION_EOF:
                    raise broker_error(error, f"topic {self._topic!r} was not read to its end")
                self._next = max(self._next, record.offset() + (error is None))
            if time.monotonic() > heard_s + _SILENCE_S:
                raise BrokerUnavailable(f"topic {self._topic!r} was not read to its end")

    def last(self) -> Any:
        """The last record that is committed; None: there is none. Raises `BrokerError`."""
        self._open()
        first, end = self._bounds()
        back = _BACK
        while True:
            start, found = max(first, end - back), None
            for record in self._between(start, end):
                found = record
            if found is not None or start == first:
                return found
            back *= _BACK  # there were only markers of transactions, and what was rolled back

    def _bounds(self) -> tuple[int, int]:
        """Where it begins and ends now."""
        place, until = TopicPartition(self._topic, 0), time.monotonic() + _SILENCE_S
        while True:
            try:
                first, end = self._consumer.get_watermark_offsets(place, timeout=_SILENCE_S)
                return int(first), int(end)
            except KafkaException as error:
                if error.args[0].code() not in MOVING or time.monotonic() > until:
                    raise broker_error(error, f"topic {self._topic!r} cannot be read") from error
            _never.wait(0.02)

    def _records(self) -> list[Any]:
        first = self._consumer.poll(0.5)
        return [] if first is None else [first, *self._consumer.consume(1000, 0)]

    def close(self) -> None:
        """Read no more."""
        with self.lock:
            if self._consumer is not None:
                self._consumer.close()
                self._consumer, self._assigned = None, False

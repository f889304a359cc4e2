"""`Sender`: records to the cluster, and what became of each.

The driver retries by itself until the deadline, and its idempotence keeps what it retries from
being stored twice or in another order. An error that ends this ends the producer: another takes
its place, and what was on its way is unknown.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Producer

from duly.brokers.kafka.address import Address
from duly.brokers.kafka.client import log, settings
from duly.brokers.kafka.wire import Headers
from duly.errors import BrokerUnavailable

# Certainly not stored: the broker or the driver refused it.
_REFUSED = frozenset(
    {
        KafkaError.MSG_SIZE_TOO_LARGE,
        KafkaError.RECORD_LIST_TOO_LARGE,
        KafkaError.INVALID_MSG,
        KafkaError.INVALID_RECORD,
        KafkaError.INVALID_TIMESTAMP,
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
        KafkaError.POLICY_VIOLATION,
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError.TOPIC_EXCEPTION,
        KafkaError._UNKNOWN_TOPIC,
        KafkaError._UNKNOWN_PARTITION,
        KafkaError._INVALID_ARG,
        KafkaError._QUEUE_FULL,
    }
)
TOO_LARGE = frozenset({KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.RECORD_LIST_TOO_LARGE})

_AT_ONCE = 20_000


class Sending:
    """One record on its way. ``error`` is the driver's, once ``ended``."""

    __slots__ = (
        *("body", "ended", "error", "headers", "key", "offset", "partition", "stamp_ms"),
        *("topic", "waiting"),
    )

    def __init__(
        self,
        topic: str,
        body: bytes | None,
        key: bytes | None,
        headers: Headers,
        *,
        stamp_ms: int = 0,
        partition: int = -1,
    ) -> None:
        self.topic = topic
        self.body = body
        self.key = key
        self.headers = headers
        self.stamp_ms = stamp_ms
        self.partition = partition
        self.offset = -1
        self.ended = False
        self.error: KafkaError | None = None
        self.waiting: _Waiting | None = None

    @property
    def is_stored(self) -> bool:
        """Whether the cluster has it."""
        return self.ended and self.error is None

    @property
    def is_refused(self) -> bool:
        """Whether it is certainly not stored."""
        return self.ended and self.error is not None and self.error.code() in _REFUSED

    def __call__(self, error: KafkaError | None, record: Any) -> None:
        """The driver's report, on the thread that polls."""
        if error is None:
            self.partition, self.offset = record.partition(), record.offset()
        self.end(error)

    def end(self, error: KafkaError | None) -> None:
        """What became of it is known."""
        self.ended, self.error = True, error
        if self.waiting is not None:
            self.waiting.one()


class _Waiting:
    """Somebody who waits for so many reports."""

    def __init__(self, count: int) -> None:
        self._left = count
        self._lock = threading.Lock()
        self.over = threading.Event()

    def one(self) -> None:
        """One more was reported."""
        with self._lock:
            self._left -= 1
            if not self._left:
                self.over.set()


class Sender:
    """``lossy``: sent once and not confirmed, from a buffer that refuses what does not fit."""

    def __init__(self, address: Address, deadline_s: float, *, lossy: bool = False) -> None:
        self._deadline_s = deadline_s
        self._lossy = lossy
        self._settings = settings(
            {"linger.ms": "1", **address.producing}, _LOSSY if lossy else _surely(deadline_s)
        )
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._producer: Any = None
        self._poller: threading.Thread | None = None

    def send(self, sendings: Sequence[Sending]) -> None:
        """Send these, in order, and return when what became of each is known, or the deadline is
        over: then it has not ``ended``.
        """
        self._send(sendings)
        # A batch is refused as a whole: of those in it most may fit by themselves.
        if len(sendings) > 1:
            for sending in sendings:
                if sending.error is not None and sending.error.code() in TOO_LARGE:
                    sending.ended, sending.error = False, None
                    self._send([sending])

    def _send(self, sendings: Sequence[Sending]) -> None:
        waiting = _Waiting(len(sendings))
        for sending in sendings:
            sending.waiting = waiting
        producer = self._open()
        until = time.monotonic() + self._deadline_s + 5.0
        for sending in sendings:
            self._hand_over(producer, sending, until)
        if sendings:
            waiting.over.wait(max(0.0, until - time.monotonic()))
        if any(each.error is not None and each.error.fatal() for each in sendings):
            self._renew(producer)

    def surely(self, sendings: Sequence[Sending], what: str) -> None:
        """Send these. Raises `BrokerUnavailable` unless the cluster has all of them."""
        self.send(sendings)
        failed = [each for each in sendings if not each.is_stored]
        if failed:
            error = failed[0].error
            raise BrokerUnavailable(
                f"{what}: {len(failed)} of {len(sendings)} records were not confirmed; of the "
                f"first, for {failed[0].topic!r}: {'no answer' if error is None else error.str()}"
            )

    def _hand_over(self, producer: Any, sending: Sending, until: float) -> None:
        while True:
            try:
                producer.produce(
                    sending.topic, sending.body, sending.key, sending.partition,
                    on_delivery=sending, timestamp=sending.stamp_ms, headers=sending.headers,
                )  # fmt: skip
                return
            except BufferError:
                if self._lossy or time.monotonic() > until:
                    sending.end(KafkaError(KafkaError._QUEUE_FULL))
                    return
                self._closed.wait(0.005)
            except KafkaException as error:
                sending.end(error.args[0])
                return

    def _open(self) -> Any:
        with self._lock:
            if self._closed.is_set():
                raise BrokerUnavailable("Kafka was closed; nothing was sent")
            if self._producer is None:
                self._producer = Producer(self._settings)
            if self._poller is None:
                self._poller = threading.Thread(
                    target=self._polling, name="duly-kafka-producer", daemon=True
                )
                self._poller.start()
            return self._producer

    def _renew(self, failed: Any) -> None:
        with self._lock:
            if self._producer is failed:
                log.warning("Kafka: the producer's session ended; a new one begins")
                self._producer = None
        failed.purge()
        failed.flush(1.0)

    def _polling(self) -> None:
        while not self._closed.is_set():
            producer = self._producer
            if producer is None:
                self._closed.wait(0.01)
            else:
                producer.poll(0.1)

    def close(self) -> None:
        """Send no more; who still waits for a report is told that there is none."""
        with self._lock:
            self._closed.set()
            producer, self._producer = self._producer, None
        if self._poller is not None:
            self._poller.join(5.0)
        if producer is not None:
            producer.flush(0.2)
            producer.purge()
            producer.flush(0.2)


def _surely(deadline_s: float) -> Mapping[str, Any]:
    return {
        "enable.idempotence": True,
        "acks": "all",
        "partitioner": "murmur2_random",
        "delivery.timeout.ms": int(deadline_s * 1000),
        "queue.buffering.max.messages": _AT_ONCE,
    }


_LOSSY: Mapping[str, Any] = {
    "acks": 0,
    "enable.idempotence": False,
    "message.send.max.retries": 0,
    "partitioner": "murmur2_random",
    "delivery.timeout.ms": 2000,
    "queue.buffering.max.messages": _AT_ONCE,
    "queue.buffering.max.kbytes": 16 * 1024,
}

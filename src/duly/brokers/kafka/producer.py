"""`Sender`: records to the cluster, and what became of each.

The driver retries by itself until the deadline, and its idempotence keeps what it retries from
being stored twice or in another order. An error that ends this ends the producer: another takes
its place, and what was on its way is unknown.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from confluent_kafka import KafkaError, KafkaException, Producer

from duly.brokers.kafka.address import Address
from duly.brokers.kafka.client import check_options, log, settings
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
# So long records wait for company, unless somebody flushes. In the last of these milliseconds the
# driver's thread spins, so with one it would whenever anything is sent (librdkafka 2.16).
_LINGERS_MS = 5
# What others send meanwhile holds up who flushes for no longer.
_FLUSHES_S = 0.002
# Who waits for nothing leaves reports to be heard by now and then.
_HEARS_S = 0.1


class Sending(msgspec.Struct, eq=False, gc=False):
    """One record on its way. ``error`` is the driver's, once ``ended``. A msgspec.Struct because
    there is one for each message.
    """

    topic: str
    body: bytes | None
    key: bytes | None
    headers: Headers
    stamp_ms: int = 0
    partition: int = -1
    ended: bool = False
    error: KafkaError | None = None
    waiting: _Waiting | None = None

    @property
    def is_stored(self) -> bool:
        """Whether the cluster has it."""
        return self.ended and self.error is None

    @property
    def is_refused(self) -> bool:
        """Whether it is certainly not stored."""
        return self.ended and self.error is not None and self.error.code() in _REFUSED

    def __call__(self, error: KafkaError | None, _record: Any) -> None:
        """The driver's report, on whichever thread polls."""
        self.ended, self.error = True, error
        if (waiting := self.waiting) is not None:
            waiting.one()

    def end(self, error: KafkaError | None) -> None:
        """What became of it is known."""
        self(error, None)


class _Waiting:
    """Somebody who waits for so many reports."""

    def __init__(self, count: int) -> None:
        self._all = count
        # Counts without a lock: next() is one step, whoever calls it.
        self._reported = itertools.count(1)
        self.over = threading.Event()

    def one(self) -> None:
        """One more was reported."""
        if next(self._reported) == self._all:
            self.over.set()


class Sender:
    """``lossy``: sent once and not confirmed, from a buffer that refuses what does not fit."""

    def __init__(self, address: Address, deadline_s: float, *, lossy: bool = False) -> None:
        self._deadline_s = deadline_s
        self._lossy = lossy
        self._settings = settings(
            {"linger.ms": str(_LINGERS_MS), **address.producing},
            _LOSSY if lossy else {**SURELY, "delivery.timeout.ms": int(deadline_s * 1000)},
        )
        self._lock = threading.Lock()
        self._alone = threading.Lock()
        self._closed = threading.Event()
        self._producer: Any = None
        self._poller: threading.Thread | None = None

    def check_options(self, shown: str) -> None:
        """Raises `ConfigurationError` where the driver does not take those of the address."""
        check_options(Producer, self._settings, shown)

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
            self._await(producer, waiting, until)
        if any(each.error is not None and each.error.fatal() for each in sendings):
            self._renew(producer)

    def _await(self, producer: Any, waiting: _Waiting, until: float) -> None:
        """Wait for the reports. Who is alone sends at once what waits for company, and polls for
        its reports itself: another thread that has to be woken costs more than they do.
        """
        while not waiting.over.is_set() and (left_s := until - time.monotonic()) > 0:
            if self._alone.acquire(blocking=False):
                try:
                    producer.flush(min(left_s, _FLUSHES_S))
                finally:
                    self._alone.release()
            else:
                waiting.over.wait(min(left_s, _FLUSHES_S))

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
            elif self._lossy:
                producer.poll(_HEARS_S)
            else:
                # What comes too late for who has waited; all others poll themselves.
                self._closed.wait(_HEARS_S)
                producer.poll(0)

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


SURELY: Mapping[str, Any] = {
    "enable.idempotence": True,
    "acks": "all",
    "partitioner": "murmur2_random",
    "queue.buffering.max.messages": _AT_ONCE,
}
"""Of every producer whose records are confirmed."""


_LOSSY: Mapping[str, Any] = {
    "acks": 0,
    "enable.idempotence": False,
    "message.send.max.retries": 0,
    "partitioner": "murmur2_random",
    "delivery.timeout.ms": 2000,
    "queue.buffering.max.messages": _AT_ONCE,
    "queue.buffering.max.kbytes": 16 * 1024,
}

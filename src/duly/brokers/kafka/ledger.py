"""`Ledger`: what Kafka's coordinators have written of transactions, in a topic of their own.

Nobody else can say what became of a transaction whose process is dead. The driver has no request
for it; the topic may be read by whoever has the right to. What stands in it is Kafka's own
(``TransactionLogKey`` and ``TransactionLogValue`` of its sources, versions 0 and 1).
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import msgspec
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from duly.brokers.kafka.address import Address
from duly.brokers.kafka.admin import Admin
from duly.brokers.kafka.client import broker_error, reading
from duly.errors import BrokerUnavailable

TOPIC = "__transaction_state"
# A large cluster's has some gigabytes until it is compacted; what takes longer is not looked at.
_TAKES_S = 20.0

Place = tuple[str, int]

# Open, and about to be committed or aborted: its partitions are not told yet.
OPEN = frozenset({1, 2, 3})
COMMITTED, ABORTED = 4, 5
# Of an id under which nothing is open, or whose producer is fenced off.
_IDLE = frozenset({0, 6, 7})
_HEAD = struct.Struct(">qhib")
# When it was written last, and when it began.
_TIMES = struct.Struct(">qq")


class Entry(msgspec.Struct, frozen=True):
    """The latest transaction under one id: its ``status``, the ``places`` where it wrote, and when
    it began.
    """

    status: int
    places: frozenset[Place]
    began_ms: int


class Ledger:
    """``prefix`` begins the transactional ids that are looked for."""

    def __init__(self, address: Address, admin: Admin, prefix: str) -> None:
        self._address = address
        self._admin = admin
        self._prefix = prefix

    def entries(self, goes_on: Callable[[], bool]) -> dict[str, Entry]:
        """By transactional id, the one that was written last at the end; of ids that are not looked
        for those that are open. Read as long as it ``goes_on``. Raises `BrokerError`.
        """
        found: dict[str, Entry] = {}
        others: dict[str, bytes] = {}
        for key, value in self._records(goes_on):
            id = read_key(key)
            if id is None:
                continue
            if not id.startswith(self._prefix):
                # There may be millions of them, which are not to be read each.
                others.pop(id, None)
                if value is not None and _status(value) in OPEN:
                    others[id] = value
                continue
            entry = None if value is None else read_value(value)
            before = found.pop(id, None)
            if entry is None:
                continue
            if before is not None:
                # Who begins anew under it has no transaction yet, and of one that is over no
                # partition is written down any more.
                status = before.status if entry.status in _IDLE else entry.status
                entry = Entry(status, entry.places or before.places, entry.began_ms)
            found[id] = entry
        for id, value in others.items():
            if (entry := read_value(value)) is not None:
                found[id] = entry
        return found

    def _records(self, goes_on: Callable[[], bool]) -> Iterator[tuple[bytes, bytes | None]]:
        until = time.monotonic() + _TAKES_S
        ends = self._admin.written(TOPIC)
        left = {place: end for place, (first, end) in ends.items() if first < end}
        if not left:
            return
        try:
            reader: Any = Consumer(reading(self._address, "ledger"))
            with closing(reader):
                reader.assign([TopicPartition(*place, ends[place][0]) for place in left])
                while left:
                    if not goes_on():
                        raise BrokerUnavailable(f"{TOPIC} was not read: Kafka was closed")
                    if time.monotonic() > until:
                        raise BrokerUnavailable(f"{TOPIC} was not read to its end")
                    for record in reader.consume(1000, 0.2):
                        place = record.topic(), record.partition()
                        error = record.error()
                        if error is None:
                            yield record.key() or b"", record.value()
                        elif error.code() != KafkaError._PARTITION_EOF:
                            raise KafkaException(error)
                        # At the end the driver tells where that is.
                        if record.offset() + (error is None) >= left.get(place, 1 << 62):
                            del left[place]
        except KafkaException as error:
            raise broker_error(error, f"{TOPIC} was not read") from error


def read_key(key: bytes) -> str | None:
    """The transactional id; None for what is none that this code knows."""
    try:
        version, size = struct.unpack_from(">hh", key)
        return key[4 : 4 + size].decode() if version == 0 else None
    except (struct.error, UnicodeDecodeError):
        return None


def read_value(value: bytes) -> Entry | None:
    """What is written of one; None for what is none that this code knows."""
    try:
        (version,) = struct.unpack_from(">h", value)
        if version not in (0, 1):
            return None
        *_, status = _HEAD.unpack_from(value, 2)
        places, at = _places(value, 2 + _HEAD.size, compact=version == 1)
        _, began_ms = _TIMES.unpack_from(value, at)
        return Entry(status, frozenset(places), began_ms)
    except (struct.error, IndexError, UnicodeDecodeError):
        return None


def _status(value: bytes) -> int:
    try:
        return int(_HEAD.unpack_from(value, 2)[-1])
    except struct.error:
        return -1


def _places(value: bytes, at: int, *, compact: bool) -> tuple[list[Place], int]:
    """Where it wrote, and where what follows begins."""
    places: list[Place] = []
    topics, at = _count(value, at, compact=compact)
    for _ in range(topics):
        size, at = _count(value, at, compact=compact, short=True)
        topic, at = value[at : at + size].decode(), at + size
        count, at = _count(value, at, compact=compact)
        places += [(topic, partition) for partition in struct.unpack_from(f">{count}i", value, at)]
        at += 4 * count
        if compact:
            tags, at = _varint(value, at)
            if tags:
                raise struct.error("tagged fields that this code does not know")
    return places, at


def _count(value: bytes, at: int, *, compact: bool, short: bool = False) -> tuple[int, int]:
    """How many there are of what follows, and where that begins; of none at all: 0."""
    if compact:
        more, at = _varint(value, at)
        return max(0, more - 1), at
    form = ">h" if short else ">i"
    (count,) = struct.unpack_from(form, value, at)
    return max(0, count), at + struct.calcsize(form)


def _varint(value: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = value[at]
        number |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return number, at

"""`Message`: one event, identified once, and the times that it has."""

from __future__ import annotations

import hashlib
import math
import struct
import time
import zlib
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from datetime import UTC, datetime
from itertools import repeat
from operator import attrgetter
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import msgspec

from duly.errors import InvalidMessage
from duly.message.limits import MAX_DELAY_S

T_co = TypeVar("T_co", covariant=True)

NO_HEADERS: Mapping[str, str] = MappingProxyType({})

_body = attrgetter("body")


class _Undecoded:
    """Stands where a payload is not decoded yet."""


_UNDECODED = _Undecoded()


class Message(msgspec.Struct, Generic[T_co], frozen=True, gc=False):
    """One message, never rewritten.

    ``time_ms`` is when it was made and ``due_ms`` the earliest time to deliver it (None: at
    once), both in milliseconds since 1970 UTC. ``headers`` are further CloudEvents attributes
    (``traceparent``, ``type``, ...), ``key`` orders it among its like, ``body`` is the encoded
    payload. A msgspec.Struct because making one costs a fifth of a frozen dataclass, and a
    worker makes one per message.
    """

    topic: str
    source: str
    id: str
    body: bytes
    time_ms: int
    key: str | None = None
    headers: Mapping[str, str] = NO_HEADERS
    due_ms: int | None = None
    decoded: Any = _UNDECODED

    @property
    def payload(self) -> T_co:
        """The body as the topic's type; there once a consumer has decoded it."""
        if self.decoded is _UNDECODED:
            raise AttributeError(f"message {self.id} was not decoded; its body is .body")
        return self.decoded  # type: ignore[no-any-return]

    @property
    def time(self) -> datetime:
        """When the message was made, in UTC."""
        return datetime.fromtimestamp(self.time_ms / 1000, UTC)

    @property
    def idempotency_key(self) -> str:
        """One stable name for this event, for effects outside the transaction (an HTTP call)."""
        return f"{self.source}/{self.topic}/{self.id}"

    @property
    def causation(self) -> Mapping[str, str]:
        """Headers for what is published because of this message: ``tx.publish(...,
        headers=message.causation)``. ``causationid`` names this one, so that `duly trace` finds
        what followed; ``correlationid`` and ``traceparent`` are passed on.
        """
        passed = {n: self.headers[n] for n in ("correlationid", "traceparent") if n in self.headers}
        return {"causationid": self.idempotency_key, **passed}

    @property
    def size(self) -> int:
        """Bytes that count against limits and back-pressure: the body's."""
        return len(self.body)

    def attributes(self) -> dict[str, str]:
        """The CloudEvents 1.0 context attributes of this message."""
        own = {
            "specversion": "1.0",
            "id": self.id,
            "source": self.source,
            "type": self.topic,
            "time": self.time.isoformat().replace("+00:00", "Z"),
        }
        if self.key is not None:
            own["partitionkey"] = self.key
        return {**own, **self.headers}

    def body_hash(self) -> bytes:
        """16 bytes that tell two bodies under one id apart. Compared, never used as identity."""
        return hashlib.blake2b(self.body, digest_size=16).digest()


class Alike(tuple[Message[Any], ...]):  # noqa: SLOT001 - a tuple can have none that hold anything
    """Messages of one topic and source, made at one time, without keys, headers or due times: as
    nearly all are that are published many at a time. What goes for all of them, and their columns
    ``ids`` and ``bodies``, need not be asked of each. ``largest``: bytes of the largest body.

    A tuple, so that it stays true.
    """

    topic: str
    source: str
    time_ms: int
    ids: Sequence[str]
    bodies: Sequence[bytes]
    largest: int

    @classmethod
    def made(
        cls,
        topic: str,
        source: str,
        time_ms: int,
        ids: Sequence[str],
        bodies: Sequence[bytes],
        largest: int,
    ) -> Alike:
        """A message for each id and body, which are as many."""
        # Without a line of Python for each.
        each = repeat(topic), repeat(source), ids, bodies, repeat(time_ms)
        alike = cls(map(Message, *each))
        alike.topic, alike.source, alike.time_ms = topic, source, time_ms
        alike.ids, alike.bodies, alike.largest = ids, bodies, largest
        return alike


def topics_of(messages: Sequence[Message[Any]]) -> AbstractSet[str]:
    """The names of their topics."""
    if isinstance(messages, Alike):
        return {messages.topic}
    return {message.topic for message in messages}


def largest_of(messages: Sequence[Message[Any]]) -> int:
    """Bytes of the largest of their bodies."""
    return messages.largest if isinstance(messages, Alike) else max(map(len, map(_body, messages)))


def body_hashes(bodies: Sequence[bytes]) -> Sequence[int]:
    """A number of 64 bits for each body, for the same purpose where many are kept."""
    blake2b = hashlib.blake2b
    joined = b"".join([blake2b(body, digest_size=8).digest() for body in bodies])
    return struct.unpack(f"<{len(bodies)}q", joined)


def partition_of(message: Message[Any], partitions: int) -> int:
    """In which of so many partitions a message belongs: that of its key, or of its id where it
    has none. On every broker that divides a topic by itself, so that other programs can tell too.
    """
    # crc32 because it is the same in every process and version, which hash() is not.
    name = message.id if message.key is None else message.key
    return zlib.crc32(name.encode()) % partitions


def key_lane_of(message: Message[Any], offset: int, lanes: int) -> int:
    """In which of so many lanes of keys of its partition a message belongs: that of its key, or of
    its offset where it has none. It follows from the record alone, for whoever reads it next has to
    find its cursor.
    """
    if message.key is None:
        return offset % lanes
    # Not by what deals keys to partitions: those of one partition could all be of one lane then.
    digest = hashlib.blake2b(message.key.encode(), digest_size=4).digest()
    return int.from_bytes(digest) % lanes


def now_ms() -> int:
    """Milliseconds since 1970 UTC."""
    return time.time_ns() // 1_000_000


def due_ms(topic: str, delay_s: float | None, due: datetime | None = None) -> int | None:
    """The earliest time to deliver a message, from ``delay_s`` or ``due``; None: at once.

    Raises `InvalidMessage` for what names no time within `MAX_DELAY_S`.
    """
    if delay_s is None:
        if due is None:
            return None
        if not isinstance(due, datetime) or due.tzinfo is None:
            raise InvalidMessage(
                f"topic {topic!r}: due={due!r}: give a datetime with a time zone, such as "
                "datetime.now(UTC) + timedelta(hours=1)"
            )
        delay_s = max(0.0, due.timestamp() - time.time())
    elif due is not None:
        raise InvalidMessage(f"topic {topic!r}: give delay_s= or due=, not both")
    if (
        not isinstance(delay_s, (int, float))
        or isinstance(delay_s, bool)
        or not 0 <= delay_s <= MAX_DELAY_S  # false for NaN
    ):
        raise InvalidMessage(
            f"topic {topic!r}: delay_s={delay_s!r}: give seconds from 0 to {MAX_DELAY_S:,}, "
            "which is ten years"
        )
    return now_ms() + math.ceil(delay_s * 1000)

"""What travels: `Message`, the `Topic` it belongs to, and its identity.

A message is identified once, by its producer: ``source`` (the app's name) and ``id`` name one
event, as in CloudEvents 1.0, and everything that drops repeats goes by that pair and never by
content.
"""

from __future__ import annotations

import builtins
import hashlib
import math
import re
import struct
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from math import isfinite
from types import MappingProxyType
from typing import Any, Generic, TypeVar, overload

import msgspec

from duly.codec import ENCODE_FAILURES, Codec, codec_for, not_of_type
from duly.errors import ConfigurationError, InvalidMessage, MessageTooLarge
from duly.guarantees import Guarantee, GuaranteeName, guarantee_of
from duly.identity import ids as generated
from duly.identity import new_ids

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

NO_HEADERS: Mapping[str, str] = MappingProxyType({})

# Limits hold on both sides, before anything is parsed.
MAX_NAME_CHARS = 128
MAX_ID_CHARS = 256
MAX_KEY_CHARS = 256
MAX_HEADERS = 64
MAX_HEADER_BYTES = 16 * 1024
DEFAULT_MAX_BODY_BYTES = 1024 * 1024
MAX_DELAY_S = 3660 * 86400

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_HEADER_NAME = re.compile(r"[a-z0-9]{1,64}")
# CloudEvents attributes that duly fills from the message itself.
_OWN_ATTRIBUTES = frozenset({"specversion", "id", "source", "time", "partitionkey", "data"})


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


def body_hashes(bodies: Sequence[bytes]) -> Sequence[int]:
    """A number of 64 bits for each body, for the same purpose where many are kept."""
    blake2b = hashlib.blake2b
    joined = b"".join([blake2b(body, digest_size=8).digest() for body in bodies])
    return struct.unpack(f"<{len(bodies)}q", joined)


@dataclass(frozen=True, eq=False)  # no slots: Topic[int](...) sets an attribute of its own
class Topic(Generic[T]):
    """A named stream of messages: its Python type and its publishing guarantee.

    A value, usable without an app, so that services can share a package of topics.

    - ``key``: gives a payload's ordering key, where ``publish(key=...)`` does not.
    - ``partitions``: how many keys' streams can be worked side by side by consumers that
      order by key; fixed when the topic first meets its broker. 0: the topic has no order.
    - ``max_body_bytes``: a larger body is refused before it is sent.
    - ``retention_s``: how long a message is kept after every subscription is done with it.
    - ``identity_retention_s``: how long an exactly-once topic remembers ids, to drop repeats.
    """

    name: str
    type: Callable[..., T] | Any
    guarantee: GuaranteeName
    key: Callable[[T], str] | None = None
    partitions: int = 0
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES
    retention_s: float = 0.0
    identity_retention_s: float = 7 * 86400.0
    codec: Codec[T] = field(init=False, repr=False)
    promise: Guarantee = field(init=False, repr=False)

    # Two overloads, because a union (``A | B``) is no class to a type checker: annotate such a
    # topic, ``moves: Topic[A | B] = Topic("moves", A | B, ...)``.
    @overload
    def __init__(
        self,
        name: str,
        type: builtins.type[T],
        *,
        guarantee: GuaranteeName,
        key: Callable[[T], str] | None = None,
        partitions: int = 0,
        max_body_bytes: int = DEFAULT_MAX_BODY_BYTES,
        retention_s: float = 0.0,
        identity_retention_s: float = 7 * 86400.0,
    ) -> None: ...
    @overload
    def __init__(
        self,
        name: str,
        type: Any,
        *,
        guarantee: GuaranteeName,
        key: Callable[[Any], str] | None = None,
        partitions: int = 0,
        max_body_bytes: int = DEFAULT_MAX_BODY_BYTES,
        retention_s: float = 0.0,
        identity_retention_s: float = 7 * 86400.0,
    ) -> None: ...
    def __init__(
        self,
        name: str,
        type: Any,
        *,
        guarantee: GuaranteeName | None = None,
        key: Callable[[T], str] | None = None,
        partitions: int = 0,
        max_body_bytes: int = DEFAULT_MAX_BODY_BYTES,
        retention_s: float = 0.0,
        identity_retention_s: float = 7 * 86400.0,
    ) -> None:
        check_name("topic", name)
        promise = guarantee_of(guarantee, f"topic {name!r}")
        if not is_whole(partitions) or not 0 <= partitions <= 256:
            raise ConfigurationError(f"topic {name!r}: partitions={partitions!r}; give 0 to 256")
        if not is_whole(max_body_bytes) or not 1 <= max_body_bytes <= 512 * 1024 * 1024:
            raise ConfigurationError(
                f"topic {name!r}: max_body_bytes={max_body_bytes!r}; give 1 byte to 512 MiB"
            )
        for kept_s in (retention_s, identity_retention_s):
            if not is_number(kept_s) or kept_s < 0:
                raise ConfigurationError(
                    f"topic {name!r}: a retention of {kept_s!r}; give 0 seconds or more"
                )
        if key is not None and not callable(key):
            raise ConfigurationError(
                f"topic {name!r}: key={key!r}; give a function of the payload, or publish(key=...)"
            )
        put = object.__setattr__
        put(self, "name", name)
        put(self, "type", type)
        put(self, "guarantee", promise.value)
        put(self, "key", key)
        put(self, "partitions", partitions)
        put(self, "max_body_bytes", max_body_bytes)
        put(self, "retention_s", retention_s)
        put(self, "identity_retention_s", identity_retention_s)
        put(self, "codec", codec_for(type))
        put(self, "promise", promise)

    def decode(self, body: bytes) -> T:
        """The payload these bytes hold. Raises `DecodeError` where they are not of the type."""
        return self.codec.decode(body)

    def message(
        self,
        payload: T,
        *,
        source: str,
        id: str | None = None,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        time_ms: int | None = None,
        due_ms: int | None = None,
    ) -> Message[T]:
        """One message of this topic, checked and encoded.

        Raises `InvalidMessage` or `MessageTooLarge`; nothing has been sent then.
        """
        if id is None:
            id = generated.one()
        else:
            check_id(self.name, id)
        checked = NO_HEADERS if not headers else check_headers(self.name, id, headers)
        try:
            body = self.codec.encode_fast(payload)
        except ENCODE_FAILURES as error:
            raise self._not_of_type(payload, id, error) from error
        if len(body) > self.max_body_bytes:
            raise self._too_large(body, id)
        if key is None and self.key is not None:
            key = self._key_of(payload, id)
        if key is not None:
            check_key(self.name, id, key)
        return Message(self.name, source, id, body, time_ms or now_ms(), key, checked, due_ms)

    def messages(
        self,
        payloads: Iterable[T],
        *,
        source: str,
        ids: Sequence[str] | None = None,
        keys: Sequence[str | None] | None = None,
        headers: Mapping[str, str] | None = None,
        due_ms: int | None = None,
    ) -> list[Message[T]]:
        """Many messages at once, in order: what `message` does, at a third of its cost.

        ``ids`` and ``keys`` are one for each payload; ``headers``, ``due_ms`` and the time are
        the same for all. Raises as `message` does, for the first that is wrong.
        """
        payloads = payloads if isinstance(payloads, (list, tuple)) else list(payloads)
        count = len(payloads)
        if ids is None:
            ids = new_ids(count)
        else:
            check_count(self.name, "ids", ids, count)
            for id in ids:
                check_id(self.name, id)
        if count == 0:
            return []
        checked = NO_HEADERS if not headers else check_headers(self.name, ids[0], headers)
        bodies = self._bodies(payloads, ids)
        keys = self._keys(payloads, ids, keys)
        name, time_ms = self.name, now_ms()
        return [
            Message(name, source, id, body, time_ms, key, checked, due_ms)
            for id, body, key in zip(ids, bodies, keys, strict=True)
        ]

    def _keys(
        self, payloads: Sequence[T], ids: Sequence[str], given: Sequence[str | None] | None
    ) -> Sequence[str | None]:
        if given is not None:
            check_count(self.name, "keys", given, len(payloads))
        elif self.key is None:
            return [None] * len(payloads)
        else:
            given = [self._key_of(payload, id) for payload, id in zip(payloads, ids, strict=True)]
        for id, key in zip(ids, given, strict=True):
            if key is not None:
                check_key(self.name, id, key)
        return given

    def _key_of(self, payload: T, id: str) -> str:
        assert self.key is not None
        try:
            return self.key(payload)
        except Exception as error:
            raise InvalidMessage(
                f"topic {self.name!r}, message {id!r}: its key function failed: {error!r}. "
                "Nothing was sent.",
                message_id=id,
            ) from error

    def _bodies(self, payloads: Sequence[T], ids: Sequence[str]) -> list[bytes]:
        encode, bodies = self.codec.encode_fast, list[bytes]()
        append, limit = bodies.append, self.max_body_bytes
        try:
            for payload in payloads:
                body = encode(payload)
                if len(body) > limit:
                    raise self._too_large(body, ids[len(bodies)])
                append(body)
        except ENCODE_FAILURES as error:
            at = len(bodies)
            raise self._not_of_type(payloads[at], ids[at], error) from error
        return bodies

    def _not_of_type(self, payload: T, id: str, error: Exception) -> InvalidMessage:
        return InvalidMessage(
            f"topic {self.name!r}, message {id!r}: {not_of_type(self.codec, payload, error)}. "
            "Nothing was sent.",
            message_id=id,
        )

    def _too_large(self, body: bytes, id: str) -> MessageTooLarge:
        return MessageTooLarge(
            f"topic {self.name!r}, message {id!r}: the body has {len(body):,} bytes, the "
            f"limit is {self.max_body_bytes:,}. Nothing was sent. Publish a reference to "
            "the data instead, or raise Topic(max_body_bytes=...).",
            message_id=id,
        )


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


def is_number(value: Any) -> bool:
    """Whether this is a finite number: nan and inf slip through comparisons."""
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def is_whole(value: Any) -> bool:
    """Whether this is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_name(kind: str, name: Any) -> None:
    """Refuse a topic, app or consumer name that some broker could not carry."""
    if not isinstance(name, str) or len(name) > MAX_NAME_CHARS or _NAME.fullmatch(name) is None:
        raise ConfigurationError(
            f"{kind} name {name!r}: letters, digits, '.', '_' and '-', starting with a letter "
            f"or digit, at most {MAX_NAME_CHARS} of them"
        )


def check_count(topic: str, what: str, given: Sequence[Any], count: int) -> None:
    """Refuse ids or keys that do not pair with the payloads. Raises `ConfigurationError`."""
    if isinstance(given, str) or len(given) != count:
        raise ConfigurationError(
            f"topic {topic!r}: {len(given):,} {what} for {count:,} payloads; give one for each"
        )


def check_id(topic: str, id: Any) -> None:
    """Refuse an id that is no CloudEvents id. Raises `InvalidMessage`."""
    if not isinstance(id, str) or not 0 < len(id) <= MAX_ID_CHARS or not _clean(id):
        raise InvalidMessage(
            f"topic {topic!r}: id {str(id)[:80]!r}: an id is a non-empty str of at most "
            f"{MAX_ID_CHARS} characters without control characters",
            message_id=id if isinstance(id, str) else "",
        )


def check_key(topic: str, id: str, key: Any) -> None:
    """Refuse an ordering key that is too long or no text. Raises `InvalidMessage`."""
    if not isinstance(key, str) or len(key) > MAX_KEY_CHARS or not _clean(key):
        raise InvalidMessage(
            f"topic {topic!r}, message {id!r}: key {str(key)[:80]!r}: a key is a str of at "
            f"most {MAX_KEY_CHARS} characters without control characters",
            message_id=id,
        )


def check_headers(topic: str, id: str, headers: Mapping[str, str]) -> Mapping[str, str]:
    """The headers as a mapping nobody can change. Raises `InvalidMessage`."""
    where = f"topic {topic!r}, message {id!r}"
    if len(headers) > MAX_HEADERS:
        raise InvalidMessage(f"{where}: over {MAX_HEADERS} headers", message_id=id)
    total = 0
    for name, value in headers.items():
        if not isinstance(name, str) or _HEADER_NAME.fullmatch(name) is None:
            raise InvalidMessage(
                f"{where}: header {str(name)[:80]!r}: CloudEvents attribute names are lower-case "
                "letters and digits only (traceparent, datacontenttype, tenant)",
                message_id=id,
            )
        if name in _OWN_ATTRIBUTES:
            raise InvalidMessage(
                f"{where}: header {name!r} is set by duly from the message itself",
                message_id=id,
            )
        if not isinstance(value, str) or not _clean(value):
            raise InvalidMessage(
                f"{where}: header {name!r}: values are str without control characters",
                message_id=id,
            )
        total += len(name) + len(value.encode())
    if total > MAX_HEADER_BYTES:
        raise InvalidMessage(
            f"{where}: {total:,} bytes of headers, the limit is {MAX_HEADER_BYTES:,}",
            message_id=id,
        )
    return MappingProxyType(dict(headers))


def _clean(text: str) -> bool:
    # isprintable() refuses control characters, lone surrogates and line ends at C speed;
    # a plain space is printable.
    return text.isprintable()

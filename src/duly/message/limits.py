"""What may travel: names, ids, keys, headers, sizes. The limits hold on both sides, before
anything is parsed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from types import MappingProxyType
from typing import Any, TypeVar

from duly.errors import ConfigurationError, InvalidMessage

T = TypeVar("T")

MAX_NAME_CHARS = 128
MAX_ID_CHARS = 256
MAX_KEY_CHARS = 256
MAX_HEADERS = 64
MAX_HEADER_BYTES = 16 * 1024
DEFAULT_MAX_BODY_BYTES = 1024 * 1024
MAX_DELAY_S = 3660 * 86400
_YEAR_10000_MS = 253_402_300_800_000

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_HEADER_NAME = re.compile(r"[a-z0-9]{1,64}")
# CloudEvents attributes that duly fills from the message itself.
_OWN_ATTRIBUTES = frozenset({"specversion", "id", "source", "time", "partitionkey", "data"})


def is_number(value: Any) -> bool:
    """Whether this is a finite number: nan and inf slip through comparisons."""
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def is_whole(value: Any) -> bool:
    """Whether this is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_time_ms(value: int) -> bool:
    """Whether this is a time that every broker, database and calendar can hold, in milliseconds
    since 1970. What others publish may say anything.
    """
    return 0 <= value < _YEAR_10000_MS


def check_name(kind: str, name: Any) -> None:
    """Refuse a topic, app or consumer name that some broker could not carry."""
    if not isinstance(name, str) or len(name) > MAX_NAME_CHARS or _NAME.fullmatch(name) is None:
        raise ConfigurationError(
            f"{kind} name {name!r}: letters, digits, '.', '_' and '-', starting with a letter "
            f"or digit, at most {MAX_NAME_CHARS} of them"
        )


def several(topic: str, payloads: Iterable[T]) -> Sequence[T]:
    """Many payloads as a sequence. Raises `ConfigurationError` for what looks like a single one:
    of a str, every letter would be a message.
    """
    if isinstance(payloads, (list, tuple)):
        return payloads
    if isinstance(payloads, (str, bytes, bytearray, Mapping)) or not isinstance(payloads, Iterable):
        raise ConfigurationError(
            f"topic {topic!r}: many payloads are a list or another iterable of them, and this is "
            f"one ({type(payloads).__name__}). Put it into a list, or publish it alone."
        )
    return list(payloads)


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


def check_source(topic: str, id: str, source: Any) -> None:
    """Refuse a source that no database could keep. Raises `InvalidMessage`."""
    if not isinstance(source, str) or not 0 < len(source) <= MAX_ID_CHARS or not _clean(source):
        raise InvalidMessage(
            f"topic {topic!r}, message {id!r}: source {str(source)[:80]!r}: a source is a "
            f"non-empty str of at most {MAX_ID_CHARS} characters without control characters",
            message_id=id,
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

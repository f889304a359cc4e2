"""What publishing a message says on the wire, written here.

The driver takes thirty calls and as many small pieces for it; this takes one or two. What is rare
(names of over 255 bytes, ways through the delays) the driver still writes: `content`.
"""

from __future__ import annotations

from functools import lru_cache
from struct import Struct, pack
from typing import Any

from amqp import spec
from amqp.serialization import dumps

from duly.brokers.rabbitmq.wire import DUE_MS, KEY, PREFIX, SHORT, TIME_MS
from duly.message import Message

_METHOD, _PROPERTIES, _BODY, _END = 1, 2, 3, b"\xce"
# A frame's head, its end, and what the driver reckons with.
_AROUND = 8
_FRAME = Struct(">BHI")
_HEAD = Struct(">BHIHHQ")
_PUBLISH = pack(">HH", *spec.Basic.Publish)
# What there is of the fourteen properties: headers, delivery_mode, message_id, timestamp, type and
# app_id, in this order.
_THERE = 0x2000 | 0x1000 | 0x0080 | 0x0040 | 0x0020 | 0x0008
_KEPT = b"\x02"


def _short(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return bytes((len(data),)) + data


_time_header = _short(TIME_MS)
_START = Struct(f">HI{len(_time_header)}scq")
_NUMBER = Struct(">cq")
_LONG = Struct(">cI")
_TIMESTAMP = Struct(">Q")


class Content:
    """A message as it is sent: its body, and its properties as bytes."""

    __slots__ = ("body", "id", "properties")

    def __init__(self, body: bytes, id: str, properties: bytes) -> None:
        self.body = body
        self.id = id
        self.properties = properties


def written(message: Message[Any]) -> Content | None:
    """What `wire.properties_of` says, as the driver would write it; None where that has to."""
    id, time_ms = message.id.encode(), message.time_ms
    about = _about(message.topic, message.source)
    # The driver writes a number of 32 bits in another way; none is the time of a message.
    if len(id) > SHORT or about is None or time_ms <= 0x7FFFFFFF:
        return None
    more = b""
    if message.headers or message.due_ms is not None or message.key is not None:
        if message.due_ms is not None and message.due_ms <= 0x7FFFFFFF:
            return None
        more = b"".join(_headers(message))
    table = len(_time_header) + 9 + len(more)
    properties = b"".join(
        (
            _START.pack(_THERE, table, _time_header, b"L", time_ms),
            more,
            _KEPT,
            bytes((len(id),)),
            id,
            _TIMESTAMP.pack(time_ms // 1000),
            about,
        )
    )
    return Content(message.body, message.id, properties)


def _headers(message: Message[Any]) -> list[bytes]:
    """Behind the time: name and value of each, all of them texts but one."""
    parts = []
    for name, value in message.headers.items():
        parts += [_short(PREFIX + name), *_text(value)]
    if message.due_ms is not None:
        parts += [_short(DUE_MS), _NUMBER.pack(b"L", message.due_ms)]
    if message.key is not None:
        parts += [_short(KEY), *_text(message.key)]
    return parts


def _text(value: str) -> tuple[bytes, bytes]:
    data = value.encode("utf-8", "surrogatepass")
    return _LONG.pack(b"S", len(data)), data


@lru_cache(maxsize=1024)
def _about(topic: str, source: str) -> bytes | None:
    """The last properties, the same for all that an app publishes to a topic."""
    if len(source.encode()) > SHORT:
        return None
    return _short(topic) + _short(source)


def id_of(message: Any) -> str | None:
    """The id in a `Content`, or in a message of the driver's."""
    if isinstance(message, Content):
        return message.id
    id: str | None = message.properties.get("message_id")
    return id


def frames_of(
    message: Any, channel: int, exchange: str, key: str, mandatory: bool, frame_max: int
) -> bytes:
    """A publish of a `Content`, or of a message of the driver's. Raises where AMQP has no room for
    a part of it.
    """
    own = isinstance(message, Content)
    properties = message.properties if own else message._serialize_properties()
    body = message.body
    size = len(body)
    most = frame_max - _AROUND
    if 12 + len(properties) > most:
        # They have to be in one frame, and the server ends the connection for a larger one.
        raise ValueError(f"its properties have {len(properties):,} bytes, a frame {frame_max:,}")
    parts = [
        _publish(channel, exchange, key, mandatory),
        _HEAD.pack(_PROPERTIES, channel, 12 + len(properties), spec.Basic.CLASS_ID, 0, size),
        properties,
    ]
    if 0 < size <= most:
        parts += [_END, _FRAME.pack(_BODY, channel, size), body]
    else:
        for at in range(0, size, most):
            piece = body[at : at + most]
            parts += [_END, _FRAME.pack(_BODY, channel, len(piece)), piece]
    parts.append(_END)
    return b"".join(parts)


@lru_cache(maxsize=1024)
def _publish(channel: int, exchange: str, key: str, mandatory: bool) -> bytes:
    """The first frame: where to."""
    said: bytes = _PUBLISH + dumps("Bssbb", (0, exchange, key, mandatory, False))
    return _FRAME.pack(_METHOD, channel, len(said)) + said + _END

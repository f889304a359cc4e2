"""The outbox: messages that a transaction publishes to a broker elsewhere.

They become true with the transaction; a relay brings them to the broker, in order, and drops
them here once the broker has confirmed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import msgspec

from duly.broker import Outcome, Published
from duly.errors import PublishFailed
from duly.message import NO_HEADERS, Message
from duly.sql.steps import Ask, Many, Steps

_encode_headers = msgspec.json.Encoder().encode
_decode_headers = msgspec.json.Decoder(dict[str, str]).decode


def put(topics: Collection[str], messages: Sequence[Message[Any]]) -> Steps[list[Outcome]]:
    """Store messages of declared ``topics``; one outcome each, in order."""
    declared = [message for message in messages if message.topic in topics]
    yield Many("outbox_put", [_row(message) for message in declared])
    if len(declared) == len(messages):
        return [Published(message.id) for message in messages]
    return [
        Published(message.id) if message.topic in topics else _undeclared(message)
        for message in messages
    ]


def first(limit: int) -> Steps[list[tuple[int, Message[Any]]]]:
    """The oldest unsent messages with their places in the outbox."""
    rows = yield Ask("outbox_first", (limit,))
    return [(row[0], _message(*row[1:])) for row in rows]


def sent(places: Iterable[int]) -> Steps[None]:
    """Drop what the broker has confirmed."""
    yield Many("outbox_sent", [(place,) for place in places])


def _row(m: Message[Any]) -> tuple[object, ...]:
    headers = _encode_headers(dict(m.headers)).decode() if m.headers else None
    return m.topic, m.source, m.id, m.key, m.time_ms, headers, m.due_ms, m.body


def _message(
    topic: str,
    source: str,
    id: str,
    key: str | None,
    time_ms: int,
    headers: str | None,
    due_ms: int | None,
    body: bytes,
) -> Message[Any]:
    parsed = _decode_headers(headers) if headers else NO_HEADERS
    return Message(topic, source, id, body, time_ms, key, parsed, due_ms)


def _undeclared(message: Message[Any]) -> PublishFailed:
    return PublishFailed(
        f"message {message.id!r}: topic {message.topic!r} is not declared here. Declare it "
        "before publishing to it.",
        message_id=message.id,
    )

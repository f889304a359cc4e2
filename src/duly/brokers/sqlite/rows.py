"""Rows of the log as deliveries; what is damaged is told apart and never in the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from duly.broker import Delivery, Receipt, Unread
from duly.guarantees import Dead, Settlement
from duly.message import NO_HEADERS, Message
from duly.sql import log

_decode_headers = msgspec.json.Decoder(dict[str, str]).decode


def deliveries_of(
    claimed: log.Claimed, topics: Mapping[int, str], look_up: Callable[[Receipt], Message[Any]]
) -> tuple[Sequence[Delivery], Sequence[Settlement]]:
    """The deliveries of a claim, and dead letters for the rows that are none."""
    deliveries: list[Delivery] = []
    damaged: list[Settlement] = []
    for part in claimed.parts:
        topic = topics[part.stream]
        try:
            if len(part.rows[0]) == 2:
                some = _bodies(part, claimed.token, look_up)
            else:
                some = _at_once(part, claimed.token, topic)
        except (msgspec.MsgspecError, TypeError, ValueError):
            some, dead = _one_by_one(part, claimed.token, topic)
            damaged += dead
        deliveries = deliveries + some if deliveries else some
    return deliveries, damaged


def _bodies(
    part: log.Part, token: int, look_up: Callable[[Receipt], Message[Any]]
) -> list[Delivery]:
    _, rows, attempt, alone, repeated = part
    return [
        Delivery(Unread(body, look_up), (token, position), attempt, repeated, alone)
        for position, body in rows
    ]


def message_of(topic: str, row: Sequence[object]) -> Message[object]:
    """A whole row as a message. Raises TypeError or ValueError where it is damaged."""
    return _message(topic, row[1:])


def _at_once(part: log.Part, token: int, topic: str) -> list[Delivery]:
    """The hot path: everything a row costs is here."""
    _, rows, attempt, alone, repeated = part
    if not isinstance(rows[0][1], str):
        raise TypeError("rows fetched raw")
    return [
        Delivery(
            Message(
                topic, source, id, body, time_ms, key,
                NO_HEADERS if headers is None else _decode_headers(headers),
                due_ms,
            ),
            (token, position),
            attempt,
            repeated,
            alone,
        )
        for position, source, id, time_ms, key, headers, due_ms, body in rows
    ]  # fmt: skip


def _one_by_one(part: log.Part, token: int, topic: str) -> tuple[list[Delivery], list[Settlement]]:
    good: list[Delivery] = []
    damaged: list[Settlement] = []
    for position, *columns in part.rows:
        receipt = (token, position)
        try:
            message = _message(topic, columns)
        except (msgspec.MsgspecError, TypeError, ValueError) as error:
            damaged.append(Dead(receipt, f"the stored message is damaged: {error}"))
        else:
            good.append(Delivery(message, receipt, part.attempt, part.repeated, part.alone))
    return good, damaged


def _message(topic: str, columns: Sequence[object]) -> Message[object]:
    source, id, time_ms, key, headers, due_ms, body = columns
    if not isinstance(body, bytes):
        raise TypeError("its body is no blob")
    if not isinstance(time_ms, int) or not isinstance(due_ms, int | None):
        raise TypeError("its times are no integers")
    return Message(
        topic,
        _text("source", source),
        _text("id", id),
        body,
        time_ms,
        None if key is None else _text("key", key),
        NO_HEADERS if headers is None else _decode_headers(_text("headers", headers)),
        due_ms,
    )


def _text(column: str, value: object) -> str:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"its {column} is no text ({error})") from None
    if not isinstance(value, str):
        raise TypeError(f"its {column} is no text")
    return value

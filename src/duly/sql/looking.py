"""Looking inside: states, dead letters and incidents, from the file alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

import msgspec

from duly.inspection import DeadLetter, Incident, Selection, SubscriptionState
from duly.message import NO_HEADERS, Message
from duly.sql.steps import Ask, Steps

_decode_headers = msgspec.json.Decoder(dict[str, str]).decode


def subscriptions() -> Steps[list[SubscriptionState]]:
    """One state for each topic of each subscription."""
    return [SubscriptionState(*row) for row in (yield Ask("subscription_states"))]


def dead_letters(which: Selection, limit: int) -> Steps[list[DeadLetter]]:
    """The latest dead letters of those that are meant."""
    rows = yield Ask("dead_letters", (*astuple(which), limit))
    return [_dead_letter(*row) for row in rows]


def incidents(subscription: str | None, kind: str | None, limit: int) -> Steps[list[Incident]]:
    """The latest incidents."""
    return [Incident(*row) for row in (yield Ask("incidents", (subscription, kind, limit)))]


def incident_counts() -> Steps[Mapping[tuple[str, str], int]]:
    """How many messages met which kind of incident, by (subscription or topic, kind)."""
    return {(name, kind): count for name, kind, count in (yield Ask("incident_counts"))}


def _dead_letter(subscription: str, *columns: Any) -> DeadLetter:
    topic, source, id, key, time_ms, headers, due_ms, body, *end = columns
    # It may be here because it is damaged: whatever can be shown of it is.
    try:
        parsed = NO_HEADERS if headers is None else _decode_headers(headers)
    except msgspec.MsgspecError:
        parsed = NO_HEADERS
    message: Message[Any] = Message(
        topic,
        _text(source),
        _text(id),
        body if isinstance(body, bytes) else _text(body).encode(),
        time_ms,
        None if key is None else _text(key),
        parsed,
        due_ms,
    )
    return DeadLetter(subscription, message, *end)


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def holders() -> Steps[list[tuple[str, str, str, int]]]:
    """Who holds claims: worker, subscription, topic, messages."""
    rows: list[tuple[str, str, str, int]] = yield Ask("all_holders")
    return rows


def oldest() -> Steps[Mapping[tuple[str, str], int]]:
    """When the oldest message was made that (subscription, topic) has before it."""
    found: dict[tuple[str, str], int] = {}
    for name, topic, time_ms in (yield Ask("oldest")):
        if time_ms < 1 << 62:
            found[name, topic] = min(time_ms, found.get((name, topic), time_ms))
    return found

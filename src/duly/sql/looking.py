"""Looking inside: states, dead letters and incidents, from the file alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any

import msgspec

from duly.inspection import DeadLetter, Incident, Selection, SubscriptionState
from duly.inspection.health import Finding
from duly.message import NO_HEADERS, Message
from duly.sql.steps import Ask, Steps
from duly.sql.taking import text_of

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
    topic, *message, error, attempts, dead_ms, number, replays = columns
    return DeadLetter(
        subscription, readable(topic, message), error, attempts, dead_ms, number, replays
    )


def readable(topic: str, columns: Sequence[Any]) -> Message[Any]:
    """A message as far as its columns (source, id, key, time_ms, headers, due_ms, body) can be
    read: it may be looked at because it is damaged.
    """
    source, id, key, time_ms, headers, due_ms, body = columns
    try:
        parsed = NO_HEADERS if headers is None else _decode_headers(headers)
    except msgspec.MsgspecError:
        parsed = NO_HEADERS
    return Message(
        topic,
        text_of(source),
        text_of(id),
        body if isinstance(body, bytes) else text_of(body).encode(),
        time_ms,
        None if key is None else text_of(key),
        parsed,
        due_ms,
    )


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


def published() -> Steps[Mapping[str, int]]:
    """How many messages each topic ever stored."""
    return dict((yield Ask("published_counts")))


# Clocks of machines that are kept in step differ by less.
_AHEAD_MS = 60_000


def made_ahead(now_ms: int) -> Steps[list[Finding]]:
    """Whether messages were made at a time that has not come."""
    for (made_ms,) in (yield Ask("latest_made")):
        if made_ms is not None and made_ms > now_ms + _AHEAD_MS:
            said = f"messages were made {(made_ms - now_ms) / 1000:,.0f} s from now"
            remedy = "Set this clock, or that of who published them: ages are wrong."
            return [Finding("warning", "clock", said, remedy)]
    return []

"""The outbox: messages that a transaction publishes to a broker elsewhere.

They become true with the transaction; a relay brings them to the broker, in order, and drops
them here once the broker has confirmed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import astuple
from typing import Any, NamedTuple

import msgspec

from duly.broker import Outcome, Published
from duly.errors import PublishFailed
from duly.inspection.erasing import Whose
from duly.message import NO_HEADERS, Message
from duly.sql.ranges import within_bytes
from duly.sql.steps import Ask, Each, Many, Steps
from duly.store import Backlog, GivenUp, Outgoing, Refusal

# Rows of one transaction that overwrites what it deletes.
_ERASED_AT_ONCE = 100
_ERASED_BYTES_AT_ONCE = 4 * 1024 * 1024
_ALL = -1
# In the order in which messages move.
_PLACES = ("outbox", "log_parked", "log_dead", "letters")

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


def unsent(limit: int, max_bytes: int, now_ms: int) -> Steps[list[Outgoing]]:
    """The oldest messages to send now, at least one whatever its size."""
    rows = yield Ask("outbox_unsent", (now_ms, limit, max_bytes))
    return [Outgoing(row[0], _message(*row[2:]), row[1]) for row in rows]


def left(positions: Sequence[int]) -> Steps[list[Outgoing]]:
    """Those of these positions that are there still."""
    rows = yield Each("outbox_left", [(position,) for position in positions])
    found = [row for row in rows if row is not None]
    return [Outgoing(row[0], _message(*row[2:]), row[1]) for row in found]


def next_due(now_ms: int) -> Steps[int | None]:
    """When the next refused message may be tried again; one that might be now, and is not given out
    since it follows another of its key, waits for that one.
    """
    [(due_ms,)] = yield Ask("outbox_next_due", (now_ms,))
    return due_ms  # type: ignore[no-any-return]


def confirmed(positions: Sequence[int]) -> Steps[None]:
    """Drop what the broker has confirmed, with what is known of earlier refusals."""
    places = [(position,) for position in positions]
    yield Many("outbox_sent", places)
    yield Many("outbox_sent_refused", places)


def refused(refusals: Sequence[Refusal], now_ms: int) -> Steps[None]:
    """Note what the broker refused, and when to try again."""
    rows = [
        (
            refusal.position,
            int(refusal.charged),
            refusal.error,
            None if refusal.retry_in_s is None else now_ms + int(refusal.retry_in_s * 1000),
        )
        for refusal in refusals
    ]
    yield Many("outbox_refused", rows)


def given_up(limit: int) -> Steps[list[GivenUp]]:
    """The oldest messages that will not be tried again by themselves."""
    rows = yield Ask("outbox_given_up", (limit,))
    return [GivenUp(row[0], _message(*row[3:]), row[1], row[2]) for row in rows]


def try_again(positions: Sequence[int]) -> Steps[None]:
    """Forget that these were given up on."""
    yield Many("outbox_try_again", [(position,) for position in positions])


def backlog() -> Steps[Backlog]:
    """How much there is."""
    [(unsent, given_up, oldest_ms)] = yield Ask("outbox_backlog")
    return Backlog(unsent, given_up, oldest_ms)


class Holder(NamedTuple):
    """The relay that works the outbox, as it was recorded."""

    relay: str
    worker: str
    boot_id: str
    until_boot_ms: int


def holder() -> Steps[Holder | None]:
    """Who works the outbox."""
    rows = yield Ask("outbox_holder")
    return Holder(*rows[0]) if rows else None


def hold(new: Holder, instead_of: str | None) -> Steps[bool]:
    """Record a relay, unless another than ``instead_of`` has come before it."""
    rows = yield Ask("outbox_hold", (*new, instead_of))
    return bool(rows)


def let_go(relay: str) -> Steps[None]:
    """Nobody works the outbox, if it was this relay."""
    yield Ask("outbox_let_go", (relay,))


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


def holdings(whose: Whose) -> Steps[int]:
    """How many of a person's messages are here: on their way, parked, given up, or dead."""
    total = 0
    for place in _PLACES:
        total += len((yield Ask(f"{place}_of_person", (*astuple(whose), _ALL))))
    return total


def erase(whose: Whose) -> Steps[int]:
    """Remove some of them; returns how many, 0 when none is left."""
    some = (*astuple(whose), _ERASED_AT_ONCE)
    yield Ask("overwrite_deleted")
    for place in _PLACES:
        if rows := _portion((yield Ask(f"{place}_of_person", some))):
            if place == "outbox":
                yield Many("outbox_sent_refused", rows)
            yield Many(f"{place}_erase", rows)
            return len(rows)
    return 0


def _portion(sizes: Sequence[tuple[int, int]]) -> list[tuple[int]]:
    return [(number,) for number in within_bytes(sizes, _ERASED_BYTES_AT_ONCE)]

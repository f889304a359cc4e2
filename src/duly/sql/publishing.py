"""Publishing into the log: positions, identities, and what drops a repeat."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import repeat
from operator import attrgetter

import msgspec

from duly.broker import Outcome, Published, RepeatDropped
from duly.errors import IdentityConflict, PublishFailed
from duly.message import Alike, Message, largest_of, partition_of, topics_of
from duly.sql.ranges import at
from duly.sql.steps import Ask, Many, Steps

Messages = Sequence[Message[object]]

_encode_headers = msgspec.json.Encoder().encode
# By `map` with these a column of a batch takes half as long as by a comprehension.
_source, _id = attrgetter("source"), attrgetter("id")
_time_ms, _body = attrgetter("time_ms"), attrgetter("body")
_due_ms = attrgetter("due_ms")


@dataclass(frozen=True, slots=True)
class TopicRecord:
    """What the database knows of a declared topic. One stream a partition, else one."""

    topic_no: int
    name: str
    exactly_once: bool
    streams: tuple[int, ...]


Catalog = Mapping[str, TopicRecord]
"""The declared topics by name."""


def publish(catalog: Catalog, messages: Messages, now_ms: int) -> Steps[list[Outcome]]:
    """Store messages of declared topics; one outcome each, in order.

    Part of the transaction that runs it: what it stored is seen when that commits. ``now_ms``
    starts the retention of identities.
    """
    return (yield from each_topic(catalog, messages, now_ms, _publish_topic))


PublishTopic = Callable[[TopicRecord, Messages, int], Steps[list[Outcome]]]


def each_topic(
    catalog: Catalog, messages: Messages, now_ms: int, publish_topic: PublishTopic
) -> Steps[list[Outcome]]:
    """Publish topic by topic, always in the same order; the outcomes in the order given."""
    names = topics_of(messages)
    if len(names) == 1:
        [name] = names
        return (yield from _of_topic(catalog, name, messages, now_ms, publish_topic))
    outcomes: dict[int, Outcome] = {}
    for name in sorted(names):
        indices = [i for i, message in enumerate(messages) if message.topic == name]
        mine = [messages[i] for i in indices]
        some = yield from _of_topic(catalog, name, mine, now_ms, publish_topic)
        outcomes.update(zip(indices, some, strict=True))
    return [outcomes[i] for i in range(len(messages))]


def _of_topic(
    catalog: Catalog, name: str, messages: Messages, now_ms: int, publish_topic: PublishTopic
) -> Steps[list[Outcome]]:
    topic = catalog.get(name)
    if topic is None:
        return [_undeclared(message) for message in messages]
    return (yield from publish_topic(topic, messages, now_ms))


def _publish_topic(topic: TopicRecord, messages: Messages, now_ms: int) -> Steps[list[Outcome]]:
    if topic.exactly_once:
        return (yield from _publish_once(topic, messages, now_ms))
    yield from _append(messages, (yield from _take_positions(topic, messages)))
    return [*map(Published, _ids(messages))]


def _ids(messages: Messages) -> Iterable[str]:
    return messages.ids if isinstance(messages, Alike) else map(_id, messages)


def _undeclared(message: Message[object]) -> PublishFailed:
    return PublishFailed(
        f"message {message.id!r}: topic {message.topic!r} is not declared here. Declare it "
        "before publishing to it.",
        message_id=message.id,
    )


def _take_positions(topic: TopicRecord, messages: Messages) -> Steps[Sequence[int]]:
    """A position for each message, ascending within each stream."""
    streams = topic.streams
    if len(streams) == 1:
        return (yield from _next_positions(streams[0], messages))
    chosen = [stream_for(topic, message) for message in messages]
    free = {}
    for stream in sorted(set(chosen)):
        mine = [m for m, of in zip(messages, chosen, strict=True) if of == stream]
        free[stream] = iter((yield from _next_positions(stream, mine)))
    return [next(free[stream]) for stream in chosen]


def stream_for(topic: TopicRecord, message: Message[object]) -> int:
    """The stream of the message's key, or of its id where it has none."""
    return topic.streams[partition_of(message, len(topic.streams))]


def _next_positions(stream: int, messages: Messages) -> Steps[range]:
    count = len(messages)
    latest_due_ms = 0
    if not isinstance(messages, Alike):
        latest_due_ms = max(filter(None, map(_due_ms, messages)), default=0)
    told = (count, largest_of(messages), latest_due_ms, stream)
    [(end,)] = yield Ask("take_positions", told)
    return range(at(stream, end - count), at(stream, end))


def _append(messages: Messages, positions: Sequence[int]) -> Steps[None]:
    if isinstance(messages, Alike):
        alike = repeat(messages.source), messages.ids, repeat(messages.time_ms), messages.bodies
        yield Many("append_plain", list(zip(positions, *alike, strict=False)))
        return
    more = [m for m in messages if m.key is not None or m.due_ms is not None or m.headers]
    if not more:
        # Most have none of these, and each column that is bound costs a tenth of the whole.
        columns = [map(of, messages) for of in (_source, _id, _time_ms, _body)]
        yield Many("append_plain", list(zip(positions, *columns, strict=True)))
        return
    rows = [
        (
            position,
            m.source,
            m.id,
            m.key,
            m.time_ms,
            headers_text(m),
            m.due_ms,
            m.body,
        )
        for position, m in zip(positions, messages, strict=True)
    ]
    yield Many("append", rows)


def headers_text(message: Message[object]) -> str | None:
    """Not the bytes: the column is text, for people who look into the database."""
    return _encode_headers(dict(message.headers)).decode() if message.headers else None


def _publish_once(topic: TopicRecord, messages: Messages, now_ms: int) -> Steps[list[Outcome]]:
    """Store those whose identity is new. One statement tells when all are, as they mostly are."""
    [(erased,)] = yield Ask("any_erased", (topic.topic_no,))
    if erased and (yield from _any_erased(topic, messages)):
        return (yield from _publish_new(topic, messages, now_ms))
    positions = yield from _take_positions(topic, messages)
    topic_no = topic.topic_no
    mine = [
        (m.source, m.id, m.body_hash(), position)
        for position, m in zip(positions, messages, strict=True)
    ]
    remembered = yield Many("remember", mine, (topic_no, now_ms))
    if remembered == len(mine):
        yield from _append(messages, positions)
        return [*map(Published, _ids(messages))]
    # Nobody else can have taken positions since: give these back, so that the log has no gaps.
    yield Many("forget", [(topic_no, source, id, position) for source, id, _, position in mine])
    for stream in {position >> 40 for position in positions}:
        yield Ask("take_positions", (-sum(p >> 40 == stream for p in positions), 0, 0, stream))
    return (yield from _publish_new(topic, messages, now_ms))


def _any_erased(topic: TopicRecord, messages: Messages) -> Steps[bool]:
    for m in messages:
        hashed = identity_hash(topic.name, m.source, m.id)
        if (yield Ask("is_erased", (topic.topic_no, hashed))):
            return True
    return False


def _publish_new(topic: TopicRecord, messages: Messages, now_ms: int) -> Steps[list[Outcome]]:
    """Look at each identity, and store the new ones."""
    outcomes: list[Outcome] = []
    new: list[Message[object]] = []
    hashes: dict[tuple[str, str], bytes] = {}
    for message in messages:
        identity = (message.source, message.id)
        known = hashes.get(identity)
        if known is None:
            rows = yield Ask("known_hash", (topic.topic_no, *identity))
            known = rows[0][0] if rows else None
        if known is None:
            hashed = identity_hash(topic.name, *identity)
            if (yield Ask("is_erased", (topic.topic_no, hashed))):
                outcomes.append(RepeatDropped(message.id))
                continue
        body_hash = message.body_hash()
        if known is None:
            new.append(message)
            outcomes.append(Published(message.id))
        elif known == body_hash:
            outcomes.append(RepeatDropped(message.id))
        else:
            outcomes.append(conflict(message))
        hashes[identity] = known or body_hash
    if new:
        positions = yield from _take_positions(topic, new)
        yield Many(
            "remember",
            [
                (m.source, m.id, m.body_hash(), position)
                for position, m in zip(positions, new, strict=True)
            ],
            (topic.topic_no, now_ms),
        )
        yield from _append(new, positions)
    yield from note_repeats(topic, messages, outcomes, now_ms)
    return outcomes


def identity_hash(topic: str, source: str, id: str) -> bytes:
    """What is left of an identity whose message was erased. PostgreSQL makes the same of it."""
    return sha256(f"{topic}\0{source}\0{id}".encode()).digest()


def conflict(message: Message[object]) -> IdentityConflict:
    """The outcome of a message whose id was taken by another body."""
    return IdentityConflict(
        f"topic {message.topic!r}, message {message.id!r} of {message.source!r}: this id was "
        "published before with another body. One id names one event: give the new event an id "
        "of its own.",
        message_id=message.id,
    )


def note_repeats(
    topic: TopicRecord, messages: Messages, outcomes: Sequence[Outcome], now_ms: int
) -> Steps[None]:
    """One incident a kind and batch: a second run of an import repeats every message."""
    for kind, outcome_type, detail in (
        ("repeat-dropped", RepeatDropped, "published before with the same body"),
        ("identity-conflict", IdentityConflict, "published before with another body"),
    ):
        at_fault = [
            m
            for m, outcome in zip(messages, outcomes, strict=True)
            if isinstance(outcome, outcome_type)
        ]
        if at_fault:
            first = at_fault[0]
            yield Ask(
                "note",
                (
                    now_ms,
                    kind,
                    topic.name,
                    None,
                    first.source,
                    first.id,
                    None,
                    len(at_fault),
                    None,
                    detail,
                ),
            )

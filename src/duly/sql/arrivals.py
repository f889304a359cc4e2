"""Publishing into PostgreSQL's log, in any transaction: duly's own, or one of the application's.

A statement for each topic and some thousand messages, and no lock that a publisher of other
identities would wait for: places come from a sequence. Who reads the log finds the messages
once their transaction is committed, by a tick (`ticks.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from duly.broker import Outcome, Published, RepeatDropped
from duly.message import Message
from duly.sql.publishing import (
    Catalog,
    Messages,
    TopicRecord,
    conflict,
    each_topic,
    headers_text,
    note_repeats,
    stream_for,
)
from duly.sql.steps import Each, Many, Steps

# So much goes into one statement. 65,536 messages have a block of places of their own (`<< 16`
# in the statement); the server takes a gigabyte, and holds all of it in memory.
MOST_MESSAGES = 2_000
_BYTES = 16 * 1024 * 1024

Chosen = Sequence[tuple[int, int]]
"""A stream, and which of the messages goes there; in the order of the streams."""


def publish(catalog: Catalog, messages: Messages, now_ms: int) -> Steps[list[Outcome]]:
    """Store messages of declared topics; one outcome each, in order. As `publishing.publish`."""
    return (yield from each_topic(catalog, messages, now_ms, _publish_topic))


def are_one_statement(messages: Messages) -> bool:
    """Whether `publish` stores them by its first statement, save for what it tells of repeats."""
    return (
        len(messages) <= MOST_MESSAGES
        and sum([len(message.body) for message in messages]) <= _BYTES
        and len({message.topic for message in messages}) == 1
    )


def _publish_topic(topic: TopicRecord, messages: Messages, now_ms: int) -> Steps[list[Outcome]]:
    outcomes: list[Outcome] = []
    for some in _portions(messages):
        if topic.exactly_once:
            outcomes += yield from _publish_once(topic, some, now_ms)
        else:
            rows = [_row(stream, some[index]) for stream, index in _chosen(topic, some)]
            yield Many("publish", rows)
            outcomes += [Published(message.id) for message in some]
    if topic.exactly_once:
        yield from note_repeats(topic, messages, outcomes, now_ms)
    return outcomes


def _portions(messages: Messages) -> Iterator[Messages]:
    """At least one message each, whatever its size."""
    start, size = 0, 0
    for at, message in enumerate(messages):
        if at > start and (at - start >= MOST_MESSAGES or size + len(message.body) > _BYTES):
            yield messages[start:at]
            start, size = at, 0
        size += len(message.body)
    yield messages[start:] if start else messages


def _chosen(topic: TopicRecord, messages: Messages) -> Chosen:
    """By streams; within each as given, for so they are delivered."""
    if len(topic.streams) == 1:
        return [(topic.streams[0], index) for index in range(len(messages))]
    return sorted((stream_for(topic, message), index) for index, message in enumerate(messages))


def _row(stream: int, m: Message[object]) -> tuple[Any, ...]:
    return stream, m.source, m.id, m.key, m.time_ms, headers_text(m), m.due_ms, m.body


def _publish_once(topic: TopicRecord, messages: Messages, now_ms: int) -> Steps[list[Outcome]]:
    """Store those whose identity is new. One statement tells when all are, as they mostly are."""
    chosen = _chosen(topic, messages)
    rows = [(*_row(stream, messages[at]), messages[at].body_hash()) for stream, at in chosen]
    stored = yield Many("publish_once", rows, (topic.topic_no, now_ms))
    if stored == len(messages):
        return [Published(message.id) for message in messages]
    return (yield from _told_apart(topic, messages, [index for _, index in chosen]))


def _told_apart(
    topic: TopicRecord, messages: Messages, sent: Sequence[int]
) -> Steps[list[Outcome]]:
    """The outcomes where some were not stored: repeats, and ids taken by another body.

    ``sent``: which of the messages was sent first, which next, and so on.
    """
    names = [(topic.topic_no, messages[index].source, messages[index].id) for index in sent]
    known = yield Each("known_identity", names)
    found: dict[int, Outcome] = {}
    for number, (index, identity) in enumerate(zip(sent, known, strict=True)):
        message = messages[index]
        # One that is gone again, by retention in this moment, was there when it mattered.
        hash, came_with = identity or (message.body_hash(), None)
        if came_with == number:
            found[index] = Published(message.id)
        elif hash == message.body_hash():
            found[index] = RepeatDropped(message.id)
        else:
            found[index] = conflict(message)
    return [found[index] for index in range(len(messages))]

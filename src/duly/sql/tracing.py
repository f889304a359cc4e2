"""The life of one message, from what is stored; and following a topic by its positions."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from duly.broker import Start
from duly.errors import ConfigurationError
from duly.inspection import Incident
from duly.inspection.tracing import Followed, Logged, Standing, State, Trace
from duly.sql.looking import readable
from duly.sql.ranges import at, stream_of
from duly.sql.steps import Ask, Steps


def trace(id: str, source: str, topic: str | None) -> Steps[list[Trace]]:
    """What is kept of the messages with this identity, by topic."""
    found: dict[str, _Found] = {}
    for name, position, stored_ms in (yield Ask("trace_identities", (source, id))):
        found[name] = _Found(position, stored_ms=stored_ms)
    for position, name, *columns in (yield Ask("trace_messages", (source, id))):
        known = found.setdefault(name, _Found(position))
        # Where repeats are not dropped there may be several; the latest is told about.
        known.position, known.message = position, readable(name, columns)
    for position, name, *columns in (yield Ask("trace_dead", (source, id))):
        known = found.setdefault(name, _Found(position))
        if known.message is None:
            known.message = readable(name, columns)
    for name, position in (yield Ask("trace_mentioned", (source, id))):
        found.setdefault(name, _Found(position))
    traces: list[Trace] = []
    for name in sorted(found if topic is None else found.keys() & {topic}):
        one = yield from _trace(name, source, id, found[name])
        traces.append(one)
    return traces


class _Found:
    """Where a message stands, and what is left of it."""

    def __init__(self, position: int | None, stored_ms: int | None = None) -> None:
        self.position = position
        self.stored_ms = stored_ms
        self.message: Any = None


def _trace(topic: str, source: str, id: str, found: _Found) -> Steps[Trace]:
    position = found.position
    rows = yield Ask("trace_incidents", (topic, source, id, position))
    incidents = [Incident(*row) for row in rows]
    standings: list[Standing] = []
    if position is not None:
        rows = yield Ask("trace_standings", (position, stream_of(position)))
        standings = [_standing(position, *row) for row in rows]
    return Trace(topic, source, id, position, found.message, found.stored_ms, standings, incidents)


def _standing(position: int, name: str, next_seq: int, *columns: Any) -> Standing:
    claimed, parked, dead = columns[:4], columns[4:9], columns[9:]
    claim_id, worker, attempt, replays = claimed
    if claim_id is not None:
        state: State = "waiting" if worker is None else "claimed"
        return Standing(name, state, attempt, worker, replays=replays)
    is_parked, due_ms, attempt, error, replays = parked
    if is_parked is not None:
        state = "behind" if due_ms is None else "parked"
        return Standing(name, state, attempt, at_ms=due_ms, error=error, replays=replays)
    dead_ms, attempts, error, replays = dead
    if dead_ms is not None:
        return Standing(name, "dead", attempts, at_ms=dead_ms, error=error, replays=replays)
    if position >= at(stream_of(position), next_seq):
        return Standing(name, "waiting", 1)
    return Standing(name, "done")


def caused_by(cause: str, limit: int) -> Steps[list[Logged]]:
    """The kept messages that name this as what caused them."""
    rows = yield Ask("caused_by", (cause, limit))
    return [Logged(position, readable(name, columns)) for position, name, *columns in rows]


# --- following

Mark = Mapping[int, int]
"""For each stream of the topic the position to go on from."""


def mark(topic: str, start: Start) -> Steps[Mark]:
    """Where to begin: the oldest kept, the end, or the first made since a time."""
    streams = yield Ask("streams_by_topic", (topic,))
    if not streams:
        there = ", ".join(sorted(name for (name,) in (yield Ask("topic_names"))))
        raise ConfigurationError(f"there is no topic {topic!r} here; there are: {there or 'none'}")
    begins: dict[int, int] = {}
    for stream, next_seq in streams:
        first, end = at(stream, 0), at(stream, next_seq)
        begins[stream] = end
        if start != "latest":
            since_ms = int(start.timestamp() * 1000) if isinstance(start, datetime) else -(1 << 62)
            rows = yield Ask("first_position", (first, end - 1, since_ms))
            begins[stream] = rows[0][0] if rows else end
    return begins


def follow(topic: str, mark: Mark, limit: int) -> Steps[Followed]:
    """What was published since; positions without a message were gone before."""
    messages: list[Logged] = []
    missed = 0
    after = dict(mark)
    for stream, next_seq in (yield Ask("streams_by_topic", (topic,))):
        begin, end = after.get(stream, at(stream, 1)), at(stream, next_seq)
        rows = yield Ask("follow", (begin, end - 1, limit))
        some = [Logged(position, readable(topic, columns)) for position, *columns in rows]
        after[stream] = some[-1].position + 1 if len(some) == limit else end
        missed += after[stream] - begin - len(some)
        messages += some
    messages.sort(key=lambda logged: (logged.message.time_ms, logged.position))
    return Followed(messages, after, missed)

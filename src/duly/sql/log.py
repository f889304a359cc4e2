"""The log of the SQL brokers: declaring, subscribing, and everything that happens to messages.

All of it as `Steps`: statements by name, run by whatever holds the connection. `publish`,
`fence` and `settle` run in a broker's own transaction or in that of a handler.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from duly.broker import Start, SubscribeOptions
from duly.errors import ConfigurationError
from duly.guarantees import Guarantee
from duly.message import Topic
from duly.sql.claims import Ahead, Claimed, claim, claim_accused, is_ready
from duly.sql.publishing import Catalog, TopicRecord, publish
from duly.sql.ranges import at, runs, stream_of
from duly.sql.retention import Broom, sweep
from duly.sql.settling import (
    STEP_MS,
    LogReceipt,
    accused_waits,
    check_stamp,
    extend,
    fence,
    follow_clock,
    holds_accused,
    is_followed,
    release_lanes,
    settle,
    take_over,
)
from duly.sql.steps import Ask, Many, Steps
from duly.sql.taking import Lane, Part, Row, fetch, fetch_ids

__all__ = [
    "STEP_MS",
    "Ahead",
    "Broom",
    "Catalog",
    "Claimed",
    "Lane",
    "LogReceipt",
    "Part",
    "Row",
    "TopicRecord",
    "accused_waits",
    "check_stamp",
    "claim",
    "claim_accused",
    "declare",
    "extend",
    "fence",
    "fetch",
    "fetch_ids",
    "find",
    "follow_clock",
    "holders",
    "holds_accused",
    "is_followed",
    "is_ready",
    "lanes_of",
    "note_repeats",
    "publish",
    "record_drops",
    "release_lanes",
    "require_declared",
    "settle",
    "stream_of",
    "subscribe",
    "sweep",
    "take_over",
    "topics_by_stream",
]


# A log that keeps what was handled for so long can be asked for its id while its handler runs.
_LOOKED_UP_S = 600.0


def declare(topics: Iterable[Topic[Any]]) -> Steps[Catalog]:
    """Make topics known; returns their records. Again is harmless.

    Raises `ConfigurationError` where one exists with other fixed properties.
    """
    catalog = {}
    for topic in topics:
        catalog[topic.name] = yield from _declare(topic)
    return catalog


def find(names: Iterable[str]) -> Steps[Catalog]:
    """The records of those of the named topics that somebody declared."""
    catalog = {}
    for name in names:
        for topic_no, exactly_once, _ in (yield Ask("find_topic", (name,))):
            streams = yield Ask("streams_of_topic", (topic_no,))
            record = TopicRecord(topic_no, name, bool(exactly_once), tuple(s for (s,) in streams))
            catalog[name] = record
    return catalog


def _declare(topic: Topic[Any]) -> Steps[TopicRecord]:
    exactly_once = topic.guarantee == "exactly-once"
    retentions = (topic.retention_s, topic.identity_retention_s)
    found = yield Ask("find_topic", (topic.name,))
    if found:
        [(topic_no, was_exactly_once, partitions)] = found
        _refuse_other(topic, bool(was_exactly_once), partitions)
        # The latest declaration counts: unlike the others, a retention may change.
        yield Ask("update_topic", (*retentions, topic_no))
    else:
        made = yield Ask("add_topic", (topic.name, exactly_once, topic.partitions, *retentions))
        [(topic_no,)] = made
        for partition in range(max(1, topic.partitions)):
            yield Ask("add_stream", (topic_no, partition))
    streams = yield Ask("streams_of_topic", (topic_no,))
    return TopicRecord(topic_no, topic.name, exactly_once, tuple(s for (s,) in streams))


def _refuse_other(topic: Topic[Any], was_exactly_once: bool, partitions: int) -> None:
    if partitions != topic.partitions:
        raise ConfigurationError(
            f"topic {topic.name!r} exists with partitions={partitions} and is declared with "
            f"partitions={topic.partitions}. The number is fixed when a topic is made, because "
            "it decides where each key's messages stand. Keep it, or use another topic name."
        )
    if was_exactly_once != (topic.guarantee == "exactly-once"):
        was = "exactly-once" if was_exactly_once else "without exactly-once publishing"
        raise ConfigurationError(
            f"topic {topic.name!r} exists {was} and is declared guarantee={topic.guarantee!r}. "
            "Whether identities are remembered is fixed when a topic is made: messages "
            "published before would not be known. Keep it, or use another topic name."
        )


def subscribe(
    catalog: Catalog, topics: Sequence[Topic[Any]], name: str, options: SubscribeOptions
) -> Steps[list[int]]:
    """Make or find a subscription; returns its numbers, one for each topic.

    Order by key counts as it was asked for last. Raises `ConfigurationError` where the
    subscription is recorded with another guarantee, or order by key is asked of a topic that
    has none.
    """
    if options.order_by_key:
        _refuse_unordered(topics, name)
    numbers: dict[int, int] = {}
    for topic_no, number, guarantee in (yield Ask("find_subscription", (name,))):
        numbers[topic_no] = number
        if guarantee != options.guarantee:
            raise ConfigurationError(
                f"subscription {name!r} is recorded as {guarantee} and is asked for as "
                f"{options.guarantee}. What was handled so far kept the first promise, not the "
                "second. Give the consumer another name, or its guarantee back."
            )
    found: list[int] = []
    for topic_no in dict.fromkeys(catalog[topic.name].topic_no for topic in topics):
        number = yield from _subscribe(name, topic_no, numbers.get(topic_no), options)
        found.append(number)
    return found


def require_declared(catalog: Catalog, topics: Sequence[Topic[Any]], name: str) -> None:
    """Raise `ConfigurationError` where this broker was never told of one of the topics."""
    missing = [topic.name for topic in topics if topic.name not in catalog]
    if missing:
        raise ConfigurationError(
            f"subscription {name!r}: topics {', '.join(missing)} are not declared "
            "at this broker; call declare first"
        )


def lanes_of(
    numbers: Iterable[int],
    topics: Iterable[Topic[Any]],
    worker: str,
    lane_no: int,
    boot_id: str,
    options: SubscribeOptions,
) -> list[Lane]:
    """One lane of a worker, for each topic of its subscription."""
    kept_s = min(topic.retention_s for topic in topics)
    with_ids = options.guarantee is Guarantee.AT_MOST_ONCE and kept_s < _LOOKED_UP_S
    return [
        Lane(
            number,
            worker,
            lane_no,
            boot_id,
            options.order_by_key,
            options.hold_key_on_dead,
            options.bodies_only,
            with_ids,
            options.identities,
        )
        for number in numbers
    ]


def topics_by_stream(catalog: Catalog, topics: Iterable[Topic[Any]]) -> Mapping[int, str]:
    """The name of the topic of each stream."""
    return {stream: each.name for each in topics for stream in catalog[each.name].streams}


def _subscribe(
    name: str, topic_no: int, number: int | None, options: SubscribeOptions
) -> Steps[int]:
    flags = (options.order_by_key, options.hold_key_on_dead)
    if number is None:
        made = yield Ask("add_subscription", (name, topic_no, options.guarantee.value, *flags))
        number = int(made[0][0])
    else:
        yield Ask("update_subscription", (*flags, number))
        yield Ask("unpark_behind", (number,))
    for stream, next_seq in (yield Ask("streams_without_cursor", (number, topic_no))):
        seq = yield from _start(stream, next_seq, options.start)
        yield Ask("add_cursor", (number, stream, seq))
    return number


def _refuse_unordered(topics: Sequence[Topic[Any]], name: str) -> None:
    for topic in topics:
        if topic.partitions == 0:
            raise ConfigurationError(
                f"subscription {name!r} asks for order by key, and topic {topic.name!r} has no "
                "order. Declare it with Topic(partitions=N): N streams of keys can then be "
                "worked side by side. The number is fixed when the topic is first declared."
            )


def _start(stream: int, next_seq: int, start: Start) -> Steps[int]:
    """The sequence number at which a new subscription begins."""
    if start == "latest":
        return next_seq
    since_ms = int(start.timestamp() * 1000) if isinstance(start, datetime) else -(1 << 62)
    bounds = (at(stream, 0), at(stream, next_seq))
    found = yield Ask("first_position", (*bounds, since_ms))
    return found[0][0] - bounds[0] if found else next_seq


def holders(lanes: Sequence[Lane]) -> Steps[list[tuple[str, str, int]]]:
    """Who holds claims: worker, boot id, and the boot time at which the first lease ends."""
    found: list[tuple[str, str, int]] = []
    for lane in lanes:
        found += yield Ask("holders", (lane.subscription_no,))
    return found


def record_drops(topic: str, count: int, now_ms: int) -> Steps[None]:
    """Remember that at-most-once publishes were never stored."""
    detail = "the buffer was full or storing failed"
    yield Ask("note", (now_ms, "dropped", topic, None, None, None, None, count, None, detail))


def note_repeats(receipts: Iterable[LogReceipt], subscription_no: int, now_ms: int) -> Steps[None]:
    """Remember deliveries of what had taken effect before: an incident for each range of them."""
    positions = sorted({receipt[1] for receipt in receipts})
    detail = "delivered again after it had taken effect; settled without running"
    rows = [
        (now_ms, "repeat-suppressed", subscription_no, first, last - first + 1, None, detail)
        for first, last in runs(positions)
    ]
    yield Many("note_position", rows)

"""`Fetched`: from records to the runs and items of their share."""

from __future__ import annotations

import functools
import itertools
import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from confluent_kafka import Message as Record

from duly.brokers.kafka.item import Item, item_of
from duly.brokers.kafka.runs import Run
from duly.brokers.kafka.share import Share
from duly.brokers.kafka.soundness import Soundness
from duly.brokers.kafka.wire import (
    CHARGED,
    DELAY_MS,
    DUE_MS,
    OF,
    REPEATED,
    REPLAYS,
    TOKEN,
    headers_in,
    read_headers,
)
from duly.message import Topic

_error, _partition, _topic = Record.error, Record.partition, Record.topic
# Errors of the driver cannot be compared with None.
_is_none = functools.partial(operator.is_, None)

# So many of its own are kept before those are looked for that are long since over.
_OWN = 10_000
# No time of ours is longer, and no count; with thousands of digits `int` raises.
_DIGITS, _DIGITS_OF_COUNT = 18, 9


class Fetched:
    """``declared`` are the topics that are read, by their names on the cluster. What this process
    itself set aside comes again by the clock of leases, what others did by their wall clock.
    ``as_runs``: whether what is sound and new may be kept many at a time.
    """

    def __init__(
        self,
        again: str,
        clock: Callable[[], float],
        wall_ms: Callable[[], int],
        *,
        as_runs: bool,
    ) -> None:
        self.declared: Mapping[str, Topic[Any]] = {}
        self._own: dict[str, float] = {}
        self._own_lock = threading.Lock()
        self._tidied_at = _OWN
        self._again = again
        self._clock = clock
        self._wall_ms = wall_ms
        self._as_runs = as_runs
        self.soundness = Soundness()

    def remember(self, token: str, due: float) -> None:
        """This process sets something aside until then. What another process is given of it is
        forgotten here some time after that.
        """
        with self._own_lock:
            self._own[token] = due
            if len(self._own) > self._tidied_at:
                now = self._clock()
                self._own = {each: when for each, when in self._own.items() if when > now}
                # Not again for each of very many that all wait still.
                self._tidied_at = max(_OWN, 2 * len(self._own))

    def divide(self, records: list[Any]) -> Sequence[Run | list[Any]]:
        """Records of one partition as runs, where they may be kept so."""
        topic = records[0].topic()
        declared = self.declared.get(topic)
        if not self._as_runs or topic == self._again or declared is None:
            return [records]
        return [*self.soundness.divide(declared, records)]

    def put(self, share: Share, parts: Iterable[Run | list[Any]]) -> None:
        """Put what was fetched of a partition into its share."""
        for part in parts:
            if not isinstance(part, Run):
                self._put_each(share, part)
            elif not share.feed_run(part):
                self._put_each(share, part.whole())

    def _put_each(self, share: Share, records: Sequence[Any]) -> None:
        for record in records:
            if record.offset() >= share.next:
                self._into(share, record)

    def _into(self, share: Share, record: Any) -> None:
        topic = record.topic()
        declared = self.declared.get(topic)
        if topic == self._again:
            declared = self._declared_in(record)
        item = item_of(unknown(topic) if declared is None else declared, record)
        due = self._due(share, item.offset)
        if topic == self._again and item.wrong is None:
            history = self._history(item, read_headers(headers_in(record)))
            due = max(due or 0.0, history or 0.0) or None
        share.feed(item, due)

    def _declared_in(self, record: Any) -> Topic[Any] | None:
        name = (dict(headers_in(record)).get(OF) or b"").decode(errors="replace")
        known = {topic.name: topic for topic in self.declared.values()}
        return known.get(name) or (unknown(name) if name else None)

    def _due(self, share: Share, offset: int) -> float | None:
        left_ms = share.left_ms(offset, self._wall_ms())
        return self._clock() + left_ms / 1000 if left_ms else None

    def _history(self, item: Item, headers: Mapping[str, str]) -> float | None:
        """What was known of a message that is given again; when it may be."""
        item.charged = _number(headers, CHARGED, _DIGITS_OF_COUNT)
        item.repeated = bool(_number(headers, REPEATED))
        item.replays = _number(headers, REPLAYS, _DIGITS_OF_COUNT)
        token = headers.get(TOKEN, "")
        with self._own_lock:
            own = self._own.pop(token, None)
        if own is not None:
            return own
        if due_ms := _number(headers, DUE_MS):
            # A clock that was set meanwhile makes it wait no longer than was asked for.
            left_ms = min(due_ms - self._wall_ms(), _number(headers, DELAY_MS))
            return self._clock() + left_ms / 1000 if left_ms > 0 else None
        return None


def unknown(topic: str) -> Topic[Any]:
    """A topic of which nothing is known but its name: its messages are named by themselves."""
    return Topic(topic, bytes, guarantee="at-least-once")


def _number(headers: Mapping[str, str], name: str, most: int = _DIGITS) -> int:
    """What a header says; what no program of duly's wrote says nothing."""
    text = headers.get(name, "")
    known = text.isascii() and text.isdigit() and len(text) <= most
    return int(text) if known else 0


def all_are_there(records: Sequence[Any]) -> bool:
    """Whether none of these tells of an error."""
    return all(map(_is_none, map(_error, records)))


def by_partition(records: Sequence[Any]) -> Iterator[tuple[tuple[str, int], list[Any]]]:
    """Consecutive records of one partition each; what tells of errors is left out."""
    count, first = len(records), records[0]
    if (
        all_are_there(records)
        and [*map(_partition, records)].count(first.partition()) == count
        and [*map(_topic, records)].count(first.topic()) == count
    ):
        yield (first.topic(), first.partition()), [*records]
        return
    there = [record for record in records if record.error() is None]
    for name, some in itertools.groupby(there, lambda each: (each.topic(), each.partition())):
        yield name, [*some]

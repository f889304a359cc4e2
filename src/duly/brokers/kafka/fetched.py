"""`Fetched`: from a record to an `Item` of its share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from duly.brokers.kafka.share import Item, Share
from duly.brokers.kafka.wire import (
    CHARGED,
    DELAY_MS,
    DUE_MS,
    OF,
    REPEATED,
    REPLAYS,
    TOKEN,
    message_in,
    read_headers,
)
from duly.errors import InvalidMessage
from duly.message import Topic

_MOST_OWN = 10_000


class Fetched:
    """``declared`` are the topics that are read, by their names on the cluster. What this process
    itself set aside comes again by the clock of leases, what others did by their wall clock.
    """

    def __init__(self, again: str, clock: Callable[[], float], wall_ms: Callable[[], int]) -> None:
        self.declared: Mapping[str, Topic[Any]] = {}
        self._own: dict[str, float] = {}
        self._again = again
        self._clock = clock
        self._wall_ms = wall_ms

    def remember(self, token: str, due: float) -> None:
        """This process sets something aside until then. What another process is given of it is
        forgotten here some time after that.
        """
        if len(self._own) > _MOST_OWN:
            now = self._clock()
            self._own = {each: when for each, when in self._own.items() if when > now}
        self._own[token] = due

    def into(self, share: Share, record: Any) -> None:
        """Put a record into its share."""
        body = record.value() or b""
        epoch = record.leader_epoch()
        topic = record.topic()
        declared = self.declared.get(topic)
        if topic == self._again:
            declared = self._declared_in(record)
        if declared is None:
            declared = unknown(topic)
        item = Item(declared, record.offset(), 0 if epoch is None else epoch, body)
        due = self._due(share, item.offset)
        try:
            headers = read_headers(record.headers())
            stamp_ms = record.timestamp()[1]
            item.message = message_in(declared, headers, record.key(), body, stamp_ms)
            if topic == self._again:
                due = max(due or 0.0, self._history(item, headers) or 0.0) or None
        except InvalidMessage as error:
            item.wrong = f"{type(error).__name__}: {error}"
            item.record = (record.headers(), record.key())
        share.feed(item, due)

    def _declared_in(self, record: Any) -> Topic[Any] | None:
        name = dict(record.headers() or ()).get(OF, b"").decode(errors="replace")
        known = {topic.name: topic for topic in self.declared.values()}
        return known.get(name) or (unknown(name) if name else None)

    def _due(self, share: Share, offset: int) -> float | None:
        due_ms = share.due_ms(offset)
        if not due_ms:
            return None
        return self._clock() + max(0.0, (due_ms - self._wall_ms()) / 1000)

    def _history(self, item: Item, headers: Mapping[str, str]) -> float | None:
        """What was known of a message that is given again; when it may be."""
        item.charged = _number(headers, CHARGED)
        item.repeated = bool(_number(headers, REPEATED))
        item.replays = _number(headers, REPLAYS)
        token = headers.get(TOKEN, "")
        if token in self._own:
            return self._own.pop(token)
        if due_ms := _number(headers, DUE_MS):
            # A clock that was set meanwhile makes it wait no longer than was asked for.
            left_ms = min(due_ms - self._wall_ms(), _number(headers, DELAY_MS))
            return self._clock() + left_ms / 1000 if left_ms > 0 else None
        return None


def unknown(topic: str) -> Topic[Any]:
    """A topic of which nothing is known but its name: its messages are named by themselves."""
    return Topic(topic, bytes, guarantee="at-least-once")


def _number(headers: Mapping[str, str], name: str) -> int:
    text = headers.get(name, "")
    return int(text) if text.isascii() and text.isdigit() else 0

"""Rows of the log as deliveries; what is damaged is told apart and never in the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

import msgspec

from duly.broker import Delivery, Receipt, Span, Unread
from duly.guarantees import Dead, Settlement
from duly.message import NO_HEADERS, Message
from duly.sql import log
from duly.sql.steps import Steps

History = tuple[int, bool, bool, None, int]
"""attempt, repeated, alone, no position in a log, replays: as in `Delivery`"""

LookUp = Callable[[Receipt], Message[Any]]
LookUpIds = Callable[[int, int], Sequence[str]]
"""From the first and the last position of a range to its ids."""

_decode_headers = msgspec.json.Decoder(dict[str, str]).decode
_decode_ids = msgspec.json.Decoder(list[str]).decode


class Ids:
    """The ids of a range of the log, fetched all at once when the first is asked for."""

    __slots__ = ("_first", "_found", "_json", "_last", "_look_up")

    def __init__(
        self,
        first: int,
        last: int,
        look_up: LookUpIds,
        found: Sequence[str] = (),
        json: str = "",
    ) -> None:
        self._first = first
        self._last = last
        self._look_up = look_up
        self._found = found
        self._json = json

    def at(self, position: int) -> str:
        """The id at this position; see `log.fetch_ids` for one that is gone."""
        return self.some(position, 1)[0]

    def some(self, first: int, count: int) -> Sequence[str]:
        """So many ids from this position on."""
        if not self._found:
            self._found = (
                _decode_ids(self._json) if self._json else self._look_up(self._first, self._last)
            )
        start = first - self._first
        return self._found[start : start + count]


class LogSpan(Span):
    """Some of the log, claimed under one token: the messages of ``bodies`` from position
    ``first`` on.
    """

    __slots__ = (
        "_alone",
        "_first",
        "_ids",
        "_largest",
        "_look_up",
        "_replays",
        "_sources",
        "_token",
        "_topic",
        "attempt",
        "bodies",
        "repeated",
    )

    def __init__(
        self,
        bodies: list[bytes],
        topic: str,
        first: int,
        token: int,
        history: History,
        ids: Ids,
        sources: Sequence[str],
        look_up: LookUp,
        largest: int | None,
    ) -> None:
        self.bodies = bodies
        self.attempt, self.repeated, self._alone, _, self._replays = history
        self._topic = topic
        self._first = first
        self._token = token
        self._ids = ids
        self._sources = sources
        self._look_up = look_up
        self._largest = largest

    @property
    def largest(self) -> int:
        """Bytes that no body exceeds: those of the largest of its stream, where they are known."""
        return super().largest if self._largest is None else self._largest

    @property
    def receipt(self) -> Receipt:
        """(token, first position, last position)."""
        return self._token, self._first, self._first + len(self.bodies) - 1

    @property
    def identities(self) -> tuple[str, Sequence[str], Sequence[str]]:
        """The topic, the sources and the ids of its messages."""
        sources = self._sources or [delivery.message.source for delivery in self]
        return self._topic, sources, self._ids.some(self._first, len(self.bodies))

    def __len__(self) -> int:
        return len(self.bodies)

    @overload
    def __getitem__(self, index: int) -> Delivery: ...
    @overload
    def __getitem__(self, index: slice) -> LogSpan: ...
    def __getitem__(self, index: int | slice) -> Delivery | LogSpan:
        """One delivery, or a span of some (of every one: a span has no gaps)."""
        history = (self.attempt, self.repeated, self._alone, None, self._replays)
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self.bodies))
            if step != 1:
                raise ValueError("a span has no gaps: slice it without a step")
            if stop - start == len(self.bodies):
                return self
            return LogSpan(
                self.bodies[start:stop],
                self._topic,
                self._first + start,
                self._token,
                history,
                self._ids,
                self._sources[start:stop],
                self._look_up,
                self._largest,
            )
        at = range(len(self.bodies))[index]  # counts from the end, and refuses what is outside
        position = self._first + at
        unread = Unread(self._ids.at(position), self.bodies[at], self._look_up)
        return Delivery(unread, (self._token, position), *history)

    def __iter__(self) -> Iterator[Delivery]:
        """Each delivery."""
        history = (self.attempt, self.repeated, self._alone, None, self._replays)
        token, look_up = self._token, self._look_up
        ids = self._ids.some(self._first, len(self.bodies))
        for position, (id, body) in enumerate(zip(ids, self.bodies, strict=True), self._first):
            yield Delivery(Unread(id, body, look_up), (token, position), *history)


class NextClaim(log.Ahead):
    """A lane's next claim: see `duly.broker.Ahead`."""

    __slots__ = ("_take",)

    def __init__(
        self,
        make_steps: Callable[[], Steps[log.Claimed]],
        take: Callable[[log.Claimed], Sequence[Delivery]],
    ) -> None:
        super().__init__(make_steps)
        self._take = take

    def deliveries(self) -> Sequence[Delivery]:
        """What was claimed."""
        return () if self.claimed is None else self._take(self.claimed)


class Reading:
    """How one lane reads what it claimed, and fetches later what it did not fetch then.

    ``read`` runs steps that only look, ``topics`` are the names of its streams' topics.
    """

    def __init__(
        self, read: Callable[[Callable[[], Steps[Any]]], Any], topics: Mapping[int, str]
    ) -> None:
        self._read = read
        self._topics = topics
        self._latest: tuple[Receipt, Message[Any]] | None = None

    def deliveries(self, claimed: log.Claimed) -> tuple[Sequence[Delivery], Sequence[Settlement]]:
        """The deliveries of a claim, and dead letters for the rows that are none."""
        return deliveries_of(claimed, self._topics, self._message, self._ids)

    def _ids(self, first: int, last: int) -> Sequence[str]:
        ids: Sequence[str] = self._read(lambda: log.fetch_ids(first, last))
        return ids

    def _message(self, receipt: Receipt) -> Message[Any]:
        """The whole message of a delivery that carries its body; the latest is kept, because
        every line a handler logs asks for it.
        """
        if self._latest is None or self._latest[0] != receipt:
            _, position = receipt
            rows = self._read(lambda: log.fetch(position, position, bodies_only=False))
            if not rows:
                raise LookupError(f"the message at position {position} is not in the log any more")
            self._latest = receipt, message_of(self._topics[log.stream_of(position)], rows[0])
        return self._latest[1]


def deliveries_of(
    claimed: log.Claimed, topics: Mapping[int, str], look_up: LookUp, look_up_ids: LookUpIds
) -> tuple[Sequence[Delivery], Sequence[Settlement]]:
    """The deliveries of a claim, and dead letters for the rows that are none."""
    deliveries: Sequence[Delivery] = ()
    damaged: list[Settlement] = []
    for part in claimed.parts:
        some: Sequence[Delivery]
        topic = topics[part.stream]
        if part.is_span:
            some = _span(part, topic, claimed.token, look_up, look_up_ids)
        elif len(part.rows[0]) == len(("position", "id", "body")):
            some = _bodies(part, claimed.token, look_up)
        else:
            some, dead = _whole(part, claimed.token, topic)
            damaged += dead
        deliveries = [*deliveries, *some] if deliveries else some
    return deliveries, damaged


def _span(
    part: log.Part, topic: str, token: int, look_up: LookUp, look_up_ids: LookUpIds
) -> LogSpan:
    history = (part.attempt, part.repeated, part.alone, None, part.replays)
    first, last = part.first, part.first + len(part.rows) - 1
    bodies: list[bytes] = part.rows if isinstance(part.rows, list) else [*part.rows]
    sources: Sequence[str] = [part.source] * len(bodies) if part.source else ()
    ids = Ids(first, last, look_up_ids, json=part.ids)
    if isinstance(part.rows[0], tuple):
        sources, known, bodies = map(list, zip(*part.rows, strict=True))
        ids = Ids(first, last, look_up_ids, known)
    return LogSpan(bodies, topic, first, token, history, ids, sources, look_up, part.largest)


def _bodies(part: log.Part, token: int, look_up: LookUp) -> list[Delivery]:
    history = (part.attempt, part.repeated, part.alone, None, part.replays)
    return [
        Delivery(Unread(id, body, look_up), (token, position), *history)
        for position, id, body in part.rows
    ]


def _whole(
    part: log.Part, token: int, topic: str
) -> tuple[Sequence[Delivery], Sequence[Settlement]]:
    try:
        return _at_once(part, token, topic), ()
    except (msgspec.MsgspecError, TypeError, ValueError):
        return _one_by_one(part, token, topic)


def message_of(topic: str, row: Sequence[object]) -> Message[object]:
    """A whole row as a message. Raises TypeError or ValueError where it is damaged."""
    return _message(topic, row[1:])


def _at_once(part: log.Part, token: int, topic: str) -> list[Delivery]:
    """The hot path: everything a row costs is here."""
    _, _, rows, attempt, alone, repeated, _, replays, *_ = part
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
            None,
            replays,
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
            history = (part.attempt, part.repeated, part.alone, None, part.replays)
            good.append(Delivery(message, receipt, *history))
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

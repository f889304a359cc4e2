"""Whether many records are messages that duly carries, found out for all of them at once.

`duly.brokers.kafka.wire.message_in` says that of one record, and makes its message. Records that
are alike (the same headers in the same order) are looked at column by column here, and no message
is made. What is called sound here is sound there; what is not may be sound all the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise, repeat
from typing import Any

from confluent_kafka import Message

from duly.brokers.kafka.runs import Column, Columns, Layout, Run, joined
from duly.brokers.kafka.wire import MARK, OF_NAMES, PREFIX, hide_headers
from duly.errors import InvalidMessage
from duly.message import Topic
from duly.message.limits import MAX_ID_CHARS, MAX_KEY_CHARS, check_headers

# As they are in C, without a call of Python's for each record.
_kind: Any = Message
_headers, _keys, _bodies, _offsets = _kind.headers, _kind.key, _kind.value, _kind.offset
_set_headers: Any = _kind.set_headers
_each: Any = partial(deque[None], maxlen=0)

# With values of so many bytes, so many headers are within what a message may have.
_MOST_BYTES = MAX_ID_CHARS
_MOST_HEADERS = 24
# Of each there are seven objects for a moment; Python's garbage collector begins with 700.
_AT_ONCE = 96
_PLAIN = bytes(range(0x20, 0x7F))
"""what is printable of ASCII"""
_OF_MESSAGES = frozenset({"id", "source", "time", "specversion", "data", "partitionkey"})


class Soundness:
    """Remembers which headers it has seen. ``shortest``: fewer records are no run."""

    def __init__(self, shortest: int = 8) -> None:
        self.shortest = shortest
        self._layouts: dict[tuple[str, ...], Layout | None] = {}

    def divide(self, declared: Topic[Any], records: list[Any]) -> Iterator[Run | list[Any]]:
        """Consecutive records of one partition as runs, and what is none of a run as it is."""
        alike: list[tuple[Columns, list[Any], int]] = []
        for some, columns, epoch in self._stretches(declared, records):
            if alike and (columns is None or _differ(alike[-1], columns, epoch)):
                yield _run(declared, alike)
                alike = []
            if columns is None:
                yield some
            else:
                alike.append((columns, some, epoch))
        if alike:
            yield _run(declared, alike)

    def _stretches(
        self, declared: Topic[Any], records: list[Any]
    ) -> Iterator[tuple[list[Any], Columns | None, int]]:
        """Few of them at a time, with their headers where they are alike and sound, and the epoch.

        So few because each has its headers as many objects until they are looked at, and as many
        again as Python waits for would have its garbage collector look through all there are.
        """
        cuts = [0, *range(_AT_ONCE, len(records), _AT_ONCE), len(records)]
        if len(cuts) > 2 and cuts[-1] - cuts[-2] < self.shortest:
            del cuts[-2]  # a rest that is too short goes with those before it
        for start, stop in pairwise(cuts):
            yield from self._halves(declared, records[start:stop])

    def _halves(
        self, declared: Topic[Any], some: list[Any]
    ) -> Iterator[tuple[list[Any], Columns | None, int]]:
        epoch = some[0].leader_epoch()
        # They only grow: what begins and ends in one epoch is all of it.
        if len(some) >= self.shortest and some[-1].leader_epoch() == epoch:
            columns = self._columns(declared, some)
            if columns is not None:
                _each(map(_set_headers, some, repeat(None)))
                yield some, columns, 0 if epoch is None else epoch
                return
        if len(some) < 2 * self.shortest:
            yield some, None, 0
            return
        half = len(some) // 2
        yield from self._halves(declared, some[:half])
        yield from self._halves(declared, some[half:])

    def _columns(self, declared: Topic[Any], records: list[Any]) -> Columns | None:
        """The headers of records that are all alike and sound."""
        headers: list[Any] = []
        try:
            headers.extend(map(_headers, records))
        except OF_NAMES:
            hide_headers(records[len(headers)])
            return None
        if not headers[0] or not _are_keys([*map(_keys, records)]):
            return None
        layout = self._layout(tuple([name for name, _ in headers[0]]))
        if layout is None or (declared.naming is not None and not layout.is_own):
            return None
        values: list[Column] = []
        try:
            for at, given in enumerate(zip(*headers, strict=True)):
                column = _column(given, layout.names[at])
                if column is None or (at == layout.id_at and not _are_there(column)):
                    return None
                values.append(column)
        except (TypeError, ValueError):  # one has no headers, or others; a value that is no text
            return None
        return Columns(layout, tuple(values))

    def _layout(self, names: tuple[str, ...]) -> Layout | None:
        if names not in self._layouts:
            if len(self._layouts) > 1000:
                self._layouts.clear()
            self._layouts[names] = _layout(names)
        return self._layouts[names]


def _layout(names: tuple[str, ...]) -> Layout | None:
    attributes = [name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)]
    if len(names) > _MOST_HEADERS or len({*names}) < len(names) or "id" not in attributes:
        return None
    try:
        check_headers("", "", {name: "" for name in attributes if name not in _OF_MESSAGES})
    except InvalidMessage:
        return None
    source = PREFIX + "source"
    at = names.index(source) if source in names else -1
    return Layout(names, names.index(PREFIX + "id"), at, MARK in names)


def _differ(last: tuple[Columns, list[Any], int], columns: Columns, epoch: int) -> bool:
    """Whether these cannot go on a run that ends so."""
    return last[0].layout is not columns.layout or last[2] != epoch


def _run(declared: Topic[Any], alike: Sequence[tuple[Columns, list[Any], int]]) -> Run:
    records = [record for _, some, _ in alike for record in some]
    bodies: list[Any] = [*map(_bodies, records)]
    if None in bodies:
        bodies = [body or b"" for body in bodies]
    offsets: Sequence[int] = tuple(map(_offsets, records))
    if offsets[-1] - offsets[0] == len(offsets) - 1:
        offsets = range(offsets[0], offsets[-1] + 1)
    columns = joined([(columns, len(some)) for columns, some, _ in alike])
    return Run(declared, offsets, bodies, records, alike[0][2], columns)


def _column(given: Sequence[tuple[str, bytes]], name: str) -> Column | None:
    """The values under this name, where all are what a message may carry. Raises TypeError or
    ValueError where one is no text.
    """
    first = given[0]
    # Where the last is another there is no need to count.
    if given[-1] == first and given.count(first) == len(given):
        value = first[1]
        if value is None:  # pyright: ignore[reportUnnecessaryComparison]
            return None
        return value if value.decode().isprintable() and len(value) <= _MOST_BYTES else None
    names, values = zip(*given, strict=True)
    is_sound = names.count(name) == len(names) and _are_plain(values, _MOST_BYTES)
    return values if is_sound else None


def _are_there(column: Column) -> bool:
    """Whether none of them is empty."""
    return bool(column) if isinstance(column, bytes) else all(column)


def _are_plain(values: Sequence[bytes], most: int) -> bool:
    """Whether these are printable, as ASCII: many texts of others joined would hide that one of
    them is cut within a letter.
    """
    return not b"".join(values).translate(None, _PLAIN) and max(map(len, values)) <= most


def _are_keys(keys: list[bytes | None]) -> bool:
    if keys.count(None) == len(keys):
        return True
    there = [key for key in keys if key is not None]
    return not there or _are_plain(there, MAX_KEY_CHARS)

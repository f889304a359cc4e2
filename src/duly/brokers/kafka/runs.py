"""`Runs`: of one partition, what was fetched and never tried, kept many records at a time.

A record that is a message as duly carries it, that nobody has started and nothing is known of, is
one of a `Run`: a list of records, and what is said of all of them together. What is no such record,
and what becomes of one that fails, is an `Item`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain
from typing import Any, NamedTuple

import msgspec

from duly.brokers.kafka.item import Item, item_of
from duly.brokers.kafka.wire import SOURCE_OF_STRANGERS
from duly.message import Topic


class Layout(msgspec.Struct, frozen=True, gc=False):
    """Which headers records have that are alike. ``id_at`` and ``source_at`` are where those of id
    and source stand (-1: there is none); ``is_own``: duly wrote them.
    """

    names: tuple[str, ...]
    id_at: int
    source_at: int
    is_own: bool


Column = bytes | tuple[bytes, ...]
"""What alike records have under one name: all of them the same, or each its own."""


class Columns(NamedTuple):
    """The headers of alike records, name by name. Kept so and not with each record, where they
    would be seven objects a record for Python's garbage collector to look through.
    """

    layout: Layout
    values: tuple[Column, ...]

    def some(self, start: int, stop: int | None) -> Columns:
        """Those of some records."""
        values = [v if isinstance(v, bytes) else v[start:stop] for v in self.values]
        return Columns(self.layout, tuple(values))

    def give_back(self, record: Any, at: int) -> None:
        """Give the record of this index its headers back."""
        values = [v if isinstance(v, bytes) else v[at] for v in self.values]
        record.set_headers([*zip(self.layout.names, values, strict=True)])

    def ids(self, count: int) -> list[str]:
        """The ids of so many records, which are all of them."""
        return _texts(self.values[self.layout.id_at], count)

    def sources(self, count: int) -> list[str]:
        """The sources of so many records, which are all of them."""
        at = self.layout.source_at
        column: Column = b"" if at < 0 else self.values[at]
        return [source or SOURCE_OF_STRANGERS for source in _texts(column, count)]


def _texts(column: Column, count: int) -> list[str]:
    if isinstance(column, bytes):
        return [column.decode()] * count
    return [value.decode() for value in column]


def joined(parts: Sequence[tuple[Columns, int]]) -> Columns:
    """Those of several stretches, each of so many records, of one layout."""
    values: list[Column] = []
    for column in zip(*(columns.values for columns, _ in parts), strict=True):
        first = column[0]
        if isinstance(first, bytes) and column.count(first) == len(column):
            values.append(first)
        else:
            each = [
                [some] * count if isinstance(some, bytes) else some
                for some, (_, count) in zip(column, parts, strict=True)
            ]
            values.append(tuple(chain.from_iterable(each)))
    return Columns(parts[0][0].layout, tuple(values))


class Run:
    """Consecutive sound records of one partition, with one history: ``repeated`` says that
    somebody may have started them. ``token`` is 0 while nobody has claimed them. ``records`` are
    without their headers, which are in ``columns``.
    """

    __slots__ = (
        *("bodies", "columns", "declared", "epoch", "lane", "offsets", "records", "repeated"),
        *("settling", "size", "token", "until"),
    )

    def __init__(
        self,
        declared: Topic[Any],
        offsets: Sequence[int],
        bodies: list[bytes],
        records: list[Any],
        epoch: int,
        columns: Columns,
    ) -> None:
        self.declared = declared
        self.offsets = offsets
        self.bodies = bodies
        self.records = records
        self.epoch = epoch
        self.columns = columns
        self.size = sum(map(len, bodies))
        self.repeated = self.settling = False
        self.token = self.lane = 0
        self.until = 0.0

    def __len__(self) -> int:
        return len(self.bodies)

    @property
    def first(self) -> int:
        """Its first offset."""
        return self.offsets[0]

    @property
    def last(self) -> int:
        """Its last offset."""
        return self.offsets[-1]

    def is_late(self, now: float) -> bool:
        """Whether its lease is over, and nobody is settling it."""
        return self.token != 0 and self.until <= now and not self.settling

    def before(self, offset: int) -> int:
        """How many of its records stand before an offset."""
        return bisect_left(self.offsets, offset)

    def within(self, max_bytes: int) -> int:
        """How many of its first have together so many bytes at most."""
        if self.size <= max_bytes:
            return len(self.bodies)
        sizes = [*accumulate(map(len, self.bodies))]
        return bisect_left(sizes, max_bytes + 1)

    def cut(self, count: int) -> Run:
        """Keep so many of its records; the others are a run of their own."""
        rest = Run(
            self.declared,
            self.offsets[count:],
            self.bodies[count:],
            self.records[count:],
            self.epoch,
            self.columns.some(count, None),
        )
        rest.repeated, rest.settling, rest.token = self.repeated, self.settling, self.token
        rest.lane, rest.until = self.lane, self.until
        self.offsets, self.bodies = self.offsets[:count], self.bodies[:count]
        self.records, self.columns = self.records[:count], self.columns.some(0, count)
        self.size -= rest.size
        return rest

    def whole(self) -> Sequence[Any]:
        """Its records with their headers."""
        for at, record in enumerate(self.records):
            self.columns.give_back(record, at)
        return self.records

    def items(self) -> Iterator[Item]:
        """Its records one by one, claimed as they are."""
        for record in self.whole():
            item = item_of(self.declared, record)
            item.repeated = self.repeated
            item.token, item.lane, item.until = self.token, self.lane, self.until
            item.settling = self.settling
            yield item


class Claim(NamedTuple):
    """One claim: its token, the number of its lane, and when its lease is over."""

    token: int
    lane: int
    until: float


class Runs:
    """The unsettled runs of one partition."""

    def __init__(self) -> None:
        # By first offset; ``claimed`` are those of them that somebody has.
        self._all: dict[int, Run] = {}
        self.claimed: dict[int, Run] = {}
        # Messages in all of them, and in those that are claimed.
        self.count = self.held = 0

    @property
    def first(self) -> int | None:
        """The first offset that is not settled; None: there is none."""
        return min(self._all, default=None)

    def has(self, run: Run) -> bool:
        """Whether this very run is one of them."""
        return self._all.get(run.first) is run

    def first_beside(self, runs: Iterable[Run]) -> int | None:
        """As `first`, once these are settled."""
        return min(self._all.keys() - {run.first for run in runs}, default=None)

    def add(self, run: Run) -> None:
        """What was fetched behind all others."""
        self._all[run.first] = run
        self.count += len(run)

    def head(self) -> Run | None:
        """The first that nobody has claimed."""
        first = min(self._all.keys() - self.claimed.keys(), default=None)
        return None if first is None else self._all[first]

    def ahead(self, count: int) -> tuple[int, int]:
        """The last offset of the next so many messages that nobody has claimed (-1: there are
        none), and how many there are.
        """
        last, left = -1, count
        for first in sorted(self._all.keys() - self.claimed.keys()):
            if left <= 0:
                break
            run = self._all[first]
            last = run.offsets[min(left, len(run)) - 1]
            left -= len(run)
        return last, count - max(0, left)

    def take(self, run: Run, count: int, claim: Claim) -> None:
        """Claim the first ``count`` records of one; nobody has claimed the others of it."""
        if count < len(run):
            rest = run.cut(count)
            self._all[rest.first] = rest
        run.token, run.lane, run.until = claim
        self.claimed[run.first] = run
        self.held += count

    def back(self, run: Run) -> None:
        """Nobody has it claimed any more."""
        if self.claimed.pop(run.first, None) is not None:
            self.held -= len(run)
        run.token, run.settling = 0, False

    def remove(self, run: Run) -> None:
        """It is settled, or kept one by one from now on."""
        if self.claimed.pop(run.first, None) is not None:
            self.held -= len(run)
        del self._all[run.first]
        self.count -= len(run)

    def holding(self, token: int, offsets: Sequence[int]) -> list[Run]:
        """What a claim holds of these offsets, as runs that hold nothing else."""
        found: list[Run] = []
        for run in [*self.claimed.values()]:
            start, stop = run.before(offsets[0]), run.before(offsets[-1] + 1)
            if run.token == token and start < stop:
                found.append(self._part(run, start, stop))
        return found

    def _part(self, run: Run, start: int, stop: int) -> Run:
        """Part of a claimed run by itself; what is beside it stays claimed."""
        if stop < len(run):
            self._cut(run, stop)
        return self._cut(run, start) if start else run

    def _cut(self, run: Run, count: int) -> Run:
        rest = run.cut(count)
        self._all[rest.first] = self.claimed[rest.first] = rest
        return rest

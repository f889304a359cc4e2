"""`RunSpan`: what a lane claimed as runs, as its worker sees it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple, overload

from duly.broker import Delivery, LogPosition, Span, Stretch, SubscribeOptions, Unread
from duly.brokers.kafka.item import item_of
from duly.brokers.kafka.receipt import Receipt, SpanReceipt
from duly.brokers.kafka.runs import Columns, Run
from duly.guarantees import Guarantee
from duly.message import Message, Topic


def takes_spans(options: SubscribeOptions, topics: Collection[Any]) -> bool:
    """Whether a lane can be given many at a time: a span is of one topic and in no order by key or
    by lanes of keys, and of many handlers in flight each message is settled by itself.
    """
    exactly = options.guarantee is Guarantee.EXACTLY_ONCE
    together = len(topics) == 1 and (exactly or not options.identities)
    in_lines = options.order_by_key or options.key_lanes > 1
    return options.bodies_only and together and not in_lines


class Part(NamedTuple):
    """Some records of one partition."""

    generation: int
    log: str
    declared: Topic[Any]
    offsets: Sequence[int]
    records: Sequence[Any]
    epoch: int
    columns: Columns

    @classmethod
    def of(cls, generation: int, log: str, run: Run) -> Part:
        """All of a run."""
        return cls(generation, log, run.declared, run.offsets, run.records, run.epoch, run.columns)

    def some(self, start: int, stop: int) -> Part:
        """Those from one index to before another."""
        return self._replace(
            offsets=self.offsets[start:stop],
            records=self.records[start:stop],
            columns=self.columns.some(start, stop),
        )

    def ids(self) -> list[str]:
        """The id of each."""
        return self.columns.ids(len(self.offsets))

    def sources(self) -> list[str]:
        """The source of each."""
        return self.columns.sources(len(self.offsets))


class RunSpan(Span):
    """The messages of ``bodies``, which are those of its parts one after the other: of one topic,
    claimed under one token.
    """

    __slots__ = ("_intake", "_latest", "_parts", "_token", "attempt", "bodies", "repeated")

    def __init__(
        self,
        intake: int,
        token: int,
        parts: Sequence[Part],
        bodies: list[bytes],
        repeated: bool,
    ) -> None:
        self.bodies = bodies
        self.attempt = 1
        self.repeated = repeated
        self._intake = intake
        self._token = token
        self._parts = parts
        self._latest: tuple[Receipt, Message[Any]] | None = None

    @property
    def receipt(self) -> SpanReceipt:
        """Of all of it."""
        parts = tuple([(part.generation, part.offsets) for part in self._parts])
        return SpanReceipt(self._intake, self._token, parts)

    @property
    def identities(self) -> tuple[str, Sequence[str], Sequence[str]]:
        """The topic, the sources and the ids of its messages."""
        sources = [source for part in self._parts for source in part.sources()]
        ids = [id for part in self._parts for id in part.ids()]
        return self._parts[0].declared.name, sources, ids

    @property
    def stretches(self) -> Sequence[Stretch]:
        """Where they stand."""
        return [Stretch(part.log, part.offsets, part.epoch) for part in self._parts]

    def __len__(self) -> int:
        return len(self.bodies)

    @overload
    def __getitem__(self, index: int) -> Delivery: ...
    @overload
    def __getitem__(self, index: slice) -> RunSpan: ...
    def __getitem__(self, index: int | slice) -> Delivery | RunSpan:
        """One delivery, or a span of some (of every one: a span has no gaps)."""
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self.bodies))
            if step != 1:
                raise ValueError("a span has no gaps: slice it without a step")
            if stop - start == len(self.bodies):
                return self
            parts = [*self._between(start, stop)]
            return RunSpan(self._intake, self._token, parts, self.bodies[start:stop], self.repeated)
        at = range(len(self.bodies))[index]  # counts from the end, and refuses what is outside
        [part] = self._between(at, at + 1)
        return self._delivery(part, part.ids()[0], part.offsets[0], self.bodies[at])

    def _between(self, start: int, stop: int) -> Iterator[Part]:
        first = 0
        for part in self._parts:
            begin, end = max(0, start - first), min(len(part.offsets), stop - first)
            if begin < end:
                yield part.some(begin, end)
            first += len(part.offsets)

    def __iter__(self) -> Iterator[Delivery]:
        """Each delivery."""
        bodies = iter(self.bodies)
        for part in self._parts:
            for id, offset in zip(part.ids(), part.offsets, strict=True):
                yield self._delivery(part, id, offset, next(bodies))

    def _delivery(self, part: Part, id: str, offset: int, body: bytes) -> Delivery:
        return Delivery(
            Unread(id, body, self._look_up),
            Receipt(self._intake, part.generation, offset, self._token),
            1,
            self.repeated,
            False,
            LogPosition(part.log, offset, part.epoch),
        )

    def _look_up(self, receipt: Receipt) -> Message[Any]:
        """The whole message; the latest is kept, because every line a handler logs asks for it."""
        if self._latest is None or self._latest[0] != receipt:
            self._latest = receipt, self._message(receipt)
        return self._latest[1]

    def _message(self, receipt: Receipt) -> Message[Any]:
        for part in self._parts:
            at = bisect_left(part.offsets, receipt.offset)
            is_there = at < len(part.offsets) and part.offsets[at] == receipt.offset
            if part.generation == receipt.generation and is_there:
                record = part.records[at]
                part.columns.give_back(record, at)
                message = item_of(part.declared, record).message
                assert message is not None, "only what is sound is in a run"
                return message
        raise LookupError(f"offset {receipt.offset} is none of this span")

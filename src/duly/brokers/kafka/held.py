"""What a lane has taken, and what settlements are about that it still holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from duly.brokers.kafka.ending import STRAYS_WAIT_S, Aside, Ending, RunEnding, apply
from duly.brokers.kafka.intake import Intake
from duly.brokers.kafka.item import Item
from duly.brokers.kafka.receipt import SpanReceipt
from duly.brokers.kafka.runs import Claim, Run
from duly.brokers.kafka.share import Share
from duly.guarantees import Done, Release, Settlement


@dataclass(slots=True)
class Taken:
    """What one claim has taken: either runs or items; ``wrong`` are those that are no message, and
    ``strays`` of topics that nobody reads here. ``beside``: one of these partitions runs that was
    alone in its process before.
    """

    claim: Claim
    items: list[tuple[Share, Item]] = field(default_factory=list)
    runs: list[tuple[Share, Run]] = field(default_factory=list)
    wrong: list[tuple[Share, Item]] = field(default_factory=list)
    strays: list[tuple[Share, Item]] = field(default_factory=list)
    beside: list[Share] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.items) + sum([len(run) for _, run in self.runs])

    def asides(self) -> list[Aside]:
        """Where those go that are not handed out."""
        return [
            *(Aside(item, item.charged + 1, item.repeated, item.wrong) for _, item in self.wrong),
            *(
                Aside(item, item.charged, item.repeated, delay_s=STRAYS_WAIT_S)
                for _, item in self.strays
            ),
        ]

    def untold(self) -> Iterator[Share]:
        """Partitions of which the group has to be told more before these may be started: where they
        are, that others are not, or how often one was tried.
        """
        yield from self.beside
        for share, offset in self.ends():
            told = share.announced.covers(offset) and share.telling.covers(offset)
            if not told or share.is_narrower:
                yield share
        for share, item in self.items:
            if item.alone or (item.noted and share.committed < share.version):
                yield share

    def ends(self) -> list[tuple[Share, int]]:
        """Its first and last offsets by partition, and perhaps others of it."""
        return [
            *((share, item.offset) for share, item in self.items),
            *((share, offset) for share, run in self.runs for offset in (run.first, run.last)),
        ]


@dataclass(slots=True)
class Held:
    """What settlements are about: single items, runs with receipts of their own, and the receipts
    of what is not held any more.
    """

    items: list[tuple[Settlement, Share, Item]] = field(default_factory=list)
    runs: list[tuple[Done | Release, SpanReceipt, Share, Run]] = field(default_factory=list)
    refused: list[Any] = field(default_factory=list)

    def __bool__(self) -> bool:
        """Whether anything is to be settled."""
        return bool(self.items) or bool(self.runs)

    def apply(self, there: Mapping[int, Share], now: float) -> list[tuple[Share, Any]]:
        """Let these claims end, those that are still held, with the intake's lock held; the
        receipts of which, by partition. ``there`` are the partitions that it has.
        """
        applied: list[tuple[Share, Any]] = []
        for settlement, share, item in self.items:
            if share.generation in there and item.token:
                apply(settlement, share, item, now)
                applied.append((share, settlement.receipt))
            else:
                self.refused.append(settlement.receipt)
        for ended, receipt, share, run in self.runs:
            if share.generation in there and run.token == receipt.token:
                if isinstance(ended, Done):
                    share.done_run(run)
                else:
                    share.back_run(run, started=ended.started)
                applied.append((share, receipt))
            else:
                self.refused += receipt.each()
        return applied

    def settling(self, whether: bool) -> None:
        """Say of all of it whether it is being settled: then its lease does not end."""
        for _, _, item in self.items:
            item.settling = whether
        for *_, run in self.runs:
            run.settling = whether


def held_by(intake: Intake, settlements: Sequence[Settlement]) -> Held:
    """What these are about. With the intake's lock held, until they are marked as settling."""
    held = Held()
    for settlement in settlements:
        if isinstance(settlement.receipt, SpanReceipt):
            _add_span(held, intake, settlement, settlement.receipt)
        else:
            _add(held, intake, settlement)
    held.settling(True)
    return held


def endings_of(
    intake: Intake, settlements: Sequence[Settlement]
) -> tuple[list[Ending | RunEnding], list[Any]]:
    """How what these are about is to end; and the receipts of what is not held any more, or is
    being settled already. With the intake's lock held.
    """
    ended: list[Ending | RunEnding] = []
    refused: list[Any] = []
    for settlement in settlements:
        rest = [settlement]
        if isinstance(settlement.receipt, SpanReceipt):
            runs, rest = _of_span(intake, settlement, settlement.receipt)
            for whole, share, run in runs:
                if run.settling:
                    refused += _receipt_of(settlement.receipt, share, run).each()
                else:
                    ended.append(RunEnding(whole, share, run, run.offsets, run.token))
        for own in rest:
            one = intake.held(own.receipt)
            if one is None or one[1].settling:
                refused.append(own.receipt)
            else:
                ended.append(Ending(own, *one, one[1].token))
    return ended, refused


def _add(held: Held, intake: Intake, settlement: Settlement) -> None:
    one = intake.held(settlement.receipt)
    if one is None or one[1].settling:
        held.refused.append(settlement.receipt)
    else:
        held.items.append((settlement, *one))


def _add_span(held: Held, intake: Intake, settlement: Settlement, receipt: SpanReceipt) -> None:
    runs, rest = _of_span(intake, settlement, receipt)
    for ended, share, run in runs:
        own = _receipt_of(receipt, share, run)
        if run.settling:
            held.refused += own.each()
        else:
            held.runs.append((ended, own, share, run))
    for one in rest:
        _add(held, intake, one)


def _of_span(
    intake: Intake, settlement: Settlement, receipt: SpanReceipt
) -> tuple[list[tuple[Done | Release, Share, Run]], list[Settlement]]:
    """The runs that it is about, and the same settlement of each of the others."""
    assert isinstance(settlement, Done | Release), "a span ends in no other way"
    runs, rest = intake.held_of(receipt)
    each: list[Settlement] = (
        [*map(Done, rest)]
        if isinstance(settlement, Done)
        else [Release(one, settlement.started) for one in rest]
    )
    return [(settlement, *one) for one in runs], each


def _receipt_of(receipt: SpanReceipt, share: Share, run: Run) -> SpanReceipt:
    return SpanReceipt(receipt.intake, receipt.token, ((share.generation, run.offsets),))

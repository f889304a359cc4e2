"""How a claim ends: in its share, in what is noted of it, and elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import assert_never

from duly.brokers.kafka.notes import REACH, Known
from duly.brokers.kafka.runs import Run
from duly.brokers.kafka.share import Item, Order, Share
from duly.guarantees import Dead, Done, Release, Retry, Settlement

STRAYS_WAIT_S = 30.0
"""What is to be given again, and is of a topic that is not consumed here, is passed on so often."""

STRAYS = (
    "another process may, of older or newer code; if none does, consume it once more, until they "
    "are handled"
)
STRAY = "the consumer does not consume its topic (any more); replay it with code that does"


@dataclass(frozen=True, slots=True)
class Ending:
    """How one claim is to end. ``token`` is the claim's: the item may be another's by now."""

    settlement: Settlement
    share: Share
    item: Item
    token: int

    def __len__(self) -> int:
        return 1

    @property
    def is_held(self) -> bool:
        """Whether the claim holds it still."""
        return self.item.token == self.token

    def settling(self, whether: bool) -> None:
        """Say whether it is being settled: then its lease does not end."""
        self.item.settling = whether

    def apply(self, now: float) -> None:
        """Let it end so, with the lock held."""
        apply(self.settlement, self.share, self.item, now)


@dataclass(frozen=True, slots=True)
class RunEnding:
    """The same of several records that were claimed together. ``offsets`` are those of them: part
    of a run may be kept one by one, or by itself, before it ends.
    """

    settlement: Done | Release
    share: Share
    run: Run
    offsets: Sequence[int]
    token: int

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def is_held(self) -> bool:
        """As of an `Ending`."""
        run = self.run
        return run.token == self.token and self.share.runs.has(run) and run.offsets == self.offsets

    def settling(self, whether: bool) -> None:
        """As of an `Ending`."""
        self.run.settling = whether

    def apply(self, now: float) -> None:  # noqa: ARG002 - nothing of it waits
        """As of an `Ending`."""
        if isinstance(self.settlement, Done):
            self.share.done_run(self.run)
        else:
            self.share.back_run(self.run, started=self.settlement.started)


@dataclass(slots=True)
class Endings:
    """What a transaction is to say of one partition, before its claims have ended there. ``known``
    are items, with None settled; ``done`` runs; ``begun`` is behind the last of those that are
    given back and may have run; ``count`` is how many messages have ended.
    """

    share: Share
    known: dict[int, Known | None] = field(default_factory=dict)
    done: list[Run] = field(default_factory=list)
    begun: int = 0
    count: int = 0

    @property
    def ahead(self) -> int:
        """How many the next claim may be of, to announce it: as many, and as many again where all
        is settled, for claims differ, and to announce one by itself is another transaction.
        """
        settled = sum(map(len, self.done)) + sum(known is None for known in self.known.values())
        return min(2 * self.count, REACH) if settled == self.count else self.count

    def add(self, each: Ending | RunEnding, wall_ms: int) -> None:
        """Say it of this one, too."""
        self.count += len(each)
        if isinstance(each, Ending):
            known = noted(each.settlement, each.item, wall_ms)
            if known is not None or not isinstance(each.settlement, Release):
                self.known[each.item.offset] = known
        elif isinstance(each.settlement, Done):
            self.done.append(each.run)
        elif each.settlement.started:
            self.begun = max(self.begun, each.run.last + 1)


@dataclass(frozen=True, slots=True)
class Aside:
    """An item that is settled here and goes elsewhere: to the dead letters with an ``error``, or
    to come again after a delay.
    """

    item: Item
    charged: int
    repeated: bool
    error: str | None = None
    delay_s: float = 0.0


def aside(settlement: Settlement, share: Share, item: Item) -> Aside | None:
    """What goes elsewhere with a settlement, if anything does."""
    charged = item.charged + (not item.alone)
    match settlement:
        case Dead(error=error):
            return Aside(item, charged, True, error)
        case Retry(delay_s=delay_s, charged=True) if moves(share, settlement):
            return Aside(item, charged, True, delay_s=delay_s)
        case _:
            return None


def asides(ended: Sequence[Ending | RunEnding]) -> list[Aside]:
    """What goes elsewhere with these; of what was claimed together nothing does."""
    found = [aside(e.settlement, e.share, e.item) for e in ended if isinstance(e, Ending)]
    return [each for each in found if each is not None]


def apply(settlement: Settlement, share: Share, item: Item, now: float) -> None:
    """Let a claim end so, with the lock held. What is to be kept elsewhere is there already."""
    match settlement:
        case Done() | Dead():
            share.done(item)
        case Retry(charged=True) if moves(share, settlement):
            share.done(item)
        case Retry(delay_s=delay_s, charged=charged):
            if charged:
                item.charged += not item.alone
                item.suspect, item.repeated = False, True
            else:
                item.charged -= item.alone
            share.note(item)
            share.wait(item, now + delay_s)
        case Release(started=started):
            item.charged -= item.alone
            if started and not item.repeated:
                item.repeated = True
                share.note(item)
            share.back(item)
        case _:
            assert_never(settlement)


def moves(share: Share, retry: Retry) -> bool:
    """Whether it waits elsewhere, so that the position can go on: where nothing is in order."""
    return share.order is Order.NONE and retry.delay_s > 0


def noted(settlement: Settlement, item: Item, wall_ms: int) -> Known | None:
    """What `apply` will note of it; None where it is settled, or nothing needs to be noted."""
    match settlement:
        case Done() | Dead():
            return None
        case Retry(delay_s=delay_s, charged=charged):
            count = item.charged + (not item.alone) if charged else item.charged - item.alone
            due_ms = wall_ms + int(delay_s * 1000) if delay_s > 0 else 0
            return Known(count, charged or item.repeated, due_ms)
        case Release(started=started):
            if not (item.noted or (started and not item.repeated)):
                return None
            return Known(item.charged - item.alone, item.repeated or started)
        case _:
            assert_never(settlement)

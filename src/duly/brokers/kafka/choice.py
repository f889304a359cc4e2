"""`Choice`: what a lane may claim now."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from duly.brokers.kafka.held import Taken
from duly.brokers.kafka.intake import Intake
from duly.brokers.kafka.item import Item
from duly.brokers.kafka.share import Share


class Choice:
    """Of one lane, which reads these topics, by their names on the cluster. ``as_runs``: whether it
    can be given many at a time. With the intake's lock held.
    """

    def __init__(self, intake: Intake, topics: AbstractSet[str], *, as_runs: bool) -> None:
        self._intake = intake
        self._topics = topics
        self._names = {intake.fetched.declared[topic].name for topic in topics}
        self._as_runs = as_runs
        self._turn = 0

    def take(self, taken: Taken, limit: int, max_bytes: int, now: float) -> None:
        """Claim for it one suspect, some of a part of them, or a batch of others."""
        shares = self._intake.shares.values()
        for share in shares:
            share.reap(now)
        sole = next((each for each in shares if each.suspects.run_in_solitude), None)
        if sole is not None and not sole.suspects.may_be_joined(now):
            return
        is_held = any(share.is_held for share in shares)
        if is_held and any(map(_waits_for_solitude, shares)):
            return
        mine = self._in_turn()
        found = self._suspects(mine, limit, max_bytes, now, is_held=is_held)
        if not found and self._as_runs:
            self._take_runs(mine, limit, max_bytes, now, taken)
        if not found and not taken.runs:
            found = self._batch(mine, limit, max_bytes, now)
        if sole is not None and (found or taken.runs):
            sole.suspects.discharge()
            sole.version += 1
            taken.beside.append(sole)
        for share, item in found:
            item.token, item.lane, item.until = taken.claim
            where = taken.strays if self._is_stray(item) else taken.items
            where = where if item.wrong is None else taken.wrong
            where.append((share, item))
            item.settling = where is not taken.items

    def _in_turn(self) -> list[Share]:
        """The partitions of its topics, each claim beginning with another."""
        shares = self._intake.shares
        mine = [s for n, s in shares.items() if n[0] in self._topics or n[0] == self._intake.again]
        self._turn += 1
        start = self._turn % len(mine) if mine else 0
        return sorted(mine[start:] + mine[:start], key=_waits_for_solitude, reverse=True)

    def _suspects(
        self, mine: Sequence[Share], limit: int, max_bytes: int, now: float, *, is_held: bool
    ) -> list[tuple[Share, Item]]:
        """One that comes alone, or as many as may be of parts that are begun or begin. ``is_held``:
        something runs beside it.
        """
        found: list[tuple[Share, Item]] = []
        try:
            self._find_suspects(found, mine, limit, max_bytes, now, is_held=is_held)
        finally:
            for share in mine:
                share.suspects.end_claim()
        return found

    def _find_suspects(
        self, found: list[tuple[Share, Item]], mine: Sequence[Share], limit: int, max_bytes: int,
        now: float, *, is_held: bool,
    ) -> None:  # fmt: skip
        size = 0
        for share in mine:
            lined: dict[str, int] = {}
            lanes = share.lanes_a_claim(len(self._intake.lanes))
            while len(found) < limit and (item := share.suspect(lined, lanes)) is not None:
                if not self._is_stray(item):
                    if not self._is_for_me(item) or (found and share.suspects.come_alone):
                        break
                    size += len(item.body)
                    if found and size > max_bytes:
                        return
                share.take(item, lined)
                found.append((share, item))
                if share.suspects.come_alone:
                    if not is_held and item.wrong is None and self._is_for_me(item):
                        share.charge(item, now)
                    return

    def _is_for_me(self, item: Item) -> bool:
        return item.declared.name in self._names

    def _is_stray(self, item: Item) -> bool:
        """Whether it is to be given again to this subscription, and no lane here reads its topic:
        the consumer had it once, or another process has it already.
        """
        return not self._is_for_me(item) and not any(
            topic.name == item.declared.name for topic in self._intake.fetched.declared.values()
        )

    def _take_runs(
        self, mine: Sequence[Share], limit: int, max_bytes: int, now: float, taken: Taken
    ) -> None:
        """As many as may be handed out as one span: of one topic, and with one history."""
        left, left_bytes = limit, max_bytes
        alike: tuple[Any, bool] | None = None
        for share in mine:
            lined: dict[str, int] = {}
            while left and (run := share.next_run(now, lined)) is not None:
                if alike is None and run.declared.name in self._names:
                    alike = run.declared, run.repeated
                if (run.declared, run.repeated) != alike:
                    break
                count = min(left, share.within_reach(run), run.within(left_bytes))
                if not count and taken.runs:
                    return
                share.take_run(run, max(1, count), lined, taken.claim)
                taken.runs.append((share, run))
                left -= len(run)
                left_bytes -= run.size

    def _batch(
        self, mine: Sequence[Share], limit: int, max_bytes: int, now: float
    ) -> list[tuple[Share, Item]]:
        taken: list[tuple[Share, Item]] = []
        size = count = 0
        for share in mine:
            lined: dict[str, int] = {}
            lanes = share.lanes_a_claim(len(self._intake.lanes))
            while count < limit:
                if (run := share.next_run(now, lined)) is not None:
                    share.open(run)
                item = share.next_ready(now, lined, lanes)
                if item is None:
                    break
                if self._is_stray(item):
                    share.take(item, lined)
                    taken.append((share, item))
                    continue
                if not self._is_for_me(item):
                    break
                size += len(item.body)
                if count and size > max_bytes:
                    return taken
                share.take(item, lined)
                taken.append((share, item))
                count += item.wrong is None
        return taken


def _waits_for_solitude(share: Share) -> bool:
    """Whether it has one that is not to start beside anything."""
    item = share.suspects.for_solitude
    return item is not None and share.may_start(item)

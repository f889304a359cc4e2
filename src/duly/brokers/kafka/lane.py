"""`Lane`: claims from what was fetched, and settles it."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Protocol, assert_never

from duly.broker import Delivery, LogPosition, SubscribeOptions
from duly.brokers.kafka.intake import Intake, Receipt
from duly.brokers.kafka.share import Item, Order, Share
from duly.errors import BrokerError, BrokerUnavailable, CommitUnknown
from duly.guarantees import Dead, Done, Guarantee, Release, Retry, Settlement

log = logging.getLogger("duly.kafka")

_tokens = itertools.count(1)

# What the cluster has to give arrives at once, unless the machine is busy.
_ARRIVAL_S = 5.0
# Leases and what comes due are looked at so often by a claim that waits.
_LOOKS_S = 1.0


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


class Surroundings(Protocol):
    """What a lane needs of its broker."""

    clock: Callable[[], float]

    def put_aside(self, intake: Intake, asides: Sequence[Aside]) -> None:
        """Keep these elsewhere, durably on return. Raises `BrokerError`."""
        ...

    def leave(self, lane: Lane) -> None:
        """This lane is closed."""
        ...


class Lane:
    """One lane's view of a subscription; see `duly.broker.Subscription`. ``topics`` are their
    names on the cluster.
    """

    def __init__(
        self,
        broker: Surroundings,
        intake: Intake,
        options: SubscribeOptions,
        topics: AbstractSet[str],
        number: int,
    ) -> None:
        self.intake = intake
        self.number = number
        self._broker = broker
        self._options = options
        self._topics = topics
        self._names = {intake.fetched.declared[topic].name for topic in topics}
        self._closed = False
        self._turn = 0
        self._last = 1
        # At-most-once is settled before it is started: nobody need know who died with it.
        self._announces = options.guarantee is not Guarantee.AT_MOST_ONCE

    # --- claiming

    def claim(self, limit: int, max_bytes: int, wait_s: float) -> Sequence[Delivery]:
        """As `Subscription.claim`. Waits in real time, whatever the injected clock says."""
        deadline = time.monotonic() + wait_s
        asked = False
        while not self._closed:
            if self.intake.failed is not None:
                raise self.intake.failed
            taken, wrong = self._take(limit, max_bytes)
            if wrong:
                self._bury_unreadable(wrong)
            if taken:
                if deliveries := self._hand_out(taken):
                    return deliveries
                continue
            left_s = deadline - time.monotonic()
            if left_s > 0:
                self._wait(left_s)
            elif asked or not self._arrives():
                return ()
            else:
                asked = True
        return ()

    def _take(
        self, limit: int, max_bytes: int
    ) -> tuple[list[tuple[Share, Item]], list[tuple[Share, Item]]]:
        """What may be claimed now: one suspect, or a batch; and what is no message."""
        intake, now = self.intake, self._broker.clock()
        until = now + self._options.lease_s
        with intake.changed:
            if self._closed:
                return [], []
            self._reap(now)
            mine = self._in_turn()
            wrong: list[tuple[Share, Item]] = []
            taken = self._suspect(mine) or self._batch(mine, limit, max_bytes, now, wrong)
            for share, item in (*taken, *wrong):
                item.lane, item.until, item.token = self.number, until, next(_tokens)
                item.settling = item.wrong is not None
                del share
            return [each for each in taken if each[1].wrong is None], [
                *wrong,
                *(each for each in taken if each[1].wrong is not None),
            ]

    def _in_turn(self) -> list[Share]:
        """The partitions of its topics, each claim beginning with another."""
        shares = self.intake.shares
        mine = [s for n, s in shares.items() if n[0] in self._topics or n[0] == self.intake.again]
        self._turn += 1
        start = self._turn % len(mine) if mine else 0
        return mine[start:] + mine[:start]

    def _suspect(self, mine: Sequence[Share]) -> list[tuple[Share, Item]]:
        for share in mine:
            item = share.suspect()
            if item is not None and self._is_for_me(item):
                share.take(item, {})
                item.alone = True
                share.note(item)
                item.charged += 1
                share.version += 1
                return [(share, item)]
        return []

    def _is_for_me(self, item: Item) -> bool:
        return item.declared.name in self._names

    def _batch(
        self,
        mine: Sequence[Share],
        limit: int,
        max_bytes: int,
        now: float,
        wrong: list[tuple[Share, Item]],
    ) -> list[tuple[Share, Item]]:
        taken: list[tuple[Share, Item]] = []
        size = 0
        for share in mine:
            lined: dict[str, int] = {}
            while len(taken) < limit:
                item = share.next_ready(now, lined)
                if item is None or not self._is_for_me(item):
                    break
                size += len(item.body)
                if taken and size > max_bytes:
                    return taken
                share.take(item, lined)
                if item.wrong is None:
                    taken.append((share, item))
                else:
                    wrong.append((share, item))
        return taken

    def _hand_out(self, taken: Sequence[tuple[Share, Item]]) -> Sequence[Delivery]:
        """Say who is about to start them, where it has to be known if this process dies."""
        intake = self.intake
        self._last = len(taken)
        if self._announces:
            with intake.changed:
                for share, item in taken:
                    if item.offset >= share.announced:
                        share.announced = item.offset + 1
                        share.version += 1
            self._announce(taken)
        with intake.changed:
            return [
                self._delivery(share, item)
                for share, item in taken
                if item.token and share.generation in intake.by_generation
            ]

    def _announce(self, taken: Sequence[tuple[Share, Item]]) -> None:
        shares = {share.generation: share for share, _ in taken}
        try:
            self.intake.commits.ask([s for s in shares.values() if s.committed < s.version])
        except CommitUnknown as error:
            with self.intake.changed:
                for share, item in taken:
                    if item.token and share.generation in self.intake.by_generation:
                        item.charged -= item.alone
                        share.back(item)
            raise BrokerUnavailable(f"nothing was claimed: {error}") from error

    def _delivery(self, share: Share, item: Item) -> Delivery:
        message = item.message
        assert message is not None, "what cannot be read is not handed out"
        return Delivery(
            message,
            Receipt(self.intake.number, share.generation, item.offset, item.token),
            item.charged if item.alone else item.charged + 1,
            item.repeated,
            item.alone,
            LogPosition(share.log, item.offset, item.epoch),
            item.replays,
        )

    def _bury_unreadable(self, wrong: Sequence[tuple[Share, Item]]) -> None:
        asides = [Aside(item, item.charged + 1, item.repeated, item.wrong) for _, item in wrong]
        intake = self.intake
        try:
            self._broker.put_aside(intake, asides)
        except BrokerError:
            with intake.changed:
                for share, item in wrong:
                    if share.generation in intake.by_generation:
                        share.back(item)
            raise
        with intake.changed:
            for share, item in wrong:
                if share.generation in intake.by_generation:
                    share.done(item)
        intake.commits.ask([share for share, _ in wrong])

    def _wait(self, left_s: float) -> None:
        intake = self.intake
        with intake.changed:
            if self._closed or intake.failed is not None:
                return
            now = self._broker.clock()
            times = [
                item.until - now
                for share in intake.shares.values()
                for item in share.claimed.values()
            ]
            dues = [share.next_due() for share in intake.shares.values()]
            times += [due - now for due in dues if due is not None]
            # Not 0: an injected clock that stands still would make this a busy loop.
            intake.changed.wait(max(0.001, min(left_s, _LOOKS_S, *times)))

    def _arrives(self) -> bool:
        """Whether something comes that the cluster has: a claim that does not wait is to find what
        was published before it.
        """
        intake = self.intake
        until = time.monotonic() + _ARRIVAL_S
        came = False
        while not self._closed and intake.is_behind():
            came = True
            with intake.changed:
                intake.changed.wait(0.02)
            if time.monotonic() > until:
                return False
        return came

    def _reap(self, now: float) -> None:
        """Leases that are over make their messages suspect: who held them may hang."""
        for share in self.intake.shares.values():
            for item in [each for each in share.claimed.values() if each.is_late(now)]:
                item.repeated = item.suspect = True
                share.back(item)

    # --- settling

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[Any]:
        """As `Subscription.settle`: returns when the group has it."""
        intake = self.intake
        accepted: list[tuple[Settlement, Share, Item]] = []
        refused: list[Any] = []
        with intake.changed:
            for settlement in settlements:
                held = intake.held(settlement.receipt)
                if held is None or held[1].settling:
                    refused.append(settlement.receipt)
                else:
                    held[1].settling = True
                    accepted.append((settlement, *held))
        if not accepted:
            return refused
        self._put_aside(accepted)
        with intake.changed:
            applied = []
            for settlement, share, item in accepted:
                if share.generation in intake.by_generation and item.token:
                    self._apply(settlement, share, item)
                    applied.append((settlement, share))
                else:
                    refused.append(settlement.receipt)
            shares = {share.generation: share for _, share in applied}
            for share in shares.values() if self._announces else ():
                share.foresee(self._last)
            intake.changed.notify_all()
        lost = intake.commits.ask(shares.values())
        refused += [s.receipt for s, share in applied if share.generation in lost]
        return refused

    def _put_aside(self, accepted: Sequence[tuple[Settlement, Share, Item]]) -> None:
        asides = [aside for s, share, item in accepted if (aside := _aside(s, share, item))]
        if not asides:
            return
        try:
            self._broker.put_aside(self.intake, asides)
        except BaseException as error:
            with self.intake.changed:
                for _, _, item in accepted:
                    item.settling = False
            if isinstance(error, BrokerError):
                raise BrokerUnavailable(f"nothing was settled: {error}") from error
            raise

    def _apply(self, settlement: Settlement, share: Share, item: Item) -> None:
        now = self._broker.clock()
        match settlement:
            case Done() | Dead():
                share.done(item)
            case Retry(charged=True) if _moves(share, settlement):
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

    def extend(self, receipts: Iterable[Any], lease_s: float) -> Sequence[Any]:
        """As `Subscription.extend`. The group holds what is assigned for as long as this process
        is heard of: leases are this process's own.
        """
        lost = []
        until = self._broker.clock() + lease_s
        with self.intake.changed:
            for receipt in receipts:
                held = self.intake.held(receipt)
                if held is None:
                    lost.append(receipt)
                else:
                    held[1].until = until
        return lost

    def close(self) -> None:
        """As `Subscription.close`."""
        intake = self.intake
        with intake.changed:
            if self._closed:
                return
            self._closed = True
            for share in intake.shares.values():
                for item in [i for i in share.claimed.values() if i.lane == self.number]:
                    item.charged -= item.alone
                    share.give_up(item)
            intake.changed.notify_all()
        self._broker.leave(self)


def _moves(share: Share, retry: Retry) -> bool:
    """Whether it waits elsewhere, so that the position can go on: where nothing is in order."""
    return share.order is Order.NONE and retry.delay_s > 0


def _aside(settlement: Settlement, share: Share, item: Item) -> Aside | None:
    charged = item.charged + (not item.alone)
    match settlement:
        case Dead(error=error):
            return Aside(item, charged, True, error)
        case Retry(delay_s=delay_s, charged=True) if _moves(share, settlement):
            return Aside(item, charged, True, delay_s=delay_s)
        case _:
            return None

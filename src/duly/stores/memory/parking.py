"""What a store in memory has parked of logs: taken under a lease, settled by a token."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, assert_never

from duly.broker import Delivery, LogPosition
from duly.errors import Superseded
from duly.guarantees import Dead, Done, Release, Retry, Settlement
from duly.inspection import DeadLetter
from duly.message import Message
from duly.store import Admitted, ParkedReceipt, Waiting
from duly.store.parking import REPLAYED
from duly.stores.memory.graveyard import MemoryGraveyard

Kind = Literal["", "alone", "asked for one"]


@dataclass(slots=True, eq=False)
class Row:
    """One parked message. ``noted_ms``: when it was said that it is due at ``due_ms``. ``until`` is
    when its lease is over; None: nobody has it.
    """

    consumer: str
    message: Message[Any]
    position: LogPosition
    attempts: int
    replays: int
    repeated: bool
    noted_ms: int
    due_ms: int
    suspect: bool = False
    kind: Kind = ""
    token: int = 0
    until: float | None = None

    def free(self) -> None:
        """Nobody has it any more; earlier receipts are refused."""
        self.token += 1
        self.until, self.kind = None, ""


@dataclass(slots=True, eq=False)
class Rows:
    """The committed parked messages of one store, by number."""

    rows: dict[int, Row] = field(default_factory=dict)
    numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def held(self, receipt: ParkedReceipt) -> Row | None:
        """The row that this receipt still holds."""
        row = self.rows.get(receipt.number)
        return row if row is not None and row.token == receipt.token else None

    def add(self, row: Row) -> None:
        """Park one."""
        self.rows[next(self.numbers)] = row


class Settling:
    """The parked messages of one transaction: what it fenced, and how that ends."""

    def __init__(self, rows: Rows, consumer: str) -> None:
        self._rows = rows
        self._consumer = consumer
        self._fenced: list[ParkedReceipt] = []
        self._ended: list[ParkedReceipt] = []
        self._again: list[tuple[Retry, Delivery, int, int]] = []
        self._new: list[Row] = []

    def admit(self, deliveries: Sequence[Delivery]) -> Admitted:
        """Compare tokens. Raises `Superseded`."""
        self._fenced = [each.receipt for each in deliveries]
        self.check()
        return Admitted(list(deliveries))

    def check(self) -> None:
        """Raise `Superseded` where another has one of them by now."""
        if lost := [each for each in self._fenced if self._rows.held(each) is None]:
            raise Superseded(
                f"consumer {self._consumer!r}: {len(lost)} of {len(self._fenced)} parked messages "
                "were lost to another worker, or removed by a person; nothing was committed"
            )

    def settle(self, settlement: Settlement, delivery: Delivery, now_ms: int) -> None:
        """Hear how a parked one ended."""
        match settlement:
            case Done() | Dead():
                self._ended.append(delivery.receipt)
            case Retry():
                due_ms = now_ms + int(settlement.delay_s * 1000)
                self._again.append((settlement, delivery, now_ms, due_ms))
            case Release():
                pass  # its lease goes on, until the worker gives it back
            case _:
                assert_never(settlement)

    def park(self, retry: Retry, delivery: Delivery, at: LogPosition, now_ms: int) -> None:
        """Hear that one of a log is to be tried again: the cursor passes it."""
        row = Row(
            self._consumer,
            delivery.message,
            LogPosition(at.log, at.offset, at.epoch),
            delivery.attempt - (not retry.charged),
            delivery.replays,
            retry.charged or delivery.repeated,
            now_ms,
            now_ms + int(retry.delay_s * 1000),
        )
        self._new.append(row)

    def apply(self) -> None:
        """Make it true."""
        for receipt in self._ended:
            del self._rows.rows[receipt.number]
        for retry, delivery, noted_ms, due_ms in self._again:
            row = self._rows.rows[delivery.receipt.number]
            row.attempts = delivery.attempt - (not retry.charged)
            row.repeated = row.repeated or retry.charged
            row.suspect = delivery.alone and not retry.charged
            row.noted_ms, row.due_ms = noted_ms, due_ms
            row.free()
        for row in self._new:
            self._rows.add(row)


class MemoryParked:
    """See `duly.store.Parked`. ``lock`` is the store's; ``forget``: a consumer's message of this
    topic, source and id was not given up on after all.
    """

    def __init__(
        self,
        rows: Rows,
        forget: Callable[[str, tuple[str, str, str]], None],
        graveyard: MemoryGraveyard,
        lock: AbstractContextManager[Any],
        clock: Callable[[], float],
        wall_ms: Callable[[], int],
    ) -> None:
        self._rows = rows
        self._forget = forget
        self._graveyard = graveyard
        self._lock = lock
        self._clock = clock
        self._wall_ms = wall_ms

    def take(
        self, consumer: str, topics: Sequence[str], limit: int, max_bytes: int, lease_s: float
    ) -> Sequence[Delivery]:
        """As `Parked.take`."""
        with self._lock:
            found = sorted(
                (row.due_ms, number, row)
                for number, row in self._of(consumer, topics)
                if self._is_due(row)
            )[: max(limit, 1)]
            for _, _, row in found:
                self._take_from_the_dead(row)
            until = self._clock() + lease_s
            if found and found[0][2].suspect:
                _, number, row = found[0]
                row.attempts += 1
                return [self._taken(number, row, "alone", until)]
            kind: Kind = "asked for one" if limit == 1 else ""
            taken: list[Delivery] = []
            size = 0
            for _, number, row in found:
                size += row.message.size
                if row.suspect or (taken and size > max_bytes):
                    break
                taken.append(self._taken(number, row, kind, until))
            return taken

    def _of(self, consumer: str, topics: Sequence[str]) -> Iterable[tuple[int, Row]]:
        wanted = set(topics)
        return [
            (number, row)
            for number, row in self._rows.rows.items()
            if row.consumer == consumer and row.message.topic in wanted
        ]

    def _is_due(self, row: Row) -> bool:
        if row.until is None:
            self._follow_clock(row)
            return row.due_ms <= self._wall_ms()
        return row.until <= self._clock()

    def _follow_clock(self, row: Row) -> None:
        """What was noted by a clock that was set back waits from now for as long as it had to."""
        ahead_ms = row.noted_ms - self._wall_ms()
        if ahead_ms > 0:
            row.noted_ms -= ahead_ms
            row.due_ms -= ahead_ms

    def _take_from_the_dead(self, row: Row) -> None:
        """Charged where nothing else can be the cause; one that was alone was charged before."""
        if row.until is not None:
            row.attempts += row.kind == "asked for one"
            row.suspect = row.repeated = True
            row.free()

    def _taken(self, number: int, row: Row, kind: Kind, until: float) -> Delivery:
        row.token += 1
        row.kind, row.until = kind, until
        alone = kind == "alone"
        return Delivery(
            row.message,
            ParkedReceipt(number, row.token),
            row.attempts if alone else row.attempts + 1,
            row.repeated,
            alone,
            row.position,
            row.replays,
        )

    def next_s(self, consumer: str, topics: Sequence[str]) -> float | None:
        """As `Parked.next_s`."""
        with self._lock:
            now, now_ms = self._clock(), self._wall_ms()
            for _, row in self._of(consumer, topics):
                self._follow_clock(row)
            return min(
                (
                    (row.due_ms - now_ms) / 1000 if row.until is None else row.until - now
                    for _, row in self._of(consumer, topics)
                ),
                default=None,
            )

    def extend(self, receipts: Sequence[ParkedReceipt], lease_s: float) -> Sequence[ParkedReceipt]:
        """As `Parked.extend`."""
        with self._lock:
            lost = []
            for receipt in receipts:
                row = self._rows.held(receipt)
                if row is None:
                    lost.append(receipt)
                else:
                    row.until = self._clock() + lease_s
            return lost

    def give_back(self, releases: Sequence[Release]) -> Sequence[ParkedReceipt]:
        """As `Parked.give_back`."""
        with self._lock:
            refused = []
            for release in releases:
                row = self._rows.held(release.receipt)
                if row is None:
                    refused.append(release.receipt)
                else:
                    row.attempts -= row.kind == "alone"
                    row.repeated = row.repeated or release.started
                    row.free()
            return refused

    def waiting(self) -> Sequence[Waiting]:
        """As `Parked.waiting`."""
        with self._lock:
            groups: dict[tuple[str, str], list[Row]] = {}
            for row in self._rows.rows.values():
                groups.setdefault((row.consumer, row.message.topic), []).append(row)
        return [
            Waiting(
                *which,
                sum(row.until is None for row in rows),
                sum(row.until is not None for row in rows),
                min(row.message.time_ms for row in rows),
            )
            for which, rows in sorted(groups.items())
        ]

    def replay(self, letters: Sequence[DeadLetter]) -> Sequence[DeadLetter]:
        """As `Parked.replay`."""
        with self._lock:
            gone = self._graveyard.remove(letters)
            self.bring_back([each for each in letters if each not in gone])
            return gone

    def bring_back(self, letters: Sequence[DeadLetter]) -> None:
        """As `Parked.bring_back`."""
        with self._lock:
            for each in letters:
                m = each.message
                self._forget(each.subscription, (m.topic, m.source, m.id))
                self._rows.add(
                    Row(
                        *(each.subscription, each.message, REPLAYED),
                        attempts=0,
                        replays=each.replays + 1,
                        repeated=False,
                        noted_ms=self._wall_ms(),
                        due_ms=self._wall_ms(),
                    )
                )

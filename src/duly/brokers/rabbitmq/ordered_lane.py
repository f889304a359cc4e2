"""`OrderedLane`: claims in order by key, and settles what stays in its place until it is done."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, assert_never

from duly.broker import Delivery, SubscribeOptions
from duly.brokers.rabbitmq.intake import Receipt
from duly.brokers.rabbitmq.lane import Move, nothing_or_part
from duly.brokers.rabbitmq.link import Link
from duly.brokers.rabbitmq.notes import Note
from duly.brokers.rabbitmq.ordered import OrderedIntake
from duly.brokers.rabbitmq.partition import Entry
from duly.brokers.rabbitmq.wire import History
from duly.errors import BrokerError, BrokerUnavailable, CommitUnknown, ConfigurationError
from duly.guarantees import Dead, Done, Release, Retry, Settlement

log = logging.getLogger("duly.rabbitmq")

_tokens = itertools.count(1)
_LONGEST_WAIT_S = 1.0
# What the server has to deliver arrives at once, unless another takes it meanwhile.
_ARRIVAL_S = 2.0


class Surroundings(Protocol):
    """What a lane in order by key needs of its broker."""

    link: Link
    clock: Callable[[], float]

    def move(self, moves: Sequence[Move]) -> None:
        """Publish these elsewhere; returns when the server has them. Raises `BrokerError`."""
        ...

    def keep(self, notes: Sequence[tuple[str, bytes]]) -> None:
        """Publish these to queues; returns when the server has them. Raises `BrokerError`."""
        ...

    def retire(self, lane: OrderedLane) -> bool:
        """This lane is closed; whether it was the last of its intake."""
        ...


Accepted = Sequence[tuple[Settlement, Entry]]
"""Settlements of what is claimed."""


class OrderedLane:
    """One lane's view of a subscription in order by key; see `duly.broker.Subscription`."""

    def __init__(
        self, broker: Surroundings, intake: OrderedIntake, options: SubscribeOptions, number: int
    ) -> None:
        self.intake = intake
        self.number = number
        self._broker = broker
        self._options = options
        self._closed = False
        # Tokens of what is settled while the rest waits, or could not be: all is settled again.
        self._stands: set[int] = set()

    # --- claiming

    def claim(self, limit: int, max_bytes: int, wait_s: float) -> Sequence[Delivery]:
        """As `Subscription.claim`. Waits in real time, whatever the injected clock says."""
        deadline = time.monotonic() + wait_s
        # Only a claim that does not wait has to find what was published before it.
        asked = wait_s > 0
        while not self._closed:
            self.reap()
            self._make_ready()
            if deliveries := self._take(limit, max_bytes):
                return deliveries
            left_s = deadline - time.monotonic()
            if left_s > 0:
                self._wait(left_s)
            elif asked or not self._arrives():
                return ()
            else:
                asked = True
        return ()

    def _make_ready(self) -> None:
        """Stand in line, and learn what others knew of what they have left."""
        intake = self.intake
        if not intake.is_in_line:
            self._broker.link.call(intake.fit)
        with intake.changed:
            unread = [partition for partition in intake.partitions if partition.is_unread]
        for partition in unread:
            self._broker.link.call(partition.read_notes)

    def _take(self, limit: int, max_bytes: int) -> Sequence[Delivery]:
        with self.intake.changed:
            taken = self.intake.take(limit, max_bytes, self._broker.clock())
            for entry in taken:
                entry.token = next(_tokens)
            wrong = [entry for entry in taken if entry.wrong is not None]
            sound = [entry for entry in taken if entry.wrong is None]
            if not wrong and not any(entry.suspect for entry in sound):
                return self._hand_out(sound)
        try:
            self._give_up(wrong)
            self._count(sound)
        except BaseException:
            with self.intake.changed:
                self._let_go(taken)
            raise
        with self.intake.changed:
            return self._hand_out(sound)

    def _hand_out(self, entries: Sequence[Entry]) -> Sequence[Delivery]:
        now = self._broker.clock()
        deliveries = []
        for entry in entries:
            if not entry.is_here:
                continue  # its channel is gone, and it comes again
            assert entry.token is not None
            entry.lane, entry.since, entry.until = self.number, now, now + self._options.lease_s
            self.intake.held[entry.token] = entry
            history = entry.item.history
            deliveries.append(
                Delivery(
                    entry.item.read(),
                    Receipt(self.intake.number, entry.generation, entry.token),
                    history.charged + 1,
                    history.repeated,
                    entry.suspect,
                    None,
                    entry.item.replays,
                )
            )
        return deliveries

    def _count(self, suspects: Sequence[Entry]) -> None:
        """A start alone is charged before it is made: whoever dies cannot do it any more."""
        notes = [
            (each, each.note(History(each.item.history.charged + 1, repeated=True), suspect=True))
            for each in suspects
            if each.suspect
        ]
        self.intake.write(self._broker, notes)

    def _give_up(self, wrong: Sequence[Entry]) -> None:
        """What cannot be read goes to the dead letters."""
        if not wrong:
            return
        intake = self.intake
        self._broker.move([self._burial(entry, str(entry.wrong)) for entry in wrong])
        self._broker.link.call(lambda _: intake.acknowledge(wrong))
        with intake.changed:
            for entry in wrong:
                if entry.is_here:  # or its tag is another's by now
                    entry.partition.drop(entry)

    def _burial(self, entry: Entry, error: str) -> Move:
        history = History(entry.item.history.charged + 1, repeated=True)
        return Move(self.intake, entry.item, history, error=error)

    def _let_go(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            entry.token = None
        self.intake.changed.notify_all()

    def _wait(self, left_s: float) -> None:
        intake = self.intake
        with intake.changed:
            if self._closed or self._is_something():
                return
            now = self._broker.clock()
            times = [held.until for held in intake.held.values() if not held.settled]
            if (due := intake.next_due(now)) is not None:
                times.append(due)
            # Not 0: an injected clock that stands still would make this a busy loop.
            waits_s = [left_s, _LONGEST_WAIT_S, *(at - now for at in times)]
            intake.changed.wait(max(0.001, min(waits_s)))

    def _is_something(self) -> bool:
        """Whether a claim may find something."""
        intake = self.intake
        unread = any(partition.is_unread for partition in intake.partitions)
        return unread or bool(intake.take(1, 1, self._broker.clock()))

    def _arrives(self) -> bool:
        """Whether something comes that the server has to give."""
        intake = self.intake
        deadline = time.monotonic() + _ARRIVAL_S
        while self._broker.link.call(intake.waiting) and time.monotonic() < deadline:
            with intake.changed:
                if self._is_something():
                    return True
                intake.changed.wait(0.01)
        with intake.changed:
            return self._is_something()

    def reap(self) -> None:
        """Leases that are over make their messages suspect: who held them may hang."""
        intake, now = self.intake, self._broker.clock()
        with intake.changed:
            late = [e for e in intake.held.values() if e.until <= now and not e.settled]
            for entry in late:
                del intake.held[entry.token]  # type: ignore[arg-type]  # it is held by that
                charged = entry.item.history.charged + entry.suspect
                entry.item.history = History(charged, repeated=True)
                entry.partition.suspect(entry)
            if late:
                self._let_go(late)

    # --- settling

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[Any]:
        """As `Subscription.settle`. The server confirms notes and dead letters, and no
        acknowledgement: one that is lost on its way brings the message again.

        What is done is acknowledged first: notes may wait for an alarm to end.
        """
        with self.intake.changed:
            accepted, stood, refused = self._accept(settlements)
        done = [(s, entry) for s, entry in accepted if isinstance(s, Done)]
        others = [(s, entry) for s, entry in accepted if not isinstance(s, Done)]
        try:
            lost = self._acknowledge(_entries(done))
        except BaseException:
            self._end(done, _entries(done))
            self._keep(others)
            raise
        again = self._end(done, lost)
        if not others:
            self._stands -= stood
            return [*refused, *again]
        stood |= {s.receipt.token for s, _ in done} - {receipt.token for receipt in again}
        # From now on: somebody may extend their leases while the others wait.
        self._stands |= stood
        try:
            again = [*again, *self._settle_others(others)]
        except BaseException as error:
            if isinstance(error, BrokerError | ConfigurationError):
                raise nothing_or_part(error, len(stood)) from error
            raise
        self._stands -= stood
        return [*refused, *again]

    def _accept(
        self, settlements: Sequence[Settlement]
    ) -> tuple[list[tuple[Settlement, Entry]], set[int], list[Any]]:
        """What is to be settled now, the tokens of what stands already, and what is refused."""
        accepted: list[tuple[Settlement, Entry]] = []
        stood: set[int] = set()
        refused: list[Any] = []
        for settlement in settlements:
            receipt = settlement.receipt
            entry = self._held(receipt)
            if entry is not None and not entry.settled:
                # Still with its token: nothing of its key is handed out meanwhile.
                entry.settled = True
                accepted.append((settlement, entry))
            elif isinstance(receipt, Receipt) and receipt.token in self._stands:
                stood.add(receipt.token)
            else:
                refused.append(receipt)
        return accepted, stood, refused

    def _keep(self, accepted: Accepted) -> None:
        """They are not settled, and whoever has them is told just now: their leases begin anew."""
        until = self._broker.clock() + self._options.lease_s
        with self.intake.changed:
            for _, entry in accepted:
                entry.settled, entry.until = False, max(entry.until, until)

    def _settle_others(self, accepted: Accepted) -> Sequence[Any]:
        """Note of these what there is to be known, or bury them; the receipts of the refused."""
        try:
            self.intake.write(self._broker, self._notes(accepted))
            self._broker.move(
                [self._burial(entry, s.error) for s, entry in accepted if isinstance(s, Dead)]
            )
        except BaseException:
            self._keep(accepted)
            raise
        dead = [entry for s, entry in accepted if isinstance(s, Dead)]
        try:
            lost = self._acknowledge(dead)
        except BaseException:
            self._end(accepted, dead)
            raise
        return self._end(accepted, lost)

    def _end(self, accepted: Accepted, lost: Sequence[Entry]) -> Sequence[Any]:
        """These are over, but for those of which the server knows nothing: where their channel is
        still there, nobody else can hand them out again. The receipts of what is not settled.
        """
        refused, held = [], self.intake.held
        unknown = set(lost)
        with self.intake.changed:
            for settlement, entry in accepted:
                held.pop(settlement.receipt.token, None)
                entry.settled = False
                if entry in unknown:
                    entry.item.history = History(entry.item.history.charged, repeated=True)
                if entry in unknown or not entry.is_here:
                    refused.append(settlement.receipt)
                else:
                    self._ended(settlement, entry)
            self._let_go(entry for _, entry in accepted)
        return refused

    def _held(self, receipt: Any) -> Entry | None:
        if not isinstance(receipt, Receipt) or receipt.intake != self.intake.number:
            return None
        return self.intake.held.get(receipt.token)

    def _notes(self, accepted: Accepted) -> Sequence[tuple[Entry, Note | None]]:
        """What is to be known of those that stay where they are."""
        notes: list[tuple[Entry, Note | None]] = []
        for settlement, entry in accepted:
            history, suspect = entry.item.history, entry.suspect
            match settlement:
                case Done() | Dead():
                    continue
                case Retry(delay_s=delay_s, charged=charged):
                    suspect &= not charged
                    history = _after(history, settlement)
                    notes.append((entry, entry.note(history, suspect=suspect, wait_s=delay_s)))
                case Release():
                    if suspect:  # its start was charged, and is no more
                        notes.append((entry, entry.note(history, suspect=True)))
                case _:
                    assert_never(settlement)
        return notes

    def _acknowledge(self, entries: Sequence[Entry]) -> Sequence[Entry]:
        """Tell the server; those whose channel is gone."""
        if not entries:
            return ()
        try:
            return self._broker.link.call(lambda _: self.intake.acknowledge(entries))
        except BrokerUnavailable:
            return entries  # nothing was sent, and the connection is gone
        except BrokerError as error:
            raise CommitUnknown(f"the connection was lost while settling: {error}") from error

    def _ended(self, settlement: Settlement, entry: Entry) -> None:
        match settlement:
            case Done() | Dead():
                entry.partition.drop(entry)
            case Retry(delay_s=delay_s, charged=charged):
                entry.item.history = _after(entry.item.history, settlement)
                entry.suspect &= not charged
                entry.due = self._broker.clock() + delay_s
            case Release():
                entry.item.history = _after(entry.item.history, settlement)
            case _:
                assert_never(settlement)

    def extend(self, receipts: Iterable[Any], lease_s: float) -> Sequence[Any]:
        """As `Subscription.extend`. Leases are this process's own: the server leaves it what is not
        settled for as long as the connection lives.
        """
        lost = []
        until = self._broker.clock() + lease_s
        with self.intake.changed:
            for receipt in receipts:
                entry = self._held(receipt)
                if entry is not None:
                    entry.until = until
                elif not isinstance(receipt, Receipt) or receipt.token not in self._stands:
                    lost.append(receipt)
        return lost

    def close(self) -> None:
        """As `Subscription.close`; the last lane of a process leaves the line."""
        intake = self.intake
        with intake.changed:
            if self._closed:
                return
            self._closed = True
            mine = [e for e in intake.held.values() if e.lane == self.number and not e.settled]
            for entry in mine:
                del intake.held[entry.token]  # type: ignore[arg-type]  # it is held by that
                # It may have run, though nobody settled it.
                entry.item.history = History(entry.item.history.charged, repeated=True)
            self._let_go(mine)
        last = self._broker.retire(self)
        if not self._broker.link.is_up:
            return  # the server has taken all of it back
        try:
            if last:
                intake.write_all(self._broker, intake.partitions)
                self._broker.link.call(intake.stop)
            else:
                intake.write(
                    self._broker,
                    [(e, e.note(e.item.history, suspect=True)) for e in mine if e.suspect],
                )
        except BrokerError as error:
            # Then the server does it, when the connection is gone, and each comes alone.
            log.warning("subscription %r: not given back in order: %s", intake.subscription, error)


def _entries(accepted: Accepted) -> Sequence[Entry]:
    return [entry for _, entry in accepted]


def _after(history: History, settlement: Retry | Release) -> History:
    """The history of what was tried and is to be tried again, or was given back."""
    if isinstance(settlement, Release):
        return History(history.charged, history.repeated or settlement.started)
    return History(history.charged + 1, repeated=True) if settlement.charged else history

"""`Lane`: claims from what has been delivered, and tells the server how claims ended."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, assert_never

from duly.broker import Delivery, SubscribeOptions
from duly.brokers.rabbitmq.intake import FETCH_S, Held, Intake, Item, Receipt, unreadable
from duly.brokers.rabbitmq.link import Link
from duly.brokers.rabbitmq.wire import History
from duly.errors import BrokerError, BrokerUnavailable, CommitUnknown, ConfigurationError
from duly.guarantees import Dead, Done, Release, Retry, Settlement

log = logging.getLogger("duly.rabbitmq")

_tokens = itertools.count(1)

# Looking for suspects is a turn to the server, so it is done this often, and whenever some appear.
_LOOK_ALONE_S = 1.0
# What the server has to deliver arrives at once, unless another takes it meanwhile.
_ARRIVAL_S = 2.0


class Surroundings(Protocol):
    """What a lane needs of its broker."""

    link: Link
    clock: Callable[[], float]

    def lanes_of(self, intake: Intake) -> int:
        """How many lanes share this intake."""
        ...

    def move(self, moves: Sequence[Move]) -> None:
        """Publish these elsewhere; returns when the server has them. Raises `BrokerError`."""
        ...

    def leave(self, lane: Lane, generation: int, alone: Sequence[Item]) -> None:
        """This lane is closed, and held these suspects."""
        ...


class Subscribed(Protocol):
    """Whose messages they are."""

    subscription: str


class Move:
    """An item to be published again, with another history: to the queue of its subscription, after
    a delay, to the suspects, or (with an error) to the dead letters.
    """

    __slots__ = ("alone", "delay_s", "error", "history", "intake", "item")

    def __init__(
        self,
        intake: Subscribed,
        item: Item,
        history: History,
        *,
        alone: bool = False,
        delay_s: float = 0.0,
        error: str | None = None,
    ) -> None:
        self.intake = intake
        self.item = item
        self.history = history
        self.alone = alone
        self.delay_s = delay_s
        self.error = error


Accepted = Sequence[tuple[Settlement, Item]]
"""Settlements of what is claimed."""


class Lane:
    """One lane's view of a subscription; see `duly.broker.Subscription`."""

    def __init__(
        self, broker: Surroundings, intake: Intake, options: SubscribeOptions, number: int
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
        asked = False
        while not self._closed:
            self.reap()
            self._fit(limit, max_bytes)
            if deliveries := self._suspect() or self._batch(limit, max_bytes):
                return deliveries
            if self.intake.looks_alone:
                continue  # there were suspects among them
            left_s = deadline - time.monotonic()
            if left_s > 0:
                self._wait(left_s, limit)
            elif asked or not self._arrives(limit):
                return ()
            else:
                asked = True
        return ()

    def _fit(self, limit: int, max_bytes: int) -> None:
        intake = self.intake
        with intake.changed:
            if intake.fetches(limit):
                is_to_do, do = intake.is_to_fetch, intake.get_one
            else:
                is_to_do = intake.wants(limit, max_bytes, self._broker.lanes_of(intake))
                do = intake.fit
        if is_to_do:
            self._broker.link.call(do)

    def _suspect(self) -> Sequence[Delivery]:
        """One that somebody died with, alone: the server counts the deaths of those it is with."""
        intake, now = self.intake, time.monotonic()
        if not intake.suspects:
            if not intake.looks_alone and now < intake.looked_s + _LOOK_ALONE_S:
                return ()
            intake.looks_alone, intake.looked_s = False, now
            self._broker.link.call(intake.get_alone)
        with intake.changed:
            if not intake.suspects:
                return ()
            item, generation = intake.suspects.popleft(), intake.generation
            intake.looks_alone = True
            if (wrong := unreadable(item)) is None:
                return self._hand_out([item])
        self._set_aside(generation, [(item, wrong)])
        return ()

    def _batch(self, limit: int, max_bytes: int) -> Sequence[Delivery]:
        intake = self.intake
        with intake.changed:
            taken, aside = intake.take(limit, max_bytes)
            deliveries = self._hand_out(taken)
            generation = intake.generation
        if aside:
            try:
                self._set_aside(generation, aside)
            except BrokerError as error:
                if not deliveries:
                    raise
                # They are claimed: who is told of the others instead would never settle them.
                log.warning("subscription %r: %s", intake.subscription, error)
        return deliveries

    def _hand_out(self, items: Sequence[Item]) -> Sequence[Delivery]:
        intake = self.intake
        until = self._broker.clock() + self._options.lease_s
        deliveries = []
        for item in items:
            token = next(_tokens)
            intake.held[token] = Held(item, self.number, until)
            deliveries.append(
                Delivery(
                    item.read(),
                    Receipt(intake.number, intake.generation, token),
                    item.history.charged + 1,
                    item.history.repeated,
                    item.alone,
                    None,
                    item.replays,
                )
            )
        return deliveries

    def _set_aside(self, generation: int, aside: Sequence[tuple[Item, str | None]]) -> None:
        """Suspects go to their own queue, and what cannot be read to the dead letters."""
        moves = []
        for item, wrong in aside:
            history = History(item.history.charged, repeated=True)
            moves.append(Move(self.intake, item, history, alone=wrong is None, error=wrong))
        self._move(generation, moves)

    def _move(self, generation: int, moves: Sequence[Move]) -> None:
        """Publish elsewhere, and then take away here; or leave them where they are."""
        intake = self.intake
        try:
            self._broker.move(moves)
        except BaseException as error:
            with intake.changed:
                if generation == intake.generation:
                    for move in moves:
                        if move.error is None:  # a suspect stays one
                            move.item.history = move.history
                    intake.give_back([move.item for move in moves])
            if isinstance(error, ConfigurationError):
                raise BrokerUnavailable(f"nothing was moved: {error}") from error
            raise
        tags = [move.item.tag for move in moves]
        # Whenever that can be: nobody waits for an answer, and until then they are here twice.
        self._broker.link.post(lambda _: intake.acknowledge(generation, tags), math.inf)
        with intake.changed:
            intake.looks_alone = True
            intake.changed.notify_all()

    def _wait(self, left_s: float, limit: int) -> None:
        intake = self.intake
        longest_s = FETCH_S if intake.fetches(limit) else _LOOK_ALONE_S
        with intake.changed:
            if not intake.ready and not intake.looks_alone and not self._closed:
                now = self._broker.clock()
                leases = [h.until - now for h in intake.held.values() if not h.settled]
                # Not 0: an injected clock that stands still would make this a busy loop.
                intake.changed.wait(max(0.001, min(left_s, longest_s, *leases)))

    def _arrives(self, limit: int) -> bool:
        """Whether something comes that the server has to give: a claim that does not wait is to
        find what was published before it.
        """
        intake = self.intake
        if intake.fetches(limit):
            self._broker.link.call(intake.get_one)
            return bool(intake.ready)
        deadline = time.monotonic() + _ARRIVAL_S
        while self._broker.link.call(intake.waiting):
            with intake.changed:
                if intake.ready or intake.changed.wait(0.01):
                    return True
            if time.monotonic() > deadline:
                return False
        return bool(intake.ready)

    def reap(self) -> None:
        """Leases that are over make their messages suspect: who held them may hang."""
        intake, now = self.intake, self._broker.clock()
        with intake.changed:
            generation = intake.generation
            late = [t for t, held in intake.held.items() if held.until <= now and not held.settled]
            items = [intake.held.pop(token).item for token in late]
        moves = [
            Move(
                intake, item, History(item.history.charged + item.alone, repeated=True), alone=True
            )
            for item in items
        ]
        if moves:
            self._move(generation, moves)

    def put_back(self, keeps_s: float) -> None:
        """What has waited for so long goes to the end of its queue, as it was: the server counts
        the time since it was delivered, and would take all of it back.
        """
        intake = self.intake
        with intake.changed:
            generation = intake.generation
            old = intake.ready.pop_older(time.monotonic() - keeps_s)
        moves = [Move(intake, each, each.uncounted, alone=each.taken_back > 0) for each in old]
        if moves:
            self._move(generation, moves)

    # --- settling

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[Any]:
        """As `Subscription.settle`. The server confirms what is published elsewhere, and no
        acknowledgement: one that is lost on its way brings the message again.

        What is over is acknowledged first: what is tried again may wait for an alarm to end.
        """
        with self.intake.changed:
            generation = self.intake.generation
            accepted, stood, refused = self._accept(settlements)
        here = [each for each in accepted if not _goes_elsewhere(*each)]
        elsewhere = [each for each in accepted if _goes_elsewhere(*each)]
        try:
            is_there = self._acknowledge(generation, here)
        except BaseException:
            self._keep(elsewhere)
            raise
        if not is_there:
            # Nor could these be acknowledged, and they would be there twice.
            self._hand_out_again(generation, elsewhere)
            return [*refused, *_receipts(accepted)]
        if not elsewhere:
            self._stands -= stood
            return refused
        stood |= {receipt.token for receipt in _receipts(here)}
        # From now on: somebody may extend their leases while the others wait.
        self._stands |= stood
        try:
            if not self._move_and_acknowledge(generation, elsewhere):
                refused += _receipts(elsewhere)
        except BaseException as error:
            if isinstance(error, BrokerError | ConfigurationError):
                raise nothing_or_part(error, len(stood)) from error
            raise
        self._stands -= stood
        return refused

    def _accept(
        self, settlements: Sequence[Settlement]
    ) -> tuple[list[tuple[Settlement, Item]], set[int], list[Any]]:
        """What is to be settled now, the tokens of what stands already, and what is refused."""
        accepted: list[tuple[Settlement, Item]] = []
        stood: set[int] = set()
        refused: list[Any] = []
        for settlement in settlements:
            receipt = settlement.receipt
            held = self._held(receipt)
            if held is not None and not held.settled:
                held.settled = True
                accepted.append((settlement, held.item))
            elif isinstance(receipt, Receipt) and receipt.token in self._stands:
                stood.add(receipt.token)
            else:
                refused.append(receipt)
        return accepted, stood, refused

    def _keep(self, accepted: Accepted) -> None:
        """They are not settled, and whoever has them is told just now: their leases begin anew."""
        until = self._broker.clock() + self._options.lease_s
        with self.intake.changed:
            for receipt in _receipts(accepted):
                held = self.intake.held.get(receipt.token)
                if held is not None:
                    held.settled, held.until = False, max(held.until, until)

    def _hand_out_again(self, generation: int, accepted: Accepted) -> None:
        """Where the server does not: it takes them for delivered."""
        with self.intake.changed:
            if generation != self.intake.generation:
                return
            for settlement, item in accepted:
                self.intake.held.pop(settlement.receipt.token, None)
                item.history = History(item.history.charged, repeated=True)
            self.intake.suspects.extend(item for _, item in accepted if item.alone)
            self.intake.give_back([item for _, item in accepted if not item.alone])

    def _move_and_acknowledge(self, generation: int, accepted: Accepted) -> bool:
        try:
            self._broker.move(self._moves(accepted))
        except BaseException:
            self._keep(accepted)
            raise
        return self._acknowledge(generation, accepted)

    def _held(self, receipt: Any) -> Held | None:
        intake = self.intake
        if not isinstance(receipt, Receipt):
            return None
        if (receipt.intake, receipt.generation) != (intake.number, intake.generation):
            return None
        return intake.held.get(receipt.token)

    def _moves(self, accepted: Accepted) -> Sequence[Move]:
        moves = []
        for settlement, item in accepted:
            charged = item.history.charged
            match settlement:
                case Done():
                    continue
                case Retry(delay_s=delay_s, charged=False):
                    moves.append(
                        Move(self.intake, item, item.history, alone=item.alone, delay_s=delay_s)
                    )
                case Retry(delay_s=delay_s):
                    history = History(charged + 1, repeated=True)
                    moves.append(Move(self.intake, item, history, delay_s=delay_s))
                case Dead(error=error):
                    history = History(charged + 1, repeated=True)
                    moves.append(Move(self.intake, item, history, error=error))
                case Release():
                    moves.append(Move(self.intake, item, item.history, alone=True))
                case _:
                    assert_never(settlement)
        return moves

    def _acknowledge(self, generation: int, accepted: Accepted) -> bool:
        """Tell the server of those; nobody holds them any more, however that ends. False: the
        channel on which they were delivered is gone, or nothing was sent.
        """
        intake = self.intake
        told = [each for each in accepted if not _stays(*each)]
        tags = [item.tag for _, item in told]
        try:
            with intake.changed:
                if generation != intake.generation:
                    return False
                for settlement, item in accepted:
                    if isinstance(settlement, Release) and not item.alone:
                        again = item.history.repeated or settlement.started
                        item.history = History(item.history.charged, again)
                intake.give_back([item for each, item in accepted if _stays(each, item)])
                intake.looks_alone |= any(item.alone for _, item in accepted)
            return not tags or self._broker.link.call(
                lambda _: intake.acknowledge(generation, tags)
            )
        except BrokerUnavailable:
            # The connection is gone, or busy. Then it is for this process to hand them out again.
            self._hand_out_again(generation, told)
            return False
        except BrokerError as error:
            raise CommitUnknown(f"the connection was lost while settling: {error}") from error
        finally:
            with intake.changed:
                for receipt in _receipts(accepted):
                    intake.held.pop(receipt.token, None)

    def extend(self, receipts: Iterable[Any], lease_s: float) -> Sequence[Any]:
        """As `Subscription.extend`. The server holds what is not settled for as long as the
        connection lives: leases are this process's own.
        """
        lost = []
        until = self._broker.clock() + lease_s
        with self.intake.changed:
            for receipt in receipts:
                held = self._held(receipt)
                if held is not None:
                    held.until = until
                elif not isinstance(receipt, Receipt) or receipt.token not in self._stands:
                    lost.append(receipt)
        return lost

    def close(self) -> None:
        """As `Subscription.close`."""
        intake = self.intake
        with intake.changed:
            if self._closed:
                return
            self._closed = True
            generation = intake.generation
            mine = [
                token
                for token, held in intake.held.items()
                if held.lane == self.number and not held.settled
            ]
            items = [intake.held.pop(token).item for token in mine]
            for item in items:
                # It may have run, though nobody settled it.
                item.history = History(item.history.charged, repeated=True)
            intake.give_back([item for item in items if not item.alone])
            alone = [item for item in items if item.alone] + list(intake.suspects)
            intake.suspects.clear()
        self._broker.leave(self, generation, alone)


def _goes_elsewhere(settlement: Settlement, item: Item) -> bool:
    """Whether it is published again, before it is acknowledged here."""
    return isinstance(settlement, Retry | Dead) or (isinstance(settlement, Release) and item.alone)


def _stays(settlement: Settlement, item: Item) -> bool:
    """Whether it is this process's to hand out again, and the server is told nothing."""
    return isinstance(settlement, Release) and not item.alone


def _receipts(accepted: Accepted) -> Sequence[Receipt]:
    return [settlement.receipt for settlement, _ in accepted]


def nothing_or_part(error: Exception, stands: int) -> BrokerUnavailable | CommitUnknown:
    """What a settlement raises of which so many stand, and the others could not be settled."""
    if not stands:
        return BrokerUnavailable(f"nothing was settled: {error}")
    return CommitUnknown(
        f"{stands} messages were acknowledged, and the others not settled: {error}. They are still "
        "held: settle again"
    )

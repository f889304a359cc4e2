"""`Lane`: claims from what has been delivered, and tells the server how claims ended."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, assert_never

from duly.broker import Delivery, SubscribeOptions
from duly.brokers.rabbitmq.intake import Held, Intake, Item, Receipt, unreadable
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
                self._wait(left_s)
            elif asked or not self._arrives():
                return ()
            else:
                asked = True
        return ()

    def _fit(self, limit: int, max_bytes: int) -> None:
        with self.intake.changed:
            fits = not self.intake.wants(limit, max_bytes, self._broker.lanes_of(self.intake))
        if not fits:
            self._broker.link.call(self.intake.fit)

    def _suspect(self) -> Sequence[Delivery]:
        """One that somebody died with, alone: the server counts the deaths of those it is with."""
        intake, now = self.intake, time.monotonic()
        if not intake.looks_alone and now < intake.looked_s + _LOOK_ALONE_S:
            return ()
        intake.looks_alone, intake.looked_s = False, now
        found = self._broker.link.call(intake.get_alone)
        if found is None:
            return ()
        item, generation = found
        intake.looks_alone = True
        if (wrong := unreadable(item)) is not None:
            self._set_aside(generation, [(item, wrong)])
            return ()
        with intake.changed:
            if generation != intake.generation:
                return ()  # its channel is gone, and it comes again
            return self._hand_out([item])

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

    def _wait(self, left_s: float) -> None:
        intake = self.intake
        with intake.changed:
            if not intake.ready and not intake.looks_alone and not self._closed:
                now = self._broker.clock()
                leases = [held.until - now for held in intake.held.values()]
                # Not 0: an injected clock that stands still would make this a busy loop.
                intake.changed.wait(max(0.001, min(left_s, _LOOK_ALONE_S, *leases)))

    def _arrives(self) -> bool:
        """Whether something comes that the server has to give: a claim that does not wait is to
        find what was published before it.
        """
        intake = self.intake
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
            late = [token for token, held in intake.held.items() if held.until <= now]
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
        """
        intake = self.intake
        taken: dict[int, Held] = {}
        accepted: list[tuple[Settlement, Item]] = []
        refused: list[Any] = []
        with intake.changed:
            generation = intake.generation
            for settlement in settlements:
                held = self._held(settlement.receipt)
                if held is None:
                    refused.append(settlement.receipt)
                else:
                    taken[settlement.receipt.token] = intake.held.pop(settlement.receipt.token)
                    accepted.append((settlement, held.item))
        try:
            self._broker.move(self._moves(accepted))
        except BaseException as error:
            with intake.changed:
                if generation == intake.generation:
                    intake.held.update(taken)
            if isinstance(error, BrokerError | ConfigurationError):
                raise BrokerUnavailable(f"nothing was settled: {error}") from error
            raise
        if accepted and not self._acknowledge(generation, accepted):
            refused += [settlement.receipt for settlement, _ in accepted]
        return refused

    def _held(self, receipt: Any) -> Held | None:
        intake = self.intake
        if not isinstance(receipt, Receipt):
            return None
        if (receipt.intake, receipt.generation) != (intake.number, intake.generation):
            return None
        return intake.held.get(receipt.token)

    def _moves(self, accepted: Sequence[tuple[Settlement, Item]]) -> Sequence[Move]:
        moves = []
        for settlement, item in accepted:
            charged, repeated = item.history.charged, item.history.repeated
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
                case Release(started=started):
                    if item.alone:
                        moves.append(Move(self.intake, item, item.history, alone=True))
                    else:
                        item.history = History(charged, repeated or started)
                case _:
                    assert_never(settlement)
        return moves

    def _acknowledge(self, generation: int, accepted: Sequence[tuple[Settlement, Item]]) -> bool:
        """Tell the server; False: the channel on which they were delivered is gone."""
        intake = self.intake
        back = [i for s, i in accepted if isinstance(s, Release) and not i.alone]
        tags = [i.tag for s, i in accepted if not isinstance(s, Release) or i.alone]
        with intake.changed:
            if generation != intake.generation:
                return False
            intake.give_back(back)
            intake.looks_alone |= any(item.alone for _, item in accepted)
        if not tags:
            return True
        try:
            return self._broker.link.call(lambda _: intake.acknowledge(generation, tags))
        except BrokerUnavailable:
            # Nothing was sent: the connection is gone, or busy. Then it is for this process to hand
            # them out again.
            with intake.changed:
                if generation == intake.generation:
                    for _, item in accepted:
                        if item.tag in tags:
                            item.history = History(item.history.charged, repeated=True)
                            intake.give_back([item])
            return False
        except BrokerError as error:
            raise CommitUnknown(f"the connection was lost while settling: {error}") from error

    def extend(self, receipts: Iterable[Any], lease_s: float) -> Sequence[Any]:
        """As `Subscription.extend`. The server holds what is not settled for as long as the
        connection lives: leases are this process's own.
        """
        lost = []
        until = self._broker.clock() + lease_s
        with self.intake.changed:
            for receipt in receipts:
                held = self._held(receipt)
                if held is None:
                    lost.append(receipt)
                else:
                    held.until = until
        return lost

    def close(self) -> None:
        """As `Subscription.close`."""
        intake = self.intake
        with intake.changed:
            if self._closed:
                return
            self._closed = True
            generation = intake.generation
            mine = [token for token, held in intake.held.items() if held.lane == self.number]
            items = [intake.held.pop(token).item for token in mine]
            for item in items:
                # It may have run, though nobody settled it.
                item.history = History(item.history.charged, repeated=True)
            intake.give_back([item for item in items if not item.alone])
        self._broker.leave(self, generation, [item for item in items if item.alone])

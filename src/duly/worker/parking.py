"""A log's subscription and what the store has parked of it: one source of deliveries for a lane.

What is due in the store and what the log has to give take turns, so that neither waits for the
other to come to an end. The store is looked at when something may be due, and now and then for
what others have parked, or left behind.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from duly.broker import Delivery, NotesRepeats, Receipt, SettlesRemembered, Subscription
from duly.consumer import Consumer
from duly.errors import BrokerError, CommitUnknown
from duly.guarantees import Admission, Dead, Done, Release, Retry, Settlement
from duly.inspection import DeadLetter
from duly.inspection.graves import KeepsLetters
from duly.message import now_ms
from duly.store import Parked, ParkedReceipt, Scope

if TYPE_CHECKING:
    from duly.worker.lane import Lane

log = logging.getLogger("duly.worker")

# So often a lane looks for what others have parked or brought back.
LOOK_EVERY_S = 1.0
# Another lane may have taken what was due: it is not asked for again at once.
_AFTER_NOTHING_S = 0.05


class Parking:
    """See `duly.broker.Subscription`, of a consumer that is admitted by cursor.

    The transaction that settles a parked message has ended its claim. ``keeps``: the broker that
    wants the dead letters of these, where it keeps its own; None: the store shows them. ``parks``:
    what fails of the log is parked; in order by key it is not, and what was parked before the
    consumer asked for order is worked all the same.
    """

    def __init__(
        self,
        inner: Subscription,
        parked: Parked,
        consumer: Consumer,
        *,
        keeps: KeepsLetters | None = None,
    ) -> None:
        self.inner = inner
        self._parked = parked
        self._consumer = consumer.name
        self._topics = [topic.name for topic in consumer.topics]
        self._lease_s = consumer.options.lease_s
        self._keeps = keeps
        self.parks = not consumer.options.order_by_key
        self._lane: Lane | None = None
        self._look_at = float("-inf")
        self._log_is_next = False
        self._held: dict[ParkedReceipt, Delivery] = {}
        self._closed = False

    def serves(self, lane: Lane) -> None:
        """Go by the clock of this lane."""
        self._lane = lane

    def _now(self) -> float:
        return time.monotonic() if self._lane is None else self._lane.around.clock()

    @property
    def buries(self) -> bool:
        """Whether the store's graveyard is where the dead of these are shown."""
        return self._keeps is None

    def claim(self, limit: int, max_bytes: int, wait_s: float) -> Sequence[Delivery]:
        """As `Subscription.claim`: of one kind or the other. Waits in real time."""
        deadline = time.monotonic() + wait_s
        while not self._closed:
            due = self._is_due()
            if due and not self._log_is_next:
                if taken := self._take(limit, max_bytes):
                    self._log_is_next = True
                    return taken
                due = False
            left_s = deadline - time.monotonic()
            until_look_s = self._look_at - self._now()
            pause_s = 0.0 if due else max(0.0, min(left_s, until_look_s))
            claimed = self.inner.claim(limit, max_bytes, pause_s)
            self._log_is_next = False
            if claimed or (left_s <= 0 and not due):
                return claimed
        return ()

    def _is_due(self) -> bool:
        now = self._now()
        if now < self._look_at:
            return False
        next_s = self._parked.next_s(self._consumer, self._topics)
        if next_s is not None and next_s <= 0:
            return True
        self._look_at = now + min(LOOK_EVERY_S, LOOK_EVERY_S if next_s is None else next_s)
        return False

    def _take(self, limit: int, max_bytes: int) -> Sequence[Delivery]:
        taken = self._parked.take(self._consumer, self._topics, limit, max_bytes, self._lease_s)
        if not taken:
            self._look_at = self._now() + _AFTER_NOTHING_S
        for delivery in taken:
            self._held[delivery.receipt] = delivery
        return taken

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[Receipt]:
        """As `Subscription.settle`, of what a transaction has recorded: to the log, what was parked
        by it is done.
        """
        mine: list[Settlement] = []
        theirs: list[Settlement] = []
        for each in settlements:
            if isinstance(each, Retry):
                self._look_at = min(self._look_at, self._now() + each.delay_s)
            if isinstance(each.receipt, ParkedReceipt):
                mine.append(each)
            else:
                parked = self.parks and isinstance(each, Retry)
                theirs.append(Done(each.receipt) if parked else each)
        refused: list[Receipt] = [*self.inner.settle(theirs)] if theirs else []
        return [*refused, *self._settle_parked(mine)] if mine else refused

    @property
    def settles_remembered(self) -> bool:
        """As `SettlesRemembered.settles_remembered`: whether the log can."""
        return isinstance(self.inner, SettlesRemembered) and self.inner.settles_remembered

    def settle_remembered(self, settlements: Sequence[Done]) -> Sequence[Receipt]:
        """As `SettlesRemembered.settle_remembered`, where the log can. What is done of the parked
        ended with its transaction.
        """
        theirs: list[Done] = []
        for each in settlements:
            if isinstance(each.receipt, ParkedReceipt):
                self._held.pop(each.receipt, None)
            else:
                theirs.append(each)
        assert isinstance(self.inner, SettlesRemembered), "whoever asks has looked"
        return self.inner.settle_remembered(theirs) if theirs else ()

    def _settle_parked(self, settlements: Sequence[Settlement]) -> Sequence[Receipt]:
        releases = [each for each in settlements if isinstance(each, Release)]
        refused = self._parked.give_back(releases) if releases else ()
        if releases:
            self._look_at = self._now()
        if self._keeps is not None and (dead := [*self._letters(settlements)]):
            self._keeps.keep_letters(dead)
        for each in settlements:
            self._held.pop(each.receipt, None)
        return refused

    def _letters(self, settlements: Sequence[Settlement]) -> Iterable[DeadLetter]:
        for each in settlements:
            delivery = self._held.get(each.receipt)
            if isinstance(each, Dead) and delivery is not None:
                yield DeadLetter(
                    self._consumer,
                    delivery.message,
                    each.error,
                    delivery.attempt,
                    now_ms(),
                    replays=delivery.replays,
                )

    def extend(self, receipts: Iterable[Receipt], lease_s: float) -> Sequence[Receipt]:
        """As `Subscription.extend`."""
        mine: list[ParkedReceipt] = []
        theirs: list[Receipt] = []
        for each in receipts:
            (mine if isinstance(each, ParkedReceipt) else theirs).append(each)
        lost: list[Receipt] = [*self.inner.extend(theirs, lease_s)] if theirs else []
        gone = self._parked.extend(mine, lease_s) if mine else ()
        for receipt in gone:
            self._held.pop(receipt, None)
        return [*lost, *gone]

    def note_repeats(self, deliveries: Sequence[Delivery]) -> None:
        """As `NotesRepeats.note_repeats`, where the log can."""
        if isinstance(self.inner, NotesRepeats):
            self.inner.note_repeats(deliveries)

    def close(self) -> None:
        """As `Subscription.close`: whether what is held still was started nobody can say."""
        self._closed = True
        held, self._held = self._held, {}
        try:
            if held:
                self._parked.give_back([Release(receipt, started=True) for receipt in held])
        except (BrokerError, CommitUnknown) as error:
            log.warning("consumer %s: %d parked messages come again when their leases are over: %s",
                        self._consumer, len(held), error)  # fmt: skip
        finally:
            self.inner.close()


def scope_of(
    consumer: Consumer, admission: Admission | None, parking: Parking | None
) -> Scope | None:
    """For whom a lane's transactions admit; None: it has none."""
    if admission is None:
        return None
    return Scope(
        consumer.name,
        admission,
        consumer.options.inbox_retention_s,
        consumer.options.max_run_s,
        parks=parking is not None and parking.parks,
        buries=parking is not None and parking.buries,
    )

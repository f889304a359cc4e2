"""A lane: one claim after another of one consumer, as a state machine.

`Lane.step` makes one step and returns how long to pause before the next; threads, the event
loop and processes only drive it, and a simulation drives it with a clock of its own. A round
(`duly.worker.rounds`) says in which order things happen for each guarantee; the lane gives it
the verbs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Generator, Sequence
from math import inf
from typing import Any, cast

from duly import errors, events
from duly.broker import Ahead, ClaimsAhead, Delivery, Receipt, Subscription
from duly.consumer import Consumer
from duly.guarantees import Admission, Done, Guarantee, Release, Settlement
from duly.store import (
    Admitted,
    BeginsOnLoop,
    Session,
    Store,
    Transaction,
    take_after_commit,
)
from duly.worker import rounds
from duly.worker.admission import remembered, suppressed
from duly.worker.ahead import claim_apart, offered
from duly.worker.calling import Caller
from duly.worker.decoding import Decoder
from duly.worker.failing import Failures
from duly.worker.parking import Parking, scope_of
from duly.worker.pausing import Pausing
from duly.worker.steps import (
    NO_WORK,
    Blocked,
    Counts,
    Pause,
    Round,
    Step,
    Surroundings,
    Unfit,
    Work,
    by_key,
    by_partition,
    describe,
)

log = logging.getLogger("duly.worker")

# How long a lane waits when the broker or store cannot be used, first and at most.
FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 5.0
# How many rounds after a failure keep a savepoint per message: a failure seldom comes alone,
# and without savepoints each costs a second run of its whole batch.
CAREFUL_ROUNDS = 16

ROUNDS: dict[Guarantee, Callable[[Lane], Round]] = {
    Guarantee.AT_MOST_ONCE: rounds.at_most_once,
    Guarantee.AT_LEAST_ONCE: rounds.at_least_once,
    Guarantee.EXACTLY_ONCE: rounds.exactly_once,
}


class Lane:
    """One consumer's handler, one subscription of its own, and for exactly-once a store.

    ``call`` is the handler with its dependencies bound.
    """

    def __init__(
        self,
        consumer: Consumer,
        subscription: Subscription,
        call: Callable[..., Any],
        around: Surroundings,
        *,
        store: Store | None = None,
        admission: Admission | None = None,
        retries_in_place: bool = False,
    ) -> None:
        self.consumer = consumer
        self.subscription = subscription
        self.claims_ahead = subscription if isinstance(subscription, ClaimsAhead) else None
        self._remembered = remembered(admission, subscription)
        self._pausing = Pausing(consumer.name, subscription)
        self.around = around
        self.caller = Caller(
            consumer, call, around, inside=store.capabilities.database if store else None
        )
        self.counts = Counts()
        failures = Failures(consumer, around, self.counts)
        # Verbs of a round: how a message ends whose handler failed.
        self.failure = failures.settlement
        self.report_failure = failures.report
        # Claimed and unsettled: what a round is working on, and what it left for later.
        self.in_round = NO_WORK
        self.pending = NO_WORK
        # What waits behind a failure, for as long as the messages claimed with it are worked on:
        # what one round left unstarted must not overtake in the next. None: no order to keep.
        self.order: Blocked | None = None
        # Rounds to go with a savepoint per message, and messages to go one per transaction.
        self.careful = 0
        self.singly = 0
        # Whether handlers may leave savepoints open: then each runs within one of duly's.
        self.leaves_savepoints = False
        # Messages that were started in this round, and those that have their permit to.
        self.starts = self._permitted = 0
        # Rounds to go in which nothing is claimed ahead.
        self.apart = 0
        self._store = store
        self.admission = admission
        parking = subscription if isinstance(subscription, Parking) else None
        # Whether a retry is recorded in the store, behind which its log goes on.
        self.parks = parking is not None and parking.parks
        if parking is not None:
            parking.serves(self)
        self._scope = scope_of(consumer, admission, parking)
        limit = store.capabilities.savepoints if store else None
        self.most_savepoints = inf if limit is None else limit
        # In a row, by what was nobody's fault.
        self.interruptions = 0
        self._group = (
            by_partition
            if retries_in_place and not self.parks
            else by_key
            if consumer.options.order_by_key
            else None
        )
        self._tx_s = consumer.options.tx_s or (store.capabilities.tx_s if store else 1.0)
        self.decoder = Decoder(consumer)
        self._round_of = ROUNDS[consumer.guarantee]
        self._round: Round | None = None
        self._kept = NO_WORK
        self._pause_s = FIRST_PAUSE_S
        # How long the calls of the last round took together.
        self.calls_s = inf
        # When what is worked on was claimed, and what was claimed ahead of it.
        self.claimed_at = self.ahead_at = 0.0

    # --- driving

    def step(self, *, through: bool = False) -> float:
        """Make one step; returns the seconds to pause before the next. ``through``: all steps of
        the round, or to a pause in it, for who lets nothing come between two.

        A handler's failure, a lost claim or an unusable broker end a round, never the lane.
        Whatever else is raised ends the lane: then it must not settle anything any more. So does
        `SubscriptionEnded`, where waiting is no use.
        """
        pause_s = self._step(through)
        if self._round is None and self.around.permits is not None:
            # A permit for each start: back go those of messages that did not start, and what
            # starts again takes another.
            self.around.permits.give_back(self._permitted - self.starts - len(self.pending))
            self._permitted, self.starts = len(self.pending), 0
        return pause_s

    def _step(self, through: bool) -> float:
        if self._round is None:
            self._round = self._round_of(self)
        try:
            step = self.caller.advance(self._round)
            while through and step is None:
                step = self.caller.advance(self._round)
        except StopIteration:
            self.end_round()
            if not self.interruptions:
                self._pause_s = FIRST_PAUSE_S
            return 0.0
        except errors.SubscriptionEnded:
            raise
        except errors.BrokerError as error:
            self.end_round()
            return self.pause_after(error).seconds
        except errors.TransactionError as error:
            # At-most-once, of a settlement that is not confirmed: what may be settled starts here
            # only where that is known. What is not settled comes again.
            log.warning(
                "consumer %s: %d messages are not started, and may not come again",
                self.consumer.name, len(self.in_round),
            )  # fmt: skip
            self.end_round()
            return self.pause_after(error).seconds
        except asyncio.CancelledError:
            # By the worker, whose time is over. That is no failure of the message: nothing is
            # settled, and it comes again.
            log.warning("consumer %s: the handler was cancelled", self.consumer.name)
            self._round.close()
            self._kept = NO_WORK
            self.end_round()
            return 0.0
        except BaseException:
            self._round.close()  # rolls an open transaction back, settles nothing
            raise
        return 0.0 if step is None else step.seconds

    def end_round(self) -> None:
        """Forget the round; what it left unstarted stays claimed for the next."""
        self._round = None
        self.caller.forget()
        self.pending = self._kept.then(self.pending)
        self._kept = self.in_round = NO_WORK

    def pause_after(self, error: Exception) -> Pause:
        """How long to leave a broker or store alone that cannot be used; longer each time."""
        log.warning("consumer %s pauses %.2f s: %s", self.consumer.name, self._pause_s, error)
        pause = Pause(self._pause_s * (1 - 0.5 * self.around.roll()))
        self._pause_s = min(self._pause_s * 2, LONGEST_PAUSE_S)
        return pause

    def idle(self) -> bool:
        """Whether the lane stands between two rounds."""
        return self._round is None

    def oldest_start(self) -> float | None:
        """The clock's time at which the call now under way began; None between rounds."""
        return self.caller.oldest_start()

    @property
    def stopping(self) -> bool:
        """Whether no further handler may start."""
        return self.caller.stopping

    def stop(self) -> None:
        """Start no further handler, from any thread; what is pending `close` gives back."""
        self.caller.stop()

    def close(self) -> None:
        """Give back what was claimed and never started, uncharged.

        What waits for the next round certainly did not start, so it comes again as if for the
        first time; of anything else that is still claimed nobody can say so.
        """
        if self.pending:
            never_started = [Release(receipt) for receipt in self.pending.receipts()]
            self.pending = NO_WORK
            with contextlib.suppress(errors.BrokerError, errors.CommitUnknown):
                self.subscription.settle(never_started)
        self.subscription.close()

    def receipts(self) -> list[Receipt]:
        """What is claimed and not settled, for whoever extends the leases."""
        return self.in_round.receipts() + self.pending.receipts()

    # --- verbs of a round: taking

    def take(self) -> Generator[Step, None, Work]:
        """Messages to work on: those left over, or a new claim. Empty while stopping."""
        work = self.claim(self.consumer.options.batch, self.around.wait_s)
        yield None if work else Pause(0.02 if self.around.permits else 0.0)
        return work

    def claim(self, limit: int, wait_s: float) -> Work:
        """Up to ``limit`` messages: those left over, or new ones within ``wait_s`` seconds."""
        if self.stopping:
            return NO_WORK
        permits = self.around.permits
        if self.caller.leases_lost:
            self._drop_lost()
        if self.pending:
            if permits is not None and permits.are_owed:
                return NO_WORK  # it starts again, and more has started than may
            self.in_round, self.pending = self.pending, NO_WORK
            return self.in_round
        if permits is not None:
            limit = permits.take(limit)
        if not limit:
            return NO_WORK
        claimed: Sequence[Delivery] = ()
        self.claimed_at = self.around.clock()
        try:
            claimed = self.subscription.claim(limit, self.consumer.options.batch_bytes, wait_s)
            self._pausing.look()
        finally:
            if permits is not None:
                permits.give_back(limit - len(claimed))
                self._permitted += len(claimed)
        self.in_round = self._received(claimed)
        return self.in_round

    def _drop_lost(self) -> None:
        """Forget what another has by now: it is not to be started here too."""
        self.caller.leases_lost = False
        receipts = self.pending.receipts()
        if not receipts:
            return
        try:
            lost = set(self.subscription.extend(receipts, self.consumer.options.lease_s))
        except BaseException:
            self.caller.leases_lost = True
            raise
        if len(lost) == len(receipts):
            self.pending = NO_WORK
        elif lost:
            self.pending = self.pending.only(lambda delivery, _: delivery.receipt not in lost)

    def _received(self, claimed: Sequence[Delivery]) -> Work:
        if not claimed:
            return NO_WORK
        self.order = self.blocked()
        self.counts.claimed += len(claimed)
        if self.around.watchers:
            self.tell(events.Claimed(self.consumer.name, claimed))
        return self.decoder.work(claimed)

    def receive(self, ahead: Ahead | None) -> None:
        """Keep for the next round what was claimed ahead; the transaction stands."""
        if ahead is None:
            return
        try:
            self.pending = self._received(ahead.deliveries())
            self.claimed_at = self.ahead_at
        except (errors.BrokerError, errors.CommitUnknown) as error:
            # This round is settled, and what it started goes on; these come again.
            log.warning("consumer %s: what it claimed next is lost: %s", self.consumer.name, error)

    def until(self) -> float:
        """The clock's time at which no further handler should start in this round, to be
        compared with `Caller.moment`.
        """
        return self.around.clock() + self._tx_s

    def blocked(self) -> Blocked | None:
        """Keeps the order behind failed messages; None where no order is declared."""
        if self._group is None:
            return None
        return Blocked(self._group, self.consumer.options.hold_key_on_dead)

    def order_of(self, work: Work) -> Blocked | None:
        """The order to keep within ``work`` where all of it goes well: None, unless something
        waits already, or part of it cannot be handled at all.
        """
        order = self.order
        if order is None or order.holds_any():
            return order
        if work.plain and not (work.decode and self.consumer.options.hold_key_on_dead):
            return None  # what cannot be decoded is dead, and holds nothing
        return order if any(argument.__class__ is Unfit for _, argument in work) else None

    def hold_behind(self, work: Work) -> None:
        """What was claimed with these and comes after them must wait until they come again."""
        if self.order is not None:
            for delivery, _ in work:
                self.order.hold_behind(delivery)

    def keep(self, rest: Work) -> None:
        """What was not started stays claimed, for the next round."""
        self._kept = rest

    def left(self) -> int:
        """How many messages this round keeps for the next."""
        return len(self._kept)

    def be_careful(self, error: BaseException) -> None:
        """After a failure: savepoints, or single calls, for this and the next rounds."""
        log.info(
            "consumer %s goes message by message after %s", self.consumer.name, describe(error)
        )
        self.careful = CAREFUL_ROUNDS + 1

    # --- verbs of a round: settling

    def settle(
        self, settlements: Sequence[Settlement], handled: int, *, claims: int = 0
    ) -> Generator[Step, None, None]:
        """Settle what ran, trying until the broker answers: running it again helps nobody.

        ``handled`` messages of it are counted. ``claims``: so many of the next may be claimed
        with it.
        """
        if not settlements:
            return
        ahead = offered(self, claims) if claims else None
        start = self.around.clock()
        while True:
            try:
                refused = self.settle_with(settlements, ahead)
                break
            except errors.BrokerUnusable as error:
                if ahead is None:
                    raise
                # Perhaps for what was to be claimed: that is not to undo what was handled.
                ahead = None
                claim_apart(self, error)
            except (errors.BrokerUnavailable, errors.CommitUnknown) as error:
                ahead = None
                # Settling twice is harmless: the receipt fences the second time.
                yield self.pause_after(error)
        self.receive(ahead)
        self.tell_settled(settlements, refused, start)
        self.counts.handled += handled
        if self.careful:
            self.careful -= 1

    def settle_with(
        self, settlements: Sequence[Settlement], ahead: Ahead | None
    ) -> Sequence[Receipt]:
        """Settle once, and make the next claim with it; returns the refused."""
        if ahead is None or self.claims_ahead is None:
            return self.subscription.settle(settlements)
        return self.claims_ahead.settle_and_claim(settlements, ahead)

    def give_back(self, work: Work, rest: Work) -> Generator[Step, None, None]:
        """Release messages whose fate another claim must find out, and a rest that has not
        started; uncharged, fenced.
        """
        released = [Release(receipt, True) for receipt in work.receipts()]
        yield from self.settle([*released, *map(Release, rest.receipts())], 0)

    def tell_settled(
        self,
        settlements: Sequence[Settlement],
        refused: Sequence[Receipt] | set[Receipt],
        start: float | None = None,
    ) -> None:
        """Tell the watchers what was settled, and the log what was refused."""
        if refused:
            self.counts.refused += len(refused)
            log.warning(
                "consumer %s: %d settlements refused, their lease was lost to another worker",
                self.consumer.name, len(refused),
            )  # fmt: skip
            self.tell(events.SettleRefused(self.consumer.name, tuple(refused)))
        if self.around.watchers:
            seconds = 0.0 if start is None else self.around.clock() - start
            self.tell(events.Settled(self.consumer.name, settlements, tuple(refused), seconds))

    # --- verbs of a round: transactions

    def share_for_transaction(self, work: Work) -> Work:
        """The part of ``work`` for one transaction: all, or one message while going singly."""
        if self.singly and len(work) > 1:
            self.pending = work[1:]
            self.in_round = work = work[:1]
        elif len(work) == 1 and not self.careful:
            # Alone, the culprit is known: a savepoint saves it the second run.
            self.careful = 1
        return work

    def begin(self) -> Session[Any]:
        """Open a transaction for this consumer."""
        store, on_loop = self._store, self.around.on_loop
        assert store is not None, "exactly-once without a store passed the contract"
        try:
            if on_loop is not None and store.capabilities.async_connections:
                # Between calls the round comes back to this thread, which waits for the loop.
                self.caller.only_calls_on_loop = True
                return cast(BeginsOnLoop, store).begin_on_loop(self._scope, on_loop)
            return store.begin(self._scope)
        except errors.BrokerError:
            self._kept = self.in_round
            raise

    def committed(
        self,
        tx: Transaction[Any],
        published: int,
        admitted: Admitted,
    ) -> None:
        """The transaction stands: count it, tell it, and make the calls that waited for it."""
        count = len(admitted.fresh) - len(self._kept)
        self.interruptions = 0
        self.counts.commits += 1
        self.counts.handled += count
        self.counts.published += published
        self.careful = max(0, self.careful - 1)
        self.singly = max(0, self.singly - 1)
        suppressed(self, admitted.repeated)
        if self.around.watchers:
            self.tell(events.Committed(self.consumer.name, count, published))
        for call in take_after_commit(tx):
            try:
                call()
            except Exception:
                log.exception("after_commit of consumer %s failed", self.consumer.name)

    def settle_after_commit(self, settlements: Sequence[Settlement]) -> Generator[Step, None, None]:
        """Tell the broker how messages ended, where the transaction did not do that itself."""
        done = [each for each in settlements if isinstance(each, Done)]
        if self.admission is Admission.BY_CLAIM:
            self.tell_settled(settlements, ())
        elif self._remembered is not None and len(done) == len(settlements):
            self.tell_settled(settlements, self._remembered.settle_remembered(done))
        else:
            yield from self.settle(settlements, 0, claims=self.consumer.options.batch)

    def tell(self, event: events.Event) -> None:
        """Show an event to the watchers, if there are any."""
        if self.around.watchers:
            events.tell(self.around.watchers, event)

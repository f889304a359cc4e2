"""`Lane`: claims from what was fetched, and settles it."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Protocol

from duly.broker import Delivery, LogPosition, SubscribeOptions
from duly.brokers.kafka.choice import Choice
from duly.brokers.kafka.ending import (
    STRAY,
    STRAYS,
    Aside,
    Ending,
    RunEnding,
    aside,
    asides,
)
from duly.brokers.kafka.held import Held, Taken, endings_of, held_by
from duly.brokers.kafka.intake import Intake
from duly.brokers.kafka.producer import Sending
from duly.brokers.kafka.receipt import Receipt, SpanReceipt
from duly.brokers.kafka.runs import Claim, Run
from duly.brokers.kafka.share import Item, Share
from duly.brokers.kafka.span import Part, RunSpan, takes_spans
from duly.brokers.kafka.transacted import Transacted
from duly.errors import (
    BrokerError,
    BrokerUnavailable,
    CommitUnknown,
    Superseded,
    TransactionFailed,
)
from duly.guarantees import Dead, Done, Guarantee, Settlement

log = logging.getLogger("duly.kafka")

_tokens = itertools.count(1)

# What the cluster has to give arrives at once, unless the machine is busy.
_ARRIVAL_S = 5.0
# Leases and what comes due are looked at so often by a claim that waits.
_LOOKS_S = 1.0


class Surroundings(Protocol):
    """What a lane needs of its broker."""

    clock: Callable[[], float]

    def put_aside(self, intake: Intake, asides: Sequence[Aside]) -> None:
        """Keep these elsewhere, durably on return. Raises `BrokerError`."""
        ...

    def letters(self, subscription: str, asides: Sequence[Aside]) -> Sequence[Sending]:
        """The records of their dead letters, for a transaction to store."""
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
        self._choice = Choice(intake, topics, as_runs=takes_spans(options, topics))
        self._closed = False
        self._last = 1
        # At-most-once is settled before it is started: nobody need know who died with it.
        self._announces = options.guarantee is not Guarantee.AT_MOST_ONCE
        with intake.changed:
            intake.lanes.add(number)

    # --- claiming

    def claim(self, limit: int, max_bytes: int, wait_s: float) -> Sequence[Delivery]:
        """As `Subscription.claim`. Waits in real time, whatever the injected clock says."""
        deadline = time.monotonic() + wait_s
        asked = False
        self.intake.commits.decide()
        while not self._closed:
            if self.intake.failed is not None:
                raise self.intake.failed
            taken = self._take(limit, max_bytes)
            if taken.wrong or taken.strays:
                self._pass_on(taken)
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

    def _take(self, limit: int, max_bytes: int) -> Taken:
        intake, now = self.intake, self._broker.clock()
        taken = Taken(Claim(next(_tokens), self.number, now + self._options.lease_s))
        with intake.changed:
            if not self._closed:
                intake.wake()
                self._choice.take(taken, limit, max_bytes, now)
        return taken

    def _hand_out(self, taken: Taken) -> Sequence[Delivery]:
        """Say who is about to start them, where it has to be known if this process dies."""
        intake = self.intake
        self._last = len(taken)
        if self._announces:
            with intake.changed:
                for share, offset in taken.ends():
                    share.announce(offset)
            self._announce(taken)
        with intake.changed:
            if taken.runs:
                return self._span(taken)
            return [
                self._delivery(share, item)
                for share, item in taken.items
                if item.token and share.generation in intake.by_generation
            ]

    def _announce(self, taken: Taken) -> None:
        with self.intake.changed:
            untold = {share.generation: share for share in taken.untold()}
        if not untold:
            return
        try:
            self.intake.commits.ask(untold.values())
        except BaseException as error:
            with self.intake.changed:
                for share, item in taken.items:
                    if item.token and share.generation in self.intake.by_generation:
                        item.charged -= item.alone
                        share.back(item)
                for share, run in self._still(taken):
                    share.back_run(run)
            if isinstance(error, CommitUnknown):
                raise BrokerUnavailable(f"nothing was claimed: {error}") from error
            raise

    def _still(self, taken: Taken) -> list[tuple[Share, Run]]:
        """The runs that the claim holds by now."""
        return [
            (share, run)
            for share, run in taken.runs
            if run.token == taken.claim.token and share.generation in self.intake.by_generation
        ]

    def _span(self, taken: Taken) -> Sequence[Delivery]:
        there = self._still(taken)
        if not there:
            return ()
        first = there[0][1]
        bodies = first.bodies if len(there) == 1 else [b for _, run in there for b in run.bodies]
        parts = [Part.of(share.generation, share.log, run) for share, run in there]
        return RunSpan(self.intake.number, taken.claim.token, parts, bodies, first.repeated)

    def _delivery(self, share: Share, item: Item) -> Delivery:
        message = item.message
        assert message is not None, "what cannot be read is not handed out"
        return Delivery(
            message,
            Receipt(self.intake.number, share.generation, item.offset, item.token),
            item.charged if item.alone else item.charged + 1,
            item.repeated,
            item.suspect and share.suspects.come_alone,
            LogPosition(share.log_of(item), item.offset, item.epoch),
            item.replays,
        )

    def _pass_on(self, taken: Taken) -> None:
        """What cannot be read becomes a dead letter. What nobody reads here comes again later, for
        a process that does: behind it others would wait for ever.
        """
        intake, given = self.intake, [*taken.wrong, *taken.strays]
        if topics := sorted({item.declared.name for _, item in taken.strays}):
            log.warning(
                "subscription %r: %d messages of %s wait to be tried again, and this process does "
                "not consume that: %s", intake.subscription, len(taken.strays), topics, STRAYS,
            )  # fmt: skip
        try:
            if isinstance(intake.commits, Transacted):
                self._bury_in_transaction(intake.commits, given)
                return
            self._broker.put_aside(intake, taken.asides())
        except BrokerError:
            self._give_back(given)
            raise
        with intake.changed:
            for share, item in given:
                if share.generation in intake.by_generation:
                    share.done(item)
        intake.commits.ask([share for share, _ in given])

    def _give_back(self, given: Sequence[tuple[Share, Item]]) -> None:
        """These are not settled, and nobody's."""
        with self.intake.changed:
            for share, item in given:
                if item.token and share.generation in self.intake.by_generation:
                    share.back(item)

    def _bury_in_transaction(
        self, commits: Transacted, given: Sequence[tuple[Share, Item]]
    ) -> None:
        try:
            self._transact(
                commits,
                [Ending(Dead(None, i.wrong or STRAY), share, i, i.token) for share, i in given],
            )
        except Superseded as error:
            log.debug("subscription %r: %s", self.intake.subscription, error)
        except CommitUnknown as error:
            raise BrokerUnavailable(f"nothing was claimed: {error}") from error
        except BaseException:
            self._give_back(given)
            raise

    def _wait(self, left_s: float) -> None:
        intake = self.intake
        with intake.changed:
            if self._closed or intake.failed is not None:
                return
            now = self._broker.clock()
            shares = [*intake.shares.values()]
            times = [item.until - now for share in shares for item in share.claimed.values()]
            times += [run.until - now for share in shares for run in share.runs.claimed.values()]
            dues = [share.next_due() for share in shares]
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

    # --- settling

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[Any]:
        """As `Subscription.settle`: returns when the group has it."""
        intake = self.intake
        if isinstance(intake.commits, Transacted):
            return self._settle_in_transaction(intake.commits, settlements)
        with intake.changed:
            held = held_by(intake, settlements)
        if not held:
            return held.refused
        self._put_aside(held)
        with intake.changed:
            applied = held.apply(intake.by_generation, self._broker.clock())
            shares = {share.generation: share for share, _ in applied}
            for share in shares.values() if self._announces else ():
                share.foresee(self._last)
            intake.changed.notify_all()
        lost = intake.commits.ask(shares.values(), settling=True)
        for share, receipt in applied:
            if share.generation in lost:
                held.refused += receipt.each() if isinstance(receipt, SpanReceipt) else [receipt]
        return held.refused

    @property
    def settles_remembered(self) -> bool:
        """As `SettlesRemembered.settles_remembered`: where no transaction commits positions."""
        return not isinstance(self.intake.commits, Transacted)

    def settle_remembered(self, settlements: Sequence[Done]) -> Sequence[Any]:
        """As `SettlesRemembered.settle_remembered`: the group's position follows."""
        intake = self.intake
        assert not isinstance(intake.commits, Transacted), "whoever asks has looked"
        with intake.changed:
            held = held_by(intake, settlements)
            applied = held.apply(intake.by_generation, self._broker.clock())
            for share in {share.generation: share for share, _ in applied}.values():
                # When the next claim is made this may still be on its way: so it is about the one
                # after that too.
                share.foresee(2 * self._last)
            if applied:
                intake.commits.say()
        return held.refused

    def _settle_in_transaction(
        self, commits: Transacted, settlements: Sequence[Settlement]
    ) -> Sequence[Any]:
        """Together with the dead letters among them. Once it is known what became of the commits
        before: these may be about the same, and are refused until then.
        """
        commits.decide()
        while True:
            with self.intake.changed:
                accepted, refused = endings_of(self.intake, settlements)
            if not accepted:
                return refused
            try:
                self._transact(commits, accepted)
                return refused
            except Superseded as error:
                log.debug("subscription %r: %s", self.intake.subscription, error)

    def _transact(self, commits: Transacted, ended: Sequence[Ending | RunEnding]) -> None:
        try:
            commits.transact(ended, self._broker.letters(self.intake.subscription, asides(ended)))
        except TransactionFailed as error:
            raise BrokerUnavailable(f"nothing was settled: {error}") from error

    def _put_aside(self, held: Held) -> None:
        asides = [each for s, share, item in held.items if (each := aside(s, share, item))]
        if not asides:
            return
        try:
            self._broker.put_aside(self.intake, asides)
        except BaseException as error:
            with self.intake.changed:
                held.settling(False)
            if isinstance(error, BrokerError):
                raise BrokerUnavailable(f"nothing was settled: {error}") from error
            raise

    def extend(self, receipts: Iterable[Any], lease_s: float) -> Sequence[Any]:
        """As `Subscription.extend`. The group holds what is assigned for as long as this process
        is heard of: leases are this process's own.
        """
        lost = []
        until = self._broker.clock() + lease_s
        with self.intake.changed:
            for receipt in receipts:
                if isinstance(receipt, SpanReceipt):
                    runs, rest = self.intake.held_of(receipt)
                    for _, run in runs:
                        run.until = until
                    if self.extend(rest, lease_s):
                        lost.append(receipt)
                elif (held := self.intake.held(receipt)) is None:
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
            intake.lanes.discard(self.number)
            for share in intake.shares.values():
                # What a transaction is about that is not over is held until it is known.
                mine = [i for i in share.claimed.values() if i.lane == self.number]
                for item in () if share.busy else mine:
                    item.charged -= item.alone
                    share.give_up(item)
                runs = [run for run in share.runs.claimed.values() if run.lane == self.number]
                for run in () if share.busy else runs:
                    share.back_run(run, started=True)
            intake.changed.notify_all()
        self._broker.leave(self)

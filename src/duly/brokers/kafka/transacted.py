"""`Transacted`: positions of one subscription, each committed by a transaction of Kafka's.

In one transaction with them goes what was published while the messages before them were handled,
and the dead letters. Of a partition in a transaction nothing else is committed until that is over:
Kafka keeps the position that was written last, also where its transaction ended first.

Which member of the group it is that commits, the thread that polls tells (``group``). It asks the
driver where rebalances are told, so that what it is told is never of a later generation than that
in which this process has the partitions it has: an earlier one the cluster refuses. The driver
itself is no help there. A member that was thrown out is nobody for a moment, and of nobody the
cluster takes any position.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from confluent_kafka import TopicPartition

from duly.brokers.kafka.commits import Awaits
from duly.brokers.kafka.doubt import Doubt
from duly.brokers.kafka.ending import Ending, Endings, RunEnding
from duly.brokers.kafka.membership import is_member
from duly.brokers.kafka.notes import Foretold, as_text, in_text
from duly.brokers.kafka.positions import Positions
from duly.brokers.kafka.producer import Sending
from duly.brokers.kafka.producers import Producers
from duly.brokers.kafka.share import Share
from duly.brokers.kafka.transactions import TransactionalProducer
from duly.errors import (
    BrokerError,
    BrokerUnavailable,
    BrokerUnusable,
    CommitUnknown,
    Superseded,
    TransactionError,
    TransactionInterrupted,
)

log = logging.getLogger("duly.kafka")

# How long to say again what a group that is being dealt out anew refuses.
_AGAIN_S = 30.0
_STEP_S = 0.05


class Transacted:
    """In place of `duly.brokers.kafka.commits.Commits`. ``changed`` locks ``shares``, which are by
    generation.
    """

    def __init__(
        self,
        subscription: str,
        changed: threading.Condition,
        shares: Mapping[int, Share],
        clock: Callable[[], float],
        wall_ms: Callable[[], int],
        producers: Producers,
        positions: Positions,
    ) -> None:
        self.active_s = time.monotonic()
        self._subscription = subscription
        self._changed = changed
        self._shares = shares
        self._clock = clock
        self._wall_ms = wall_ms
        self._producers = producers
        self._positions = positions
        self._group = b""
        self._doubts: list[Doubt] = []
        self._unblocked = 0
        self._ended = False

    # --- on the thread that polls

    @property
    def awaits(self) -> Awaits:
        """A transaction is asked for on the thread of who waits for it."""
        return Awaits.NOTHING

    def rest(self, seconds: float) -> None:
        """Wait for that long, or until something changes."""
        with self._changed:
            self._changed.wait(seconds)

    def serve(self, consumer: Any) -> None:
        """Find out who commits, where it is not known."""
        if not self._group:
            self.rebalanced(consumer)

    def rebalanced(self, consumer: Any) -> None:
        """Who commits is another from now on, or may be."""
        group = consumer.consumer_group_metadata()
        with self._changed:
            self._group = group if is_member(group) else b""
            self._changed.notify_all()

    def lost(self) -> None:
        """Whoever waits looks by itself which partitions there are."""

    def take_over(
        self, given: Sequence[TopicPartition], takers: Callable[[], Iterable[str]]
    ) -> None:
        """End what those left open who had these before, as positions and ``takers`` name them:
        until then nobody knows where to go on. Where that fails, the cluster ends it by itself,
        after a while.
        """
        self._unblocked = 0
        names = {(each.topic, each.partition) for each in given}
        try:
            told = self._positions.now(names) if names else {}
            owners = {in_text(text, at).owner for at, text in told.values()}
            self._producers.end_those_of({*owners, *takers()} if names else owners)
        except BrokerError as error:
            log.warning("subscription %r: waiting for others: %s", self._subscription, error)

    def unblock(
        self,
        consumer: Any,
        given: Sequence[TopicPartition],
        takers: Iterable[str],
        goes_on: Callable[[], bool],
    ) -> None:
        """Nobody is told where the group stands: end what a dead process may have left open that
        Kafka has forgotten, also of those that never committed a position. Each time others are
        tried, as long as it ``goes_on``.
        """
        group: bytes = consumer.consumer_group_metadata()
        try:
            told = self._positions.now({(each.topic, each.partition) for each in given})
            owners = {in_text(text, at).owner for at, text in told.values()}
            places = [TopicPartition(each.topic, each.partition, 0) for each in given]
            self._unblocked += self._producers.end_standing_positions(
                owners | {*takers}, places, group, self._unblocked, goes_on
            )
        except BrokerError as error:
            log.warning("subscription %r: waiting for others: %s", self._subscription, error)

    def begin(self, consumer: Any, places: Sequence[TopicPartition]) -> None:
        """Commit the first positions that there ever were, by a transaction, too: nothing but these
        is then committed of this group. Raises `BrokerUnavailable`: ask again where they stand.
        """
        group: bytes = consumer.consumer_group_metadata()
        if not is_member(group):
            raise BrokerUnavailable("this process is no member of its group any more")
        try:
            with self._producers.one() as producer:
                self._carry_out(producer, (), places, group)
        except (TransactionError, Superseded) as error:
            raise BrokerUnavailable(
                f"subscription {self._subscription!r} has not begun: {error}"
            ) from error

    def answered(self, error: Any, places: Any) -> None:
        """The consumer itself commits nothing."""

    def surely(self, consumer: Any, shares: Sequence[Share]) -> None:  # noqa: ARG002 - seam
        """Commit what is settled of these, which are given up. What a transaction that is not over
        says of one stays as it is: whoever is given it waits for the end of that.
        """
        with self._changed:
            mine = [share for share in shares if not share.busy]
            for share in mine:
                share.busy = True
            group = self._group
            places = [self._place(share, self._as_it_is(share, leaving=True)) for share in mine]
        try:
            if places and group:
                with self._producers.one() as producer:
                    self._carry_out(producer, (), places, group)
        except (BrokerError, TransactionError, Superseded) as error:
            log.warning("subscription %r: not handed over in order: %s", self._subscription, error)
        finally:
            self._free(mine)

    def end(self) -> None:
        """Nothing more is committed: what is not settled by now is others'."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    # --- on lanes' threads

    def ask(self, shares: Iterable[Share]) -> set[int]:
        """Commit what is known of these; the generations of those that others have by now.

        Raises `CommitUnknown`: the next commit says so again.
        """
        shares = list(shares)
        until = time.monotonic() + _AGAIN_S
        with self._producers.one() as producer:
            while True:
                group, mine = self._ours(shares, until)
                if not mine:
                    return {share.generation for share in shares}
                try:
                    self._announce(producer, group, mine)
                    return {share.generation for share in shares if share not in mine}
                except (BrokerError, TransactionError, Superseded) as error:
                    # Unknown or not: to say it again, by the same producer, changes nothing else.
                    self._take_breath(error, until)

    def _ours(self, shares: Sequence[Share], until: float) -> tuple[bytes, list[Share]]:
        """Those that are still this process's, for this thread to commit, and as whom."""
        with self._changed:
            while True:
                mine = [share for share in shares if share.generation in self._shares]
                if self._group and not any(share.busy for share in mine):
                    for share in mine:
                        share.busy = True
                    return self._group, mine
                if not mine:
                    return b"", mine
                self._wait(until)

    def _wait(self, until: float) -> None:
        """For something to change; with the lock held."""
        if self._ended or not self._changed.wait(max(0.0, until - time.monotonic())):
            raise CommitUnknown(
                f"subscription {self._subscription!r}: Kafka has not confirmed a position within "
                f"{_AGAIN_S:.0f} s"
            )

    def _take_breath(self, error: Exception, until: float) -> None:
        log.debug("subscription %r: committing again: %s", self._subscription, error)
        with self._changed:
            if isinstance(error, BrokerUnusable) or self._ended or time.monotonic() > until:
                raise CommitUnknown(
                    f"subscription {self._subscription!r}: a position is not committed: {error}"
                ) from error
            self._changed.wait(_STEP_S)

    def _announce(
        self, producer: TransactionalProducer, group: bytes, mine: Sequence[Share]
    ) -> None:
        try:
            with self._changed:
                told = [(s, s.version, s.announced, s.telling.doubts) for s in mine]
                places = [self._place(share, self._as_it_is(share)) for share in mine]
            self._carry_out(producer, (), places, group)
            with self._changed:
                for share, version, announced, doubts in told:
                    share.committed = max(share.committed, version)
                    share.telling.told(announced, doubts)
        finally:
            self._free(mine)

    def transact(self, ended: Sequence[Ending | RunEnding], sendings: Sequence[Sending]) -> None:
        """Commit that these claims have ended so, together with these records; then they have.

        Raises `Superseded` where a claim was lost, and `TransactionFailed` or `BrokerError` where
        nothing was committed: the claims are as they were. After `CommitUnknown` they are held
        until it is known (`decide`).
        """
        self.active_s = time.monotonic()
        until = time.monotonic() + _AGAIN_S
        while True:
            told = self._foretell(ended, until)
            if told is None:
                self.decide()
                continue
            try:
                self._commit(ended, sendings, *told)
                return
            except Superseded as error:
                # The group is dealt out anew, or the transaction was open for too long.
                if time.monotonic() > until:
                    raise TransactionInterrupted(str(error)) from error
                log.debug("subscription %r: once more: %s", self._subscription, error)
            with self._changed:
                self._changed.wait(_STEP_S)

    def _foretell(
        self, ended: Sequence[Ending | RunEnding], until: float
    ) -> tuple[Mapping[int, tuple[Share, Foretold]], bytes] | None:
        """What to commit, and as whom, once nothing else is committed of these partitions. Both at
        one moment: told later, it might be a generation in which this process has been given the
        partitions anew. None: of one of them a commit is in doubt.
        """
        with self._changed:
            self._check_held(ended)
            while not self._group or any(each.share.busy for each in ended):
                if self._is_in_doubt(ended):
                    return None
                left_s = until - time.monotonic()
                if self._ended or left_s <= 0:
                    raise BrokerUnavailable(
                        f"subscription {self._subscription!r}: this process is no member of its "
                        "group just now, or is committing something else of these partitions; "
                        "nothing was committed"
                    )
                self._changed.wait(left_s)
                self._check_held(ended)
            now, wall_ms = self._clock(), self._wall_ms()
            ends = {each.share.generation: Endings(each.share) for each in ended}
            for each in ended:
                ends[each.share.generation].add(each, wall_ms)
                each.settling(True)
                each.share.busy = True
            foretold = {
                number: (
                    one.share,
                    one.share.foretell(
                        one.known, one.ahead, wall_ms, now, done=one.done, begun=one.begun
                    ),
                )
                for number, one in ends.items()
            }
            for _, told in foretold.values():
                told.notes.owner = self._producers.owner
            return foretold, self._group

    def _is_in_doubt(self, ended: Iterable[Ending | RunEnding]) -> bool:
        mine = {each.share.generation for each in ended}
        return any(mine & doubt.foretold.keys() for doubt in self._doubts)

    def _check_held(self, ended: Sequence[Ending | RunEnding]) -> None:
        lost = [
            each for each in ended if not each.is_held or each.share.generation not in self._shares
        ]
        if lost:
            raise Superseded(
                f"subscription {self._subscription!r}: {sum(map(len, lost))} of "
                f"{sum(map(len, ended))} claims were "
                "lost to others, or their lease is over; nothing was committed"
            )

    def _commit(
        self,
        ended: Sequence[Ending | RunEnding],
        sendings: Sequence[Sending],
        foretold: Mapping[int, tuple[Share, Foretold]],
        group: bytes,
    ) -> None:
        try:
            producer = self._producers.take()
        except BrokerError:
            self._undo(ended, foretold)
            raise
        try:
            places = [self._place(share, told) for share, told in foretold.values()]
            self._carry_out(producer, sendings, places, group)
        except CommitUnknown:
            self._doubt(Doubt(producer, ended, foretold, group))
            return
        except BaseException:
            self._producers.give_back(producer)
            self._undo(ended, foretold)
            raise
        self._producers.give_back(producer)
        self._apply(ended, foretold)

    # --- what nobody can say

    def _doubt(self, doubt: Doubt) -> None:
        """Find out, if that can be done now. Raises `CommitUnknown`, `TransactionInterrupted`."""
        try:
            stands = self._stands(doubt)
        except BrokerError as error:
            with self._changed:
                self._doubts.append(doubt)
            raise CommitUnknown(
                f"subscription {self._subscription!r}: a commit was sent and not answered. Nothing "
                f"of these partitions is started until it is known: {error}"
            ) from error
        if stands is None:
            raise CommitUnknown(
                f"subscription {self._subscription!r}: a commit was sent and not answered, and "
                "others have these partitions: where they go on tells"
            )
        if not stands:
            raise TransactionInterrupted(
                f"rolled back: subscription {self._subscription!r}: a commit was sent and not "
                "carried out"
            )

    def decide(self) -> None:
        """Find out what became of commits without an answer. Raises `BrokerUnavailable` as long as
        that cannot be done.
        """
        while True:
            with self._changed:
                if not self._doubts:
                    return
                doubt = self._doubts.pop()
            try:
                self._stands(doubt)
            except BrokerError as error:
                with self._changed:
                    self._doubts.append(doubt)
                    self._changed.notify_all()
                raise BrokerUnavailable(
                    f"subscription {self._subscription!r}: what a commit without an answer came "
                    f"to is not known yet: {error}"
                ) from error

    def _stands(self, doubt: Doubt) -> bool | None:
        """Whether it was carried out; None where others have the partitions. Nothing is assumed:
        once it is over, where the group stands tells.
        """
        told = doubt.told(self._positions)
        found: bool | None = None
        with self._changed:
            for number, (share, foretold) in doubt.foretold.items():
                if number in self._shares:
                    if share.name not in told:
                        raise BrokerUnavailable(f"the group's position in {share.name} is not told")
                    text = as_text(foretold.notes, foretold.position)
                    found = told[share.name] == (foretold.position, text)
        if found is False:
            doubt.producer.was_aborted()
        self._producers.give_back(doubt.producer)
        if found:
            self._apply(doubt.ended, doubt.foretold)
        else:
            self._undo(doubt.ended, doubt.foretold)
        return found

    # --- the parts

    def _carry_out(
        self,
        producer: TransactionalProducer,
        sendings: Sequence[Sending],
        places: Sequence[TopicPartition],
        group: bytes,
    ) -> None:
        producer.begin()
        producer.send(sendings)
        try:
            producer.send_offsets(places, group)
        except Superseded:
            with self._changed:
                if self._group == group:
                    self._group = b""  # asked for anew
            raise
        producer.commit()

    def _as_it_is(self, share: Share, *, leaving: bool = False) -> Foretold:
        notes = share.notes(self._wall_ms(), self._clock(), leaving=leaving)
        notes.owner = "" if leaving else self._producers.owner
        return Foretold(share.position, notes, share.announced, share.telling.doubts)

    def _place(self, share: Share, told: Foretold) -> TopicPartition:
        return TopicPartition(*share.name, told.position, as_text(told.notes, told.position))

    def _apply(
        self, ended: Sequence[Ending | RunEnding], foretold: Mapping[int, tuple[Share, Foretold]]
    ) -> None:
        now = self._clock()
        with self._changed:
            for each in ended:
                if each.share.generation in self._shares and each.is_held:
                    each.apply(now)
            for share, told in foretold.values():
                share.announced, share.safe = told.announced, told.position
                share.committed = share.version
                share.telling.told(told.announced, told.doubts)
            self.active_s = time.monotonic()
        self._free([share for share, _ in foretold.values()])

    def _undo(
        self, ended: Sequence[Ending | RunEnding], foretold: Mapping[int, tuple[Share, Foretold]]
    ) -> None:
        with self._changed:
            for each in ended:
                each.settling(False)
        self._free([share for share, _ in foretold.values()])

    def _free(self, shares: Iterable[Share]) -> None:
        with self._changed:
            for share in shares:
                share.busy = False
            self._changed.notify_all()

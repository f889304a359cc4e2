"""`TransactionalProducer`: one of Kafka's transactions after the other, under one id.

What the driver raises is sorted here, by what is certain:

========================  ========================================================================
`BrokerUnavailable`       nothing was begun; try again later
`BrokerUnusable`          nothing was begun, and nothing will be: not allowed, not there
`TransactionFailed`       aborted: a record was refused, which another try does not change
`TransactionInterrupted`  aborted, by no fault of its own: do it again
`Superseded`              aborted: the group has dealt out its partitions anew, or somebody else
                          has begun under the same id
`CommitUnknown`           the commit was sent, and nobody can say
========================  ========================================================================

Whichever it is, the transaction is over. A producer that the driver gave up on is thrown away;
`prepare`, and with it `begin`, makes another under the same id. That ends what the one before left
open: a commit that reached the cluster is carried through, anything else is aborted, before it
returns.

A request that the driver sends again on a new connection may reach the cluster a second time, late.
Kafka takes an old end of a transaction, or old positions, for those of whichever is open by then,
under the same producer's epoch (KIP-890; librdkafka 2.16 does not speak its second version, which
changes the epoch with each). So what has lost a connection is not used for another transaction.

Of an abort Kafka 4.3.1 may forget a partition: one that has no leader when it is to be told, as
while the only node restarts, is taken for deleted. What stands there is open for ever, and readers
of what is committed stay before it; the coordinator knows nothing of it any more. `end_standing`
ends it: the next abort under the same id is about all that its producer has open there. Where it is
a partition of `__consumer_offsets`, nobody is told any more where the group stands: `end_positions`
does the same there, by whoever cannot begin for it.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Producer, TopicPartition

from duly.brokers.kafka.address import Address
from duly.brokers.kafka.client import broker_error, log, quiet, settings
from duly.brokers.kafka.producer import SURELY, Sending
from duly.errors import (
    BrokerError,
    BrokerUnavailable,
    CommitUnknown,
    DulyError,
    Superseded,
    TransactionFailed,
    TransactionInterrupted,
)

# The group has gone on without this member, or it speaks for an earlier generation.
MOVED_ON = frozenset(
    {
        KafkaError.ILLEGAL_GENERATION,
        KafkaError.UNKNOWN_MEMBER_ID,
        KafkaError.FENCED_INSTANCE_ID,
        KafkaError.FENCED_MEMBER_EPOCH,
        KafkaError.STALE_MEMBER_EPOCH,
        KafkaError.REBALANCE_IN_PROGRESS,
    }
)
_FENCED = frozenset(
    {KafkaError._FENCED, KafkaError.PRODUCER_FENCED, KafkaError.INVALID_PRODUCER_EPOCH}
)
# How long one call of the driver's may take; only a commit waits for as long as there is time.
_CALLS_S = 10.0
_STEP_S = 0.05
# The first time; the driver doubles it, up to a second. A transaction that begins while the one
# before is being marked in its partitions has to ask again, which they nearly all have to.
_ASKS_AGAIN_MS = 5
# How long the driver may take beyond the timeout it was given.
_GRACE_S = 1.0

Standing = Callable[[Iterable[str]], Mapping[tuple[str, int], int]]
"""Of these topics the partitions where readers of what is committed do not come further, and where
they stay.
"""


class TransactionalProducer:
    """``id`` is the ``transactional.id``: who begins under it ends what others do under it, so two
    that are to work side by side have two. One thread at a time uses it.

    What a transaction stored is seen by readers of what is committed, which duly's all are, once
    it is committed. As long as one is open they see nothing behind its first record either, so
    the cluster aborts it after the address's ``transaction_timeout_s``.
    """

    def __init__(self, address: Address, id: str) -> None:
        self.id = id
        self._timeout_s = min(address.transaction_timeout_s, _CALLS_S)
        self._settings = settings(
            address.producing,
            {
                **SURELY,
                "transactional.id": id,
                # The driver bounds by it how long it tries to deliver, too.
                "transaction.timeout.ms": int(address.transaction_timeout_s * 1000),
                "retry.backoff.ms": _ASKS_AGAIN_MS,
                "logger": _Ear(self._lost_a_connection),
                "log_level": 6,
            },
        )
        self._producer: Any = None
        self._is_ready = self._is_open = False
        # Whether another transaction may follow under this id.
        self.is_clean = True
        self._sendings: list[Sending] = []
        # Topics of the transaction that is open, of one whose commit was not answered, and of
        # those that were certainly not committed.
        self._topics: set[str] = set()
        self._doubtful: set[str] = set()
        self._aborted: set[str] = set()

    def _lost_a_connection(self) -> None:
        log.debug("Kafka: %s is followed by another, because it lost a connection", self.id)
        self.is_clean = False

    def prepare(self) -> None:
        """Return when it is decided what became of all that was begun under this id before.
        Raises `BrokerUnavailable`, `BrokerUnusable`.
        """
        if self._producer is None:
            self._producer = Producer(self._settings)
        try:
            if not self._is_ready:
                # What is not done by then goes on; the next call waits for the rest.
                self._producer.init_transactions(self._timeout_s)
                self._is_ready = True
        except KafkaException as error:
            raise self._not_begun(error) from error

    def begin(self) -> None:
        """Begin a transaction. Raises `BrokerUnavailable`, `BrokerUnusable`."""
        self.prepare()
        try:
            self._producer.begin_transaction()
            self._is_open = True
        except KafkaException as error:
            raise self._not_begun(error) from error

    def _not_begun(self, error: KafkaException) -> BrokerError:
        if not error.args[0].retriable():
            self._discard()
        return broker_error(error, f"no transaction was begun as {self.id!r}")

    def send(self, sendings: Sequence[Sending]) -> None:
        """Hand over these records, in order. What becomes of them `commit` tells, and each of them
        afterwards.
        """
        for sending in sendings:
            sending.ended, sending.error = False, None  # perhaps of another try
        self._sendings += sendings
        self._topics |= {sending.topic for sending in sendings}
        until = time.monotonic() + self._timeout_s
        for sending in sendings:
            while True:
                try:
                    self._producer.produce(
                        sending.topic, sending.body, sending.key, sending.partition,
                        on_delivery=sending, timestamp=sending.stamp_ms, headers=sending.headers,
                    )  # fmt: skip
                    break
                except BufferError as error:
                    if time.monotonic() > until:
                        self.abort()
                        raise TransactionInterrupted(
                            f"rolled back: {sending.topic!r} takes no records"
                        ) from error
                    self._hear(_STEP_S)
                except KafkaException as error:
                    sending.end(error.args[0])
                    raise self._failed(error, f"a record for {sending.topic!r}") from error

    def send_offsets(self, places: Sequence[TopicPartition], group: bytes) -> None:
        """Put a group's positions into the transaction. ``group`` is what its consumer tells as
        ``consumer_group_metadata()``: of a member of the group, or nobody is fenced off by it.
        """
        call = _Bounded(
            self._producer.send_offsets_to_transaction, list(places), group, self._timeout_s
        )
        if not call.ends_within(self._timeout_s + _GRACE_S):
            # It holds the producer for as long as it lasts; another under this id ends the
            # transaction.
            self._forget()
            raise TransactionInterrupted(
                f"rolled back: its positions: the group's coordinator did not answer ({self.id!r})"
            )
        if call.error is not None:
            raise self._failed(call.error, "its positions") from call.error

    def commit(self) -> None:
        """Commit; returns when all of it is stored and seen."""
        try:
            # The driver waits for as long as the transaction may last.
            self._producer.commit_transaction()
            self._topics = set()
        except KafkaException as error:
            reason, topics = error.args[0], self._topics
            # A commit that was sent and carried out cannot be aborted any more: where that
            # succeeds, it was not.
            if reason.txn_requires_abort() and self._is_aborted():
                raise self._why(error, "its commit", self._sendings) from error
            self._discard()
            self._aborted, self._doubtful = self._aborted - topics, topics
            raise CommitUnknown(
                f"the commit of a transaction as {self.id!r} was sent, and not answered: "
                f"{reason.str()} ({reason.name()})"
            ) from error
        self._sendings, self._is_open = [], False
        self._hear()

    def was_aborted(self) -> None:
        """The commit that was not answered was not carried out."""
        self._aborted, self._doubtful = self._aborted | self._doubtful, set()

    def end_standing(self, standing: Standing) -> None:
        """End what Kafka has forgotten to end of transactions that were not committed, once this
        is prepared again. Raises `BrokerError`.
        """
        if not self._aborted:
            return
        if standing_at := standing(self._aborted):
            where = list(standing_at)
            log.warning("Kafka: %s was aborted, and is open in %s: aborting again", self.id, where)
            self._discard()  # what is late of before is about another epoch
            self.end_records(where)
        self._aborted = set()

    def end_records(self, places: Sequence[tuple[str, int]]) -> bool:
        """End what Kafka has forgotten to end under this id in these partitions; whether that was
        done: an abort is about those alone where a record was stored before it. Raises
        `BrokerError`.
        """
        self.begin()
        # With a key, without which a compacted topic takes none.
        sendings = [Sending(name, None, b"duly", [], partition=at) for name, at in places]
        try:
            self.send(sendings)
            self._producer.flush(self._timeout_s)
        except (DulyError, KafkaException) as error:
            log.warning("Kafka: %s stays open in %s: %s", self.id, places, error)
        are_stored = all(each.is_stored for each in sendings)
        self.abort()
        # One whose abort was not answered is thrown away.
        return are_stored and self._producer is not None

    def end_positions(self, places: Sequence[TopicPartition], group: bytes) -> None:
        """End what Kafka has forgotten to end of a group's positions under this id, which nobody is
        told before that: an abort is about all that its producer has open where the group's stand.
        Raises `BrokerError`.
        """
        self.begin()
        # Refused, they are part of the transaction all the same.
        with contextlib.suppress(DulyError):
            self.send_offsets(places, group)
        if self._producer is None:
            raise BrokerUnavailable(f"what stands open under {self.id!r} was not ended")
        self.abort()

    def abort(self) -> None:
        """End it, if it is open, without its records and positions. Never raises."""
        if self._is_open and not self._is_aborted():
            self._discard()
        self._sendings = []

    def _failed(self, error: KafkaException, what: str) -> DulyError:
        """What went wrong before a commit was sent: whatever it is, nothing was committed."""
        sendings = self._sendings
        if not self._is_aborted() or error.args[0].fatal():
            self._discard()
        return self._why(error, what, sendings)

    def _why(self, error: KafkaException, what: str, sendings: Sequence[Sending]) -> DulyError:
        """Asked once it has been aborted, for by then each record has been reported: a call that
        follows the refusal of one is refused itself for another reason, and may be so sooner.
        """
        reason, self._sendings = error.args[0], []
        self._hear()
        refused = next((each for each in sendings if each.is_refused), None)
        if refused is not None and refused.error is not None:
            return TransactionFailed(
                f"rolled back: a record for {refused.topic!r} was not stored: {refused.error.str()}"
            )
        text = f"rolled back: {what}: {reason.str()} ({reason.name()})"
        if reason.code() in MOVED_ON or reason.code() in _FENCED:
            return Superseded(text)
        return TransactionInterrupted(text)

    def _hear(self, wait_s: float = 0.0) -> None:
        """Be told what became of single records; of the rest the next call tells."""
        if self._producer is not None:
            with contextlib.suppress(KafkaException):
                self._producer.poll(wait_s)

    def _is_aborted(self) -> bool:
        self._is_open = self.is_clean = False
        self._aborted, self._topics = self._aborted | self._topics, set()
        try:
            self._producer.abort_transaction(self._timeout_s)
        except KafkaException as error:
            log.debug("Kafka: %s was not aborted in order: %s", self.id, error)
            return False
        return True

    def _discard(self) -> None:
        """This one is of no use any more; what it left open `begin` ends, or the timeout."""
        producer = self._forget()
        if producer is not None:
            try:
                producer.purge()
                producer.flush(_STEP_S)
            except KafkaException as error:
                log.debug("Kafka: a producer ended with %s", error)

    def _forget(self) -> Any:
        producer, self._producer = self._producer, None
        self._is_ready = self._is_open = self.is_clean = False
        self._sendings = []
        self._aborted, self._topics = self._aborted | self._topics, set()
        return producer

    def close(self) -> None:
        """Begin no more. What is open is aborted, as far as there is time."""
        self.abort()
        self._discard()


class _Ear:
    """A logger for the driver, which tells of a lost connection nowhere but in its log: where a
    server closes it in order that is no error. Serves while the producer is asked for something.
    """

    def __init__(self, lost: Callable[[], None]) -> None:
        self._lost = lost

    def log(self, level: int, text: str, kind: str, client: str, said: str) -> None:
        """As `logging.Logger.log`, with what the driver gives."""
        # Of one that was not up no request is on its way.
        if kind == "FAIL" and "in state UP" in said:
            self._lost()
        elif level > logging.WARNING:
            quiet.log(level, text, kind, client, said)


class _Bounded:
    """A call of the driver's that may last for ever: librdkafka waits without a limit for a group's
    coordinator that has left the cluster's metadata, as a broker does that restarts (its issues
    5456 and 5511, open with 2.16).
    """

    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        self.error: KafkaException | None = None
        self._over = threading.Event()
        self._call, self._args = call, args
        threading.Thread(target=self._run, name="duly-kafka-positions", daemon=True).start()

    def _run(self) -> None:
        try:
            self._call(*self._args)
        except KafkaException as error:
            self.error = error
        except BaseException as error:  # noqa: BLE001 - it belongs to who waits
            self.error = KafkaException(KafkaError(KafkaError._FAIL, repr(error)))
        finally:
            self._over.set()

    def ends_within(self, seconds: float) -> bool:
        """Whether it has returned or raised by then."""
        return self._over.wait(seconds)

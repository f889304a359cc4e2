"""`Producers`: the transactional producers of one process.

Each is under an id that no other process has. What a process left open that died is ended by who
begins under its ids; so these are committed with every position (`Notes.owner`), for whoever takes
over the partition. After a transaction that was not committed another id is taken
(`TransactionalProducer.is_clean`). Of those that were taken since the last position was committed
no position tells: what stands open under them Kafka ends by itself, after a while, and where it
forgets that `end_standing_positions` finds them by trying.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from confluent_kafka import TopicPartition

from duly.brokers.kafka.address import Address
from duly.brokers.kafka.client import log
from duly.brokers.kafka.transactions import Standing, TransactionalProducer
from duly.errors import BrokerError, BrokerUnavailable
from duly.identity import ids

# The latest that one process may be thought to have had; the timeout ends the rest. Where it has
# not, so many more are tried in each turn, and after these turns the same again.
_MOST_ENDED = 16
_TURNS = 4
# Each is a client with threads of its own.
_MOST_UNASKED = 4


def process_of(owner: str) -> str:
    """The process of an owner."""
    return owner.partition("/")[0]


class Producers:
    """One for each transaction that this process has open at a time. ``prefix`` begins their ids,
    and those of all processes of an application; ``standing`` is `Admin.standing`.
    """

    def __init__(self, address: Address, prefix: str, standing: Standing) -> None:
        self._address = address
        self._prefix = prefix
        self._standing = standing
        self._process = ids.one()
        self._idle: list[TransactionalProducer] = []
        self._unasked: list[TransactionalProducer] = []
        # Ids under which it has begun, and begins no more: the last of them.
        self._ended: deque[str] = deque(maxlen=_MOST_ENDED)
        self._count = 0
        self._lock = threading.Lock()
        self._closed = False

    @property
    def owner(self) -> str:
        """What those who take over have to know: how many there are, with the next to be taken."""
        with self._lock:
            return f"{self._process}/{self._count + (not (self._idle and self._idle[-1].is_clean))}"

    def is_own(self, id: str) -> bool:
        """Whether a transactional id is one of this process's."""
        return id.startswith(f"{self._prefix}-{self._process}-")

    def called(self, id: str) -> TransactionalProducer:
        """A producer under this id, whoever's it is."""
        return TransactionalProducer(self._address, id)

    def end_those_of(self, owners: Iterable[str]) -> None:
        """End what these have open, unless they are this process. One that lives finds out, and
        does it again where it still may. Raises `BrokerError`.
        """
        for process, count in self._others(owners).items():
            for one in self._numbered(process, max(1, count - _MOST_ENDED + 1), count):
                one.close()

    def end_standing_positions(
        self,
        owners: Iterable[str],
        places: Sequence[TopicPartition],
        group: bytes,
        turn: int,
        goes_on: Callable[[], bool],
    ) -> bool:
        """End what of a group's positions Kafka has forgotten to end under the ids of these; and
        under those behind them, others in each ``turn``. To begin under one that nobody has had
        harms nobody. And under those of this process whose last transaction was not committed.
        ``goes_on`` is asked before each; whether it always said so. Raises `BrokerError`.
        """
        with self._lock:
            mine = [each for each in self._idle if not each.is_clean]
            self._idle = [each for each in self._idle if each.is_clean]
            ended = [*self._ended]
        try:
            for one in mine:
                if not goes_on():
                    return False
                one.end_positions(places, group)
        finally:
            for one in mine:
                self.give_back(one)
        if not self._end_positions(map(self._prepared, ended), places, group, goes_on):
            return False
        ahead = turn % _TURNS * _MOST_ENDED
        for process, count in self._others(owners).items():
            first = count + ahead + 1 if ahead else max(1, count - _MOST_ENDED + 1)
            numbered = self._numbered(process, first, count + ahead + _MOST_ENDED)
            if not self._end_positions(numbered, places, group, goes_on):
                return False
        return True

    def _end_positions(
        self,
        those: Iterable[TransactionalProducer],
        places: Sequence[TopicPartition],
        group: bytes,
        goes_on: Callable[[], bool],
    ) -> bool:
        for one in those:
            try:
                if not goes_on():
                    return False
                one.end_positions(places, group)
            finally:
                one.close()
        return True

    def _others(self, owners: Iterable[str]) -> Mapping[str, int]:
        counts: dict[str, int] = {}
        for owner in sorted(owners):
            process, _, count = owner.partition("/")
            if process != self._process and count.isdigit():
                counts[process] = max(counts.get(process, 0), int(count))
        return counts

    def _numbered(self, process: str, first: int, last: int) -> Iterator[TransactionalProducer]:
        """Producers under these ids, which have begun: what others had open there has ended."""
        for number in range(first, last + 1):
            yield self._prepared(f"{self._prefix}-{process}-{number}")

    def _prepared(self, id: str) -> TransactionalProducer:
        one = self.called(id)
        one.prepare()
        return one

    def take(self) -> TransactionalProducer:
        """One that nobody uses. Raises `BrokerUnavailable` once closed, and as long as what one
        before it left open cannot be ended.
        """
        with self._lock:
            if self._closed:
                raise BrokerUnavailable("Kafka was closed; nothing was changed")
            one = self._idle.pop() if self._idle else self._another()
        if one.is_clean:
            return one
        try:
            one.prepare()
            self._end(one)
        except BaseException:
            self.give_back(one)
            raise
        with self._lock:
            return self._another()

    def _end(self, one: TransactionalProducer) -> None:
        """Begin no more under its id. Where nobody tells whether it left something open, as of a
        partition without a leader, `end_standing` asks again: others do not wait for that.
        """
        try:
            one.end_standing(self._standing)
        except BrokerError as error:
            with self._lock:
                if len(self._unasked) >= _MOST_UNASKED:
                    raise
                self._unasked.append(one)
            log.warning("Kafka: whether %s left something open is not known: %s", one.id, error)
        else:
            one.close()
            with self._lock:
                self._ended.append(one.id)

    def end_standing(self) -> None:
        """End what was left open, where nobody told by then whether anything was. Raises
        `BrokerError`: to be asked again.
        """
        for _ in range(len(self._unasked)):
            with self._lock:
                if not self._unasked:
                    return
                one = self._unasked.pop(0)
            try:
                one.prepare()
                self._end(one)
            except BaseException:
                with self._lock:
                    self._unasked.append(one)
                raise

    def _another(self) -> TransactionalProducer:
        self._count += 1
        return self.called(f"{self._prefix}-{self._process}-{self._count}")

    def give_back(self, one: TransactionalProducer) -> None:
        """Another may use it."""
        one.abort()  # of one who was interrupted
        with self._lock:
            self._idle.append(one)

    @contextmanager
    def one(self) -> Iterator[TransactionalProducer]:
        """One, for as long as this lasts."""
        taken = self.take()
        try:
            yield taken
        finally:
            self.give_back(taken)

    def close(self) -> None:
        """Begin no more."""
        with self._lock:
            self._closed = True
            left = [*self._idle, *self._unasked]
            self._idle, self._unasked = [], []
        for each in left:
            each.close()

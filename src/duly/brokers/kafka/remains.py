"""`Remains`: what workers that are dead left open where this process publishes, and among dead
letters.

Kafka ends it, or whoever takes over does; where Kafka forgets that in a partition
(`duly.brokers.kafka.transactions`), readers of what is committed would stay before it for ever.
Whether it was committed the coordinator has written down (`Ledger`). What was aborted is aborted
there once more, under the same id. What was committed nobody can commit again: that is told.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import closing

from duly.brokers.kafka.admin import Admin
from duly.brokers.kafka.client import log
from duly.brokers.kafka.ledger import ABORTED, COMMITTED, OPEN, Entry, Ledger, Place
from duly.brokers.kafka.transactions import TransactionalProducer
from duly.errors import BrokerError

# Readers that stay for so long are looked after. What lives ends its own before that, or is asked
# to do its last transaction again.
_STAYS_S = 8.0
# Between two reads of the ledger, which is all of the cluster's, there is so much time; twice as
# much each time while nothing changes, for what others have open may stay so for long. So many ids
# are tried each time.
_AGAIN_S, _SELDOM_S = 20.0, 300.0
_AT_ONCE = 16

Stay = tuple[Place, int]
"""a partition, and where readers stand in it"""


class Remains:
    """``called`` gives the producer of a transactional id; ``is_own`` says which are this
    process's, which ends what it left open itself. ``goes_on`` is asked before each step.
    """

    def __init__(
        self,
        admin: Admin,
        ledger: Ledger,
        called: Callable[[str], TransactionalProducer],
        is_own: Callable[[str], bool],
        goes_on: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._admin = admin
        self._ledger = ledger
        self._called = called
        self._is_own = is_own
        self._goes_on = goes_on
        self._clock = clock
        # Where readers stand, and since when they have been seen there.
        self._stays: dict[Place, tuple[int, float]] = {}
        self._stuck: set[Stay] = set()
        self._read_s = -math.inf
        self._wait_s = 0.0
        # What was tried while readers stand there, and whether it was done; what has been open
        # there at each look; and where that was told.
        self._tried: dict[tuple[str, Place], bool] = {}
        self._open: dict[Stay, set[tuple[str, int]]] = {}
        self._told: set[Stay] = set()

    def look(self, topics: Collection[str]) -> None:
        """Look whether readers of these stay, and end what keeps them. Raises `BrokerError`."""
        held = self._admin.held_up(topics)
        now = self._clock()
        self._stays = {
            place: (at, self._stays[place][1] if self._stays.get(place, (-1,))[0] == at else now)
            for place, (at, _) in held.items()
        }
        stays = {(place, at) for place, (at, _) in self._stays.items()}
        self._tried = {each: done for each, done in self._tried.items() if each[1] in held}
        self._open = {stay: there for stay, there in self._open.items() if stay in stays}
        self._told &= stays
        stuck = {
            (place, at) for place, (at, since) in self._stays.items() if now - since >= _STAYS_S
        }
        if not stuck <= self._stuck:
            self._wait_s = 0.0
        self._stuck = stuck
        if stuck and now >= self._read_s + max(self._wait_s, _AGAIN_S):
            self._wait_s = min(max(2 * self._wait_s, _AGAIN_S), _SELDOM_S)
            try:
                if self._end(stuck):
                    self._wait_s = _AGAIN_S
            finally:
                self._read_s = self._clock()

    def _end(self, stuck: Collection[Stay]) -> bool:
        """Whether anything was tried for the first time."""
        try:
            entries = self._ledger.entries(self._goes_on)
        except BrokerError as error:
            if self._goes_on():
                log.warning(
                    "Kafka: readers stay in %s, and what is open there is not told: %s",
                    sorted(place for place, _ in stuck), error,
                )  # fmt: skip
            return False
        tries = [(id, stay) for stay in stuck for id in self._candidates(entries, stay[0])]
        # What has failed may fail for ever, and keeps nothing else waiting.
        tries.sort(key=lambda each: (each[0], each[1][0]) in self._tried)
        moved: set[Stay] = set()
        left, is_new = _AT_ONCE, False
        for id, stay in tries:
            if left and stay not in moved and self._goes_on():
                if self._moved(stay):
                    moved.add(stay)
                else:
                    left -= 1
                    is_new |= (id, stay[0]) not in self._tried
                    self._tried[id, stay[0]] = self._is_ended(id, stay[0])
        for stay in stuck:
            if self._candidates(entries, stay[0]) or not self._goes_on():
                continue
            if not self._moved(stay):
                self._tell(entries, stay)
        return is_new

    def _candidates(self, entries: Mapping[str, Entry], place: Place) -> list[str]:
        """Whose last transaction was aborted and wrote there, the latest first, unless its end was
        tried and done.
        """
        return [
            id
            for id, entry in [*entries.items()][::-1]
            if entry.status == ABORTED
            and place in entry.places
            and not self._is_own(id)
            and not self._tried.get((id, place))
        ]

    def _is_ended(self, id: str, place: Place) -> bool:
        """Abort there once more under this id; whether that was done. It may well fail: the
        restart that made Kafka forget is just over, and its coordinator may be loading.
        """
        log.warning("Kafka: readers of %s stay before what %s left open", place, id)
        try:
            with closing(self._called(id)) as dead:
                return dead.end_records([place])
        except BrokerError as error:
            log.warning("Kafka: what %s left open is not ended yet: %s", id, error)
            return False

    def _moved(self, stay: Stay) -> bool:
        place, at = stay
        return self._admin.standing([place[0]]).get(place) != at

    def _tell(self, entries: Mapping[str, Entry], stay: Stay) -> None:
        place, _ = stay
        there = {
            (id, each.began_ms)
            for id, each in entries.items()
            if each.status in OPEN and place in each.places
        }
        # What keeps readers has been open for as long as they stay.
        self._open[stay] = there = self._open.get(stay, there) & there
        if there:
            log.info("Kafka: readers of %s stay before what is open: %s", place, sorted(there))
            return
        if stay in self._told:
            return
        self._told.add(stay)
        committed = [
            id for id, each in entries.items() if each.status == COMMITTED and place in each.places
        ]
        log.error(
            "Kafka: readers of %s stay before an open transaction that no transaction of this "
            "application which was aborted explains (committed there last: %s). "
            "kafka-transactions.sh find-hanging tells whose it is; to abort it takes back what it "
            "has stored there",
            place, ", ".join(committed[-3:]) or "none",
        )  # fmt: skip

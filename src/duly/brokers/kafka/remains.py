"""`Remains`: what workers that are dead left open in topics where this process publishes.

Kafka ends it, or whoever takes over does; where Kafka forgets that in a partition
(`duly.brokers.kafka.transactions`), readers of what is committed would stay before it for ever.
Whether it was committed the coordinator has written down (`Ledger`). What was aborted is aborted
there once more, under the same id. What was committed nobody can commit again: that is told.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from contextlib import closing

from duly.brokers.kafka.admin import Admin
from duly.brokers.kafka.client import log
from duly.brokers.kafka.ledger import ABORTED, COMMITTED, Entry, Ledger, Place
from duly.brokers.kafka.transactions import TransactionalProducer
from duly.errors import BrokerError

# Readers that stay for so long are looked after. What lives ends its own before that, or is asked
# to do its last transaction again.
_STAYS_S = 8.0
# Then the ledger is read so seldom, and so many ids are tried each time.
_AGAIN_S = 20.0
_AT_ONCE = 16

Stay = tuple[Place, int]
"""a partition, and where readers stand in it"""


class Remains:
    """``called`` gives the producer of a transactional id; ``is_own`` says which are this
    process's, which ends what it left open itself.
    """

    def __init__(
        self,
        admin: Admin,
        ledger: Ledger,
        called: Callable[[str], TransactionalProducer],
        is_own: Callable[[str], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._admin = admin
        self._ledger = ledger
        self._called = called
        self._is_own = is_own
        self._clock = clock
        # Where readers stand, and since when they have been seen there.
        self._stays: dict[Place, tuple[int, float]] = {}
        self._look_at = 0.0
        # What was tried while readers stand there, and whether it was done.
        self._tried: dict[tuple[str, Place], bool] = {}

    def look(self, topics: Collection[str]) -> None:
        """Look whether readers of these stay, and end what keeps them. Raises `BrokerError`."""
        held = self._admin.held_up(topics)
        now = self._clock()
        self._stays = {
            place: (at, self._stays[place][1] if self._stays.get(place, (-1,))[0] == at else now)
            for place, (at, _) in held.items()
        }
        self._tried = {each: done for each, done in self._tried.items() if each[1] in held}
        stuck = [
            (place, at) for place, (at, since) in self._stays.items() if now - since >= _STAYS_S
        ]
        if stuck and now >= self._look_at:
            self._look_at = now + _AGAIN_S
            self._end(stuck)

    def _end(self, stuck: Collection[Stay]) -> None:
        try:
            entries = self._ledger.entries()
        except BrokerError as error:
            log.warning(
                "Kafka: readers stay in %s, and what is open there is not told: %s", stuck, error
            )
            return
        tries = [(id, stay) for stay in stuck for id in self._candidates(entries, stay[0])]
        # What has failed may fail for ever, and keeps nothing else waiting.
        tries.sort(key=lambda each: (each[0], each[1][0]) in self._tried)
        moved: set[Stay] = set()
        left = _AT_ONCE
        for id, stay in tries:
            if left and stay not in moved:
                if self._moved(stay):
                    moved.add(stay)
                else:
                    left -= 1
                    self._tried[id, stay[0]] = self._is_ended(id, stay[0])
        for stay in stuck:
            if not self._candidates(entries, stay[0]) and not self._moved(stay):
                self._tell(entries, stay)

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

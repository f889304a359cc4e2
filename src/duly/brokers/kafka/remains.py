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
        self._tried: set[tuple[str, Place]] = set()

    def look(self, topics: Collection[str]) -> None:
        """Look whether readers of these stay, and end what keeps them. Raises `BrokerError`."""
        held = self._admin.held_up(topics)
        now = self._clock()
        self._stays = {
            place: (at, self._stays[place][1] if self._stays.get(place, (-1,))[0] == at else now)
            for place, (at, _) in held.items()
        }
        self._tried = {(id, place) for id, place in self._tried if place in self._stays}
        stuck = [place for place, (_, since) in self._stays.items() if now - since >= _STAYS_S]
        if stuck and now >= self._look_at:
            self._look_at = now + _AGAIN_S
            self._end(stuck)

    def _end(self, stuck: Collection[Place]) -> None:
        try:
            entries = self._ledger.entries()
        except BrokerError as error:
            log.warning(
                "Kafka: readers stay in %s, and what is open there is not told: %s", stuck, error
            )
            return
        left = _AT_ONCE
        for place in stuck:
            for id in self._candidates(entries, place):
                if not left or self._moved(place):
                    break
                left -= 1
                self._tried.add((id, place))
                log.warning("Kafka: readers of %s stay before what %s left open", place, id)
                with closing(self._called(id)) as dead:
                    dead.end_records([place])
            else:
                self._tell(entries, place)

    def _candidates(self, entries: Mapping[str, Entry], place: Place) -> list[str]:
        """Whose last transaction was aborted and wrote there, the latest first; once each."""
        return [
            id
            for id, entry in [*entries.items()][::-1]
            if entry.status == ABORTED
            and place in entry.places
            and not self._is_own(id)
            and (id, place) not in self._tried
        ]

    def _moved(self, place: Place) -> bool:
        return self._admin.standing([place[0]]).get(place) != self._stays[place][0]

    def _tell(self, entries: Mapping[str, Entry], place: Place) -> None:
        if self._moved(place):
            return
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

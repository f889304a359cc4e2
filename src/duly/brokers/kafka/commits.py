"""`Commits`: what lanes have settled, committed by the thread that polls, and their wait for it.

One request is on its way at a time, with what everybody has settled by then. It is made where
rebalances are told, so that none is made under a later generation than that in which it was
decided: the driver joins no other before it has told which partitions are lost. So an error,
whichever it is, is answered by saying it again, with what has been settled since, for as long as
the partition is this process's. A partition that stays over a rebalance has its first request
refused (it was made under the generation before), and who was fenced off is told that its
partitions are lost.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple

from confluent_kafka import KafkaError, KafkaException, TopicPartition

from duly.brokers.kafka.extent import Extent
from duly.brokers.kafka.notes import as_text
from duly.brokers.kafka.share import Share
from duly.brokers.kafka.transactions import MOVED_ON
from duly.errors import CommitUnknown

log = logging.getLogger("duly.kafka")

_ANSWERS_S = 30.0
_AGAIN_S = 0.05
# What is refused sooner was asked once. Later the driver may have asked twice, and not have been
# told what became of the first.
_ONCE_S = 1.0


class Awaits(Enum):
    """Who waits for an answer of the group's: of nothing there is none to come."""

    SOMEBODY = 0
    NOBODY = 1
    NOTHING = 2


class _Request:
    """Somebody waits until these versions of these are committed. ``lost`` are the generations
    that others have before that; ``is_unknown``: what the group was asked of one of them may have
    been carried out.
    """

    def __init__(self, wanted: Sequence[tuple[Share, int]]) -> None:
        self.wanted = wanted
        self.lost: set[int] = set()
        self.is_unknown = False
        self.over = threading.Event()


class _Sent(NamedTuple):
    """What is on its way of one partition."""

    share: Share
    version: int
    announced: Extent
    doubts: int
    doubtful: int


class Commits:
    """Of one subscription. ``changed`` locks ``shares``, which are by generation."""

    def __init__(
        self,
        subscription: str,
        changed: threading.Condition,
        shares: Mapping[int, Share],
        clock: Callable[[], float],
        wall_ms: Callable[[], int],
    ) -> None:
        self.active_s = time.monotonic()
        self._subscription = subscription
        self._changed = changed
        self._shares = shares
        self._clock = clock
        self._wall_ms = wall_ms
        self._requests: list[_Request] = []
        self._said = False
        self._sent: Mapping[tuple[str, int], _Sent] | None = None
        self._not_before_s = self._sent_s = 0.0
        self._ended = False

    # --- on lanes' threads

    def ask(self, shares: Iterable[Share], *, settling: bool = False) -> set[int]:
        """Commit what is settled of these; the generations of those that others have by now.

        Raises `CommitUnknown`: what it was about stays settled here, and the next commit says so
        again. ``settling``: also where others have one by now that may have been committed before.
        """
        with self._changed:
            request = _Request([(share, share.version) for share in shares])
            self._requests.append(request)
            self._answer()
            self.active_s = time.monotonic()
            self._changed.notify_all()
        if request.over.wait(_ANSWERS_S):
            if settling and request.is_unknown:
                raise CommitUnknown(
                    f"subscription {self._subscription!r}: a partition is another's by now, and "
                    "Kafka did not say whether it has the position that was committed before that"
                )
            return request.lost
        with self._changed:
            if request in self._requests:
                self._requests.remove(request)
        raise CommitUnknown(
            f"subscription {self._subscription!r}: Kafka has not confirmed a position within "
            f"{_ANSWERS_S:.0f} s"
        )

    def say(self) -> None:
        """Commit what is settled soon, and let nobody wait for it. With the lock held."""
        self._said = True
        self.active_s = time.monotonic()
        self._changed.notify_all()

    def decide(self) -> None:
        """Nothing is in doubt: a position that may not be committed is said again."""

    # --- on the thread that polls

    def take_over(
        self, given: Sequence[TopicPartition], takers: Callable[[], Iterable[str]]
    ) -> None:
        """Who had these before has left nothing open."""

    def unblock(
        self,
        consumer: Any,
        given: Sequence[TopicPartition],
        takers: Iterable[str],
        goes_on: Callable[[], bool],
    ) -> None:
        """What it commits is in no transaction."""

    def rebalanced(self, consumer: Any) -> None:
        """The driver knows by itself who commits."""

    def begin(self, consumer: Any, places: Sequence[TopicPartition]) -> None:
        """Commit the first positions that there ever were. Raises the driver's error."""
        told = consumer.commit(offsets=list(places), asynchronous=False)
        if wrong := [each.error for each in told if each.error is not None]:
            raise KafkaException(wrong[0])

    def lost(self) -> None:
        """Others have some of the partitions: nobody waits for these. With the lock held."""
        self._answer()

    @property
    def awaits(self) -> Awaits:
        """Who waits for an answer of the group's."""
        if self._sent is None:
            return Awaits.NOTHING
        return Awaits.SOMEBODY if self._requests else Awaits.NOBODY

    def rest(self, seconds: float) -> None:
        """Wait for that long, or until something is asked for that can be sent."""
        with self._changed:
            asked = self._requests or self._said
            if self._sent or not asked or time.monotonic() < self._not_before_s:
                self._changed.wait(seconds)

    def serve(self, consumer: Any) -> None:
        """Send what is asked for, unless something is on its way."""
        if self._sent is not None or time.monotonic() < self._not_before_s:
            return
        with self._changed:
            self._answer()
            if not self._requests and not self._said:
                return
            self._said = False
            dirty = [share for share in self._shares.values() if share.committed < share.version]
            self._sent, places = self._places(dirty, leaving=False)
        self._sent_s = time.monotonic()
        try:
            consumer.commit(offsets=places, asynchronous=True)
        except KafkaException as error:
            self.answered(error.args[0], places)

    def answered(self, error: KafkaError | None, places: Sequence[Any]) -> None:
        """The group's answer."""
        sent, self._sent = self._sent, None
        if sent is None:
            return
        self._take(sent, error, places)
        with self._changed:
            self._answer()

    def surely(self, consumer: Any, shares: Sequence[Share]) -> None:
        """Commit these before they are given up; returns when that is decided."""
        if not shares:
            return
        with self._changed:
            sent, places = self._places(shares, leaving=True)
        self._sent_s = time.monotonic()
        try:
            told = consumer.commit(offsets=places, asynchronous=False)
            self._take(sent, None, told)
        except (KafkaException, RuntimeError) as error:
            if isinstance(error, KafkaException):
                self._take(sent, error.args[0], places)
            log.warning("subscription %r: not handed over in order: %s", self._subscription, error)
        with self._changed:
            self._answer()

    def _places(
        self, shares: Sequence[Share], *, leaving: bool
    ) -> tuple[Mapping[tuple[str, int], _Sent], list[TopicPartition]]:
        now, wall_ms = self._clock(), self._wall_ms()
        places = []
        for share in shares:
            notes = share.notes(wall_ms, now, leaving=leaving)
            text = as_text(notes, share.position)
            places.append(TopicPartition(*share.name, share.position, text))
        sent: dict[tuple[str, int], _Sent] = {}
        for share in shares:
            doubts = share.telling.sent(share.announced)
            sent[share.name] = _Sent(share, share.version, share.announced, doubts, share.doubtful)
            share.doubtful = share.version
        return sent, places

    def _take(
        self,
        sent: Mapping[tuple[str, int], _Sent],
        error: KafkaError | None,
        places: Sequence[Any],
    ) -> None:
        positions = {(each.topic, each.partition): each.offset for each in places}
        errors = {(each.topic, each.partition): each.error for each in places}
        with self._changed:
            for name, (share, version, announced, doubts, doubtful) in sent.items():
                found = errors.get(name) or error
                if name not in errors:
                    continue  # that was about others
                if found is None:
                    share.committed = max(share.committed, version)
                    share.telling.told(announced, doubts)
                    share.safe = positions[name]
                else:
                    if found.code() in MOVED_ON and time.monotonic() < self._sent_s + _ONCE_S:
                        share.doubtful = doubtful
                    self._not_before_s = time.monotonic() + _AGAIN_S
                    self._said = True
                    log.debug("subscription %r: committing again: %s", self._subscription, found)

    def _answer(self) -> None:
        """Let those go on whose answer is known."""
        left = []
        for request in self._requests:
            # Also where it was given up since: then it was committed first.
            behind = [share for share, version in request.wanted if share.committed < version]
            request.lost = {s.generation for s in behind if s.generation not in self._shares}
            if len(request.lost) == len(behind) or self._ended:
                request.lost |= {share.generation for share in behind}
                request.is_unknown = any(
                    share.committed < version <= share.doubtful for share, version in request.wanted
                )
                request.over.set()
            else:
                left.append(request)
        self._requests = left

    def end(self) -> None:
        """Nothing more is committed: what is not settled by now is others'."""
        with self._changed:
            self._ended = True
            self._answer()

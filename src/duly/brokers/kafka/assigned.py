"""`Assigned`: what a rebalance gives and takes, and where each partition goes on."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from confluent_kafka import KafkaException, TopicPartition

from duly.broker import Start
from duly.brokers.kafka.admin import Admin, Found
from duly.brokers.kafka.client import broker_error
from duly.brokers.kafka.commits import Commits
from duly.brokers.kafka.membership import is_member
from duly.brokers.kafka.notes import Notes, as_text, in_text
from duly.brokers.kafka.producers import process_of
from duly.brokers.kafka.records import Records
from duly.brokers.kafka.share import Order, Share
from duly.brokers.kafka.transacted import Transacted
from duly.errors import BrokerError, BrokerUnavailable, BrokerUnusable

_generations = itertools.count(1)

_ASKS_S = 15.0
_ASKS_AGAIN_S = 0.5


class Beginnings:
    """Where the partitions of one subscription go on, or begin. ``starts`` says of a topic, by its
    name on the cluster, where a subscription that never had a position begins; ``commit`` commits
    that, in a transaction where there is an ``owner`` (`duly.brokers.kafka.producers`).
    """

    def __init__(
        self,
        admin: Admin,
        records: Callable[[], Records],
        subscription: str,
        order: Callable[[str], Order],
        starts: Callable[[str], Start],
        commit: Callable[[Any, Sequence[TopicPartition]], None],
        owner: Callable[[], str],
        key_lanes: int,
    ) -> None:
        self._admin = admin
        self._records = records
        self._subscription = subscription
        self._order = order
        self._starts = starts
        self._commit = commit
        self._owner = owner
        self._key_lanes = key_lanes
        # By topic, the id of the one that was assigned; those that were not there any more.
        self._ids: dict[str, str] = {}
        self._away: frozenset[str] = frozenset()
        self._checked: set[tuple[str, int]] = set()

    def at_last(
        self,
        consumer: Any,
        given: Sequence[TopicPartition],
        commits: Commits | Transacted,
        asks: Callable[[], bool],
        tell: Callable[[str], None],
        rest: Callable[[float], object],
    ) -> Sequence[Share]:
        """As `of`, asked again for as long as nobody answers and it ``asks``: what is not assigned
        now, this generation is never given again. None of them to whom the group throws out
        meanwhile, which deals anew. Raises `BrokerUnusable`.
        """

        def belongs() -> bool:
            return asks() and is_member(consumer.consumer_group_metadata())

        while asks():
            try:
                return self.of(consumer, given)
            except KafkaException as error:
                told = broker_error(error, f"subscription {self._subscription!r}")
                if error.args[0].fatal() or isinstance(told, BrokerUnusable):
                    raise BrokerUnusable(str(told)) from error
                tell(f"asking again: {told}")
                with contextlib.suppress(BrokerError):  # it is asked again
                    if belongs():
                        commits.unblock(consumer, given, self.takers(given), belongs)
            except KeyError as error:
                tell(f"asking again: topic {error} is not there")
            except BrokerUnavailable as error:
                tell(f"asking again: {error}")
            if not belongs():
                break
            rest(_ASKS_AGAIN_S)
        return []

    def of(self, consumer: Any, given: Iterable[TopicPartition]) -> Sequence[Share]:
        """A share of each of these partitions, at its position. Raises `BrokerError`: one whose
        position was lost is `BrokerUnusable`.
        """
        given = list(given)
        topics = self._admin.find({each.topic for each in given})
        # Before the positions: what has begun by now has one by then, unless it was lost.
        begun = self._records().found(
            self._key("begun", topics, (each.topic, each.partition)) for each in given
        )
        committed = consumer.committed(given, timeout=_ASKS_S)
        self._check_ids(topics)
        self._ids |= {topic: found.id for topic, found in topics.items()}
        positions = {
            (each.topic, each.partition): (each.offset, in_text(each.metadata, each.offset))
            for each in committed
            if each.offset >= 0
        }
        self._check_incarnations(topics, positions)
        self._check_there(positions)
        new = [
            (each.topic, each.partition)
            for each in committed
            if (each.topic, each.partition) not in positions
        ]
        if lost := [place for place in new if self._key("begun", topics, place) in begun]:
            raise BrokerUnusable(self._lost(lost))
        self._take([*new, *self._of_others(positions)], topics)
        positions |= self._begin(consumer, topics, new)
        # After the commit: a record without a position would be a lost one.
        self._records().fix({self._key("begun", topics, place): "" for place in positions})
        return [self._share(topics, place, *positions[place]) for place in positions]

    def _begin(
        self, consumer: Any, topics: Mapping[str, Found], new: Sequence[tuple[str, int]]
    ) -> Mapping[tuple[str, int], tuple[int, Notes]]:
        found: dict[tuple[str, int], tuple[int, Notes]] = {}
        # Of a topic that was made anew nothing is old news to who has begun before.
        began = self._records().fix(
            {f"began/{self._subscription}/{topic}": topics[topic].id for topic, _ in new}
        )
        for topic in sorted({topic for topic, _ in new}):
            is_first = began[f"began/{self._subscription}/{topic}"] == topics[topic].id
            key = f"first/{self._subscription}/{topics[topic].id}"
            first = int(self._records().fix({key: str(topics[topic].partitions)})[key])
            # Partitions that came later are read from their beginning: nobody has seen them.
            for later in (False, True):
                start: Start = "earliest" if later or not is_first else self._starts(topic)
                places = [each for each in new if each[0] == topic and (each[1] >= first) is later]
                for place, offset in self._admin.starts(places, start).items():
                    found[place] = offset, Notes(topics[topic].id)
        if found:
            self._commit(
                consumer,
                [
                    TopicPartition(*place, offset, as_text(notes, offset))
                    for place, (offset, notes) in found.items()
                ],
            )
        return found

    def _key(self, kind: str, topics: Mapping[str, Found], place: tuple[str, int]) -> str:
        return f"{kind}/{self._subscription}/{topics[place[0]].id}/{place[1]}"

    def _of_others(
        self, positions: Mapping[tuple[str, int], tuple[int, Notes]]
    ) -> Sequence[tuple[str, int]]:
        mine = process_of(self._owner())
        return [place for place, (_, notes) in positions.items() if process_of(notes.owner) != mine]

    def _take(self, places: Sequence[tuple[str, int]], topics: Mapping[str, Found]) -> None:
        """Record who commits the next position of these, by transactions: until that stands no
        position tells whose transaction keeps the partition from others.
        """
        if places and (owner := self._owner()):
            self._records().put({self._key("taker", topics, place): owner for place in places})

    def takers(self, given: Iterable[TopicPartition]) -> Sequence[str]:
        """Who was given these partitions last. Raises `BrokerError`."""
        places = [(each.topic, each.partition) for each in given]
        topics = self._admin.find({topic for topic, _ in places})
        keys = [self._key("taker", topics, place) for place in places if place[0] in topics]
        return [*self._records().last(keys).values()]

    def look(self) -> None:
        """Raises `BrokerUnusable` where a topic is not the one that was assigned, or none. One that
        is not there is asked for twice: a broker that has just started may not know it yet.
        """
        wanted = dict(self._ids)
        found = self._admin.find(wanted)
        self._check_ids(found)
        away = wanted.keys() - found.keys()
        if gone := away & self._away:
            raise BrokerUnusable(_made_anew(self._subscription, min(gone), "was deleted"))
        self._away = frozenset(away)

    def _check_ids(self, found: Mapping[str, Found]) -> None:
        for topic, each in found.items():
            if self._ids.get(topic, each.id) != each.id:
                raise BrokerUnusable(_made_anew(self._subscription, topic))

    def _check_there(self, positions: Mapping[tuple[str, int], tuple[int, Notes]]) -> None:
        """Where nothing stands at a position any more, that is told before anything starts. Later
        the driver tells it, and where no leader answers.
        """
        if not (unchecked := positions.keys() - self._checked):
            return
        try:
            oldest = self._admin.starts(unchecked, "earliest")
        except BrokerUnavailable:
            return
        self._checked |= positions.keys()
        if lost := [place for place, at in oldest.items() if positions[place][0] < at]:
            raise BrokerUnusable(nothing_there(self._subscription, lost, "they are deleted"))

    def _check_incarnations(
        self, topics: Mapping[str, Found], positions: Mapping[tuple[str, int], tuple[int, Notes]]
    ) -> None:
        """Kafka forgets the positions of a topic that is deleted, unless a worker that goes on has
        committed them anew: they are about other messages.
        """
        for (topic, _), (_, notes) in positions.items():
            if notes.topic and notes.topic != topics[topic].id:
                raise BrokerUnusable(_made_anew(self._subscription, topic))

    def _lost(self, places: Sequence[tuple[str, int]]) -> str:
        return (
            f"subscription {self._subscription!r}: Kafka has lost its position in {_told(places)} "
            "(offsets.retention.minutes goes by once nobody consumes). Where it goes on is a "
            "person's to say: "
            "kafka-consumer-groups.sh --reset-offsets"
        )

    def _share(
        self,
        topics: Mapping[str, Found],
        place: tuple[str, int],
        position: int,
        notes: Notes,
    ) -> Share:
        topic, partition = place
        log = f"{self._admin.cluster}/{topics[topic].id}/{partition}"
        order = self._order(topic)
        return Share(place, log, next(_generations), order, position, notes, self._key_lanes)


def nothing_there(subscription: str, places: Sequence[tuple[str, int]], why: str) -> str:
    """What to say where no message stands at a position that was committed."""
    return (
        f"subscription {subscription!r}: {_told(places)} has nothing at the position that it has "
        f"reached: {why}. Retention went by, or the log lost its end or was made anew. Where to go "
        "on is a person's to say: kafka-consumer-groups.sh --reset-offsets"
    )


def _made_anew(subscription: str, topic: str, what: str = "was deleted and made again") -> str:
    return (
        f"subscription {subscription!r}: topic {topic!r} {what} while it was consumed, so that "
        "nobody can say which of its messages were handled. Where to go on is a person's to say: "
        "kafka-consumer-groups.sh --reset-offsets"
    )


def _told(places: Sequence[tuple[str, int]]) -> str:
    return ", ".join(f"{topic}/{partition}" for topic, partition in places)

"""`Assigned`: what a rebalance gives and takes, and where each partition goes on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from confluent_kafka import TopicPartition

from duly.broker import Start
from duly.brokers.kafka.admin import Admin, Found
from duly.brokers.kafka.notes import Notes, as_text, in_text
from duly.brokers.kafka.records import Records
from duly.brokers.kafka.share import Order, Share
from duly.errors import BrokerUnusable

_generations = itertools.count(1)

_ASKS_S = 15.0


class Beginnings:
    """Where the partitions of one subscription go on, or begin. ``starts`` says of a topic, by its
    name on the cluster, where a subscription that never had a position begins.
    """

    def __init__(
        self,
        admin: Admin,
        records: Callable[[], Records],
        subscription: str,
        order: Callable[[str], Order],
        starts: Callable[[str], Start],
    ) -> None:
        self._admin = admin
        self._records = records
        self._subscription = subscription
        self._order = order
        self._starts = starts

    def of(self, consumer: Any, given: Iterable[TopicPartition]) -> Sequence[Share]:
        """A share of each of these partitions, at its position. Raises `BrokerError`: one whose
        position was lost is `BrokerUnusable`.
        """
        committed = consumer.committed(list(given), timeout=_ASKS_S)
        topics = self._admin.find({each.topic for each in committed})
        positions = {
            (each.topic, each.partition): (each.offset, in_text(each.metadata, each.offset))
            for each in committed
            if each.offset >= 0
        }
        self._check_incarnations(topics, positions)
        new = [
            (each.topic, each.partition)
            for each in committed
            if (each.topic, each.partition) not in positions
        ]
        positions |= self._begin(consumer, topics, new)
        # After the commit: a record without a position would be a lost one.
        self._records().fix({self._key("begun", topics, place): "" for place in positions})
        return [self._share(topics, place, *positions[place]) for place in positions]

    def _begin(
        self, consumer: Any, topics: Mapping[str, Found], new: Sequence[tuple[str, int]]
    ) -> Mapping[tuple[str, int], tuple[int, Notes]]:
        begun = self._records().found(self._key("begun", topics, place) for place in new)
        if lost := [place for place in new if self._key("begun", topics, place) in begun]:
            raise BrokerUnusable(self._lost(lost))
        found: dict[tuple[str, int], tuple[int, Notes]] = {}
        for topic in sorted({topic for topic, _ in new}):
            key = f"first/{self._subscription}/{topics[topic].id}"
            first = int(self._records().fix({key: str(topics[topic].partitions)})[key])
            # Partitions that came later are read from their beginning: nobody has seen them.
            for later in (False, True):
                start: Start = "earliest" if later else self._starts(topic)
                places = [each for each in new if each[0] == topic and (each[1] >= first) is later]
                for place, offset in self._admin.starts(places, start).items():
                    found[place] = offset, Notes(topics[topic].id)
        if found:
            consumer.commit(
                offsets=[
                    TopicPartition(*place, offset, as_text(notes, offset))
                    for place, (offset, notes) in found.items()
                ],
                asynchronous=False,
            )
        return found

    def _key(self, kind: str, topics: Mapping[str, Found], place: tuple[str, int]) -> str:
        return f"{kind}/{self._subscription}/{topics[place[0]].id}/{place[1]}"

    def _check_incarnations(
        self, topics: Mapping[str, Found], positions: Mapping[tuple[str, int], tuple[int, Notes]]
    ) -> None:
        """Kafka forgets the positions of a topic that is deleted, unless a worker that goes on has
        committed them anew: they are about other messages.
        """
        for (topic, _), (_, notes) in positions.items():
            if notes.topic and notes.topic != topics[topic].id:
                raise BrokerUnusable(made_anew(self._subscription, topic))

    def _lost(self, places: Sequence[tuple[str, int]]) -> str:
        told = ", ".join(f"{topic}/{partition}" for topic, partition in places)
        return (
            f"subscription {self._subscription!r}: Kafka has lost its position in {told} "
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
        return Share(place, log, next(_generations), self._order(topic), position, notes)


def made_anew(subscription: str, topic: str) -> str:
    """What to say where a topic is not the one that a position is about."""
    return (
        f"subscription {subscription!r}: topic {topic!r} was deleted and made again while it was "
        "consumed, so that nobody can say which of its messages were handled. Where to go on is a "
        "person's to say: kafka-consumer-groups.sh --reset-offsets"
    )

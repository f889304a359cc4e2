"""A namespace on a Kafka node, as every process of a run uses it, and how far its groups are.

What lies between a group's position and the end of a partition may be nothing but marks of
transactions, which no group ever commits a position behind: so it is read.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from confluent_kafka import (
    Consumer,
    ConsumerGroupTopicPartitions,
    IsolationLevel,
    KafkaError,
    KafkaException,
    TopicPartition,
)
from confluent_kafka import admin as driver

from duly.broker import Broker
from duly.brokers.kafka.address import Address, address_of
from duly.brokers.kafka.client import reading, settings
from duly.brokers.kafka.names import Names
from duly.errors import BrokerUnavailable
from duly.inspection import SubscriptionState
from duly.store import Store
from duly.testing.chaos.workload import Workload

_ANSWERS_S = 30.0
_driver: Any = driver

Place = tuple[str, int]


@dataclass
class LogSite:
    """A namespace, which ``url`` names as duly does."""

    url: str
    errors: tuple[type[Exception], ...] = ()
    tells_time: bool = False

    def leaks(self) -> Sequence[str]:
        """See `Site`. What still waits, and what is still open, is told by `looked_into`."""
        return []

    def drop(self) -> None:
        """See `Site`. The node drops it."""

    def store_without_rows(self, broker: Broker) -> Store:
        """See `PublishesAlone`."""
        return cast(Store, cast(Any, broker).own_store())

    def looked_into(self, broker: Broker, folder: Path) -> _Groups:
        """See `LooksInto`."""
        del broker  # its own groups are those of this process
        return _Groups(address_of(self.url, "kafka://..."), Workload.kept_in(folder))


class _Groups:
    """How far the consumers of a workload are. Asked for all at once: on a machine at work each
    question takes its time.
    """

    def __init__(self, address: Address, workload: Workload) -> None:
        self._address = address
        self._workload = workload
        self._names = Names(address.namespace)
        self._client: Any = _driver.AdminClient(settings(address.common, {}))

    def subscriptions(self) -> Sequence[SubscriptionState]:
        """See `Looked`. Of what is still open in a topic nobody knows whose it is. Raises
        `BrokerUnavailable`.
        """
        try:
            return self._subscriptions()
        except (KafkaException, FutureTimeout) as error:
            raise BrokerUnavailable(f"the node does not say what waits there: {error}") from error

    def _subscriptions(self) -> Sequence[SubscriptionState]:
        places = self._places()
        starts = self._offsets(places, _driver.OffsetSpec.earliest())
        ends = self._offsets(places, _driver.OffsetSpec.latest())
        surely = self._offsets(places, _driver.OffsetSpec.latest(), IsolationLevel.READ_COMMITTED)
        found = [
            SubscriptionState("", topic, 1, 0, 0, 0)
            for topic in sorted({place[0] for place in places if surely[place] < ends[place]})
        ]
        positions = self._positions()
        for spec in self._workload.specs:
            at = {**starts, **positions[self._names.group(spec.name)]}
            waiting, parked = (
                self._records({p: at[p] for p in places if p[0] == topic and at[p] < surely[p]})
                for topic in (self._names.topic(spec.topic.name), self._names.again(spec.name))
            )
            found.append(SubscriptionState(spec.name, spec.topic.name, waiting, 0, parked, 0))
        return found

    def _places(self) -> Sequence[Place]:
        """Every partition of a topic that matters."""
        specs, names = self._workload.specs, self._names
        topics = [*self._workload.topics, *(topic.name for topic in self._workload.outputs)]
        wanted = {*map(names.topic, topics), *(names.again(spec.name) for spec in specs)}
        told = self._client.list_topics(timeout=_ANSWERS_S).topics
        return [(name, n) for name in wanted & told.keys() for n in told[name].partitions]

    def _positions(self) -> dict[str, dict[Place, int]]:
        """Where each group goes on; a group that is not there yet is nowhere."""
        asked: dict[str, Any] = {}
        for spec in self._workload.specs:
            group = ConsumerGroupTopicPartitions(self._names.group(spec.name))
            asked |= self._client.list_consumer_group_offsets([group], request_timeout=_ANSWERS_S)
        found: dict[str, dict[Place, int]] = {}
        for name, future in asked.items():
            try:
                told = future.result(_ANSWERS_S).topic_partitions
            except KafkaException as error:
                if error.args[0].code() != KafkaError.GROUP_ID_NOT_FOUND:
                    raise
                told = ()
            at = {(each.topic, each.partition): each.offset for each in told if each.offset >= 0}
            found[name] = at
        return found

    def _offsets(
        self,
        places: Sequence[Place],
        which: Any,
        level: IsolationLevel = IsolationLevel.READ_UNCOMMITTED,
    ) -> dict[Place, int]:
        told = self._client.list_offsets(
            {TopicPartition(*place): which for place in places},
            isolation_level=level,
            request_timeout=_ANSWERS_S,
        )
        return {
            (place.topic, place.partition): future.result(_ANSWERS_S).offset
            for place, future in told.items()
        }

    def _records(self, places: dict[Place, int]) -> int:
        """How many records there are from these positions on, of what is committed."""
        if not places:
            return 0
        consumer: Any = Consumer(reading(self._address, "duly-chaos"))
        consumer.assign([TopicPartition(*place, offset) for place, offset in places.items()])
        count, left, until_s = 0, set(places), time.monotonic() + _ANSWERS_S
        try:
            while left:
                record = consumer.poll(0.5)
                if time.monotonic() > until_s:
                    raise BrokerUnavailable("the node does not say what waits there")
                if record is None:
                    continue
                error = record.error()
                if error is None:
                    count += 1
                elif error.code() == KafkaError._PARTITION_EOF:
                    left.discard((record.topic(), record.partition()))
                else:
                    raise BrokerUnavailable(f"what waits there cannot be read: {error}")
        finally:
            consumer.close()
        return count


def drop_namespaces(bootstrap: str, names: Sequence[str]) -> None:
    """Delete every topic of these."""
    client = _driver.AdminClient({"bootstrap.servers": bootstrap})
    told = client.list_topics(timeout=_ANSWERS_S).topics
    mine = [topic for topic in told if topic.partition(".")[0] in names]
    for gone in client.delete_topics(mine).values() if mine else ():
        gone.result(_ANSWERS_S)

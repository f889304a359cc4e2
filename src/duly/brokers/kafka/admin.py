"""`Admin`: topics and positions, as the cluster tells and makes them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import Any

from confluent_kafka import (
    ConsumerGroupTopicPartitions,
    IsolationLevel,
    KafkaError,
    KafkaException,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka import admin as driver

from duly.brokers.kafka.address import Address
from duly.brokers.kafka.client import MOVING, broker_error, settings
from duly.errors import BrokerUnavailable, ConfigurationError

# The driver's types do not say that it has these.
NewTopic: Any = driver.NewTopic  # type: ignore[attr-defined]
OffsetSpec: Any = driver.OffsetSpec  # type: ignore[attr-defined]

ANSWERS_S = 10.0
_SETTLES_S = 10.0
_never = threading.Event()

COMPACTED: Mapping[str, str] = {"cleanup.policy": "compact"}
KEPT: Mapping[str, str] = {"cleanup.policy": "delete", "retention.ms": "-1"}


@dataclass(frozen=True, slots=True)
class Found:
    """A topic that is there. ``id`` is that of this incarnation."""

    id: str
    partitions: int


@dataclass(frozen=True, slots=True)
class Wanted:
    """A topic to be made, if it is not there."""

    name: str
    partitions: int
    config: Mapping[str, str]


class Admin:
    """One client for all that is asked of the cluster; safe to use from any thread."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._client = driver.AdminClient(settings(address.common, {}))
        self._cluster = ""

    @property
    def cluster(self) -> str:
        """The id of the cluster. Raises `BrokerError`."""
        if not self._cluster:
            told = self._answer(
                self._client.describe_cluster(request_timeout=ANSWERS_S), "the cluster"
            )
            self._cluster = str(told.cluster_id)
        return self._cluster

    def find(self, topics: Iterable[str]) -> Mapping[str, Found]:
        """Those of these topics that are there."""
        names = list(topics)
        if not names:
            return {}
        found = {}
        for name, future in self._client.describe_topics(
            TopicCollection(names), request_timeout=ANSWERS_S
        ).items():
            try:
                told = _result(future)
            except KafkaException as error:
                if error.args[0].code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
                    continue
                raise broker_error(error, f"topic {name!r}") from error
            found[name] = Found(str(told.topic_id), len(told.partitions))
        return found

    def make(self, wanted: Iterable[Wanted]) -> None:
        """Make these, unless they are there; returns when they are seen, which is a moment after
        they are made.
        """
        wanted = list(wanted)
        topics = [
            NewTopic(
                each.name,
                num_partitions=each.partitions,
                replication_factor=self._address.replication,
                config={**self._address.takes, **each.config},
            )
            for each in wanted
        ]
        for name, future in (
            self._client.create_topics(topics, request_timeout=ANSWERS_S).items() if topics else ()
        ):
            try:
                _result(future)
            except KafkaException as error:
                if error.args[0].code() == KafkaError.TOPIC_EXCEPTION:
                    raise ConfigurationError(
                        f"topic {name!r} cannot be made: {error.args[0].str()}"
                    ) from error
                if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                    raise broker_error(error, f"topic {name!r} could not be made") from error

        names, until = {each.name for each in wanted}, time.monotonic() + _SETTLES_S
        while not names <= self.find(names).keys():
            if time.monotonic() > until:
                raise BrokerUnavailable(f"topics were made, and are not seen: {sorted(names)}")
            _never.wait(0.02)

    def ends(self, places: Iterable[tuple[str, int]]) -> Mapping[tuple[str, int], int]:
        """Where each partition ends, for a reader of what is committed."""
        return self._offsets(dict.fromkeys(places, OffsetSpec.latest()))

    def starts(self, places: Iterable[tuple[str, int]], at: Any) -> Mapping[tuple[str, int], int]:
        """Where to begin: at the oldest that is kept, after the newest, or at a time."""
        places = list(places)
        if at == "latest":
            return self.ends(places)
        if at == "earliest":
            return self._offsets(dict.fromkeys(places, OffsetSpec.earliest()))
        found = self._offsets(
            dict.fromkeys(places, OffsetSpec.for_timestamp(int(at.timestamp() * 1000)))
        )
        late = [place for place, offset in found.items() if offset < 0]
        return {**found, **(self.ends(late) if late else {})}

    def _offsets(self, asked: Mapping[tuple[str, int], Any]) -> Mapping[Any, int]:
        until = time.monotonic() + _SETTLES_S
        while asked:
            futures = self._client.list_offsets(
                {TopicPartition(*place): spec for place, spec in asked.items()},
                isolation_level=IsolationLevel.READ_COMMITTED,
                request_timeout=ANSWERS_S,
            )
            try:
                told = {place: _result(future) for place, future in futures.items()}
                return {(each.topic, each.partition): found.offset for each, found in told.items()}
            except KafkaException as error:
                if error.args[0].code() not in MOVING or time.monotonic() > until:
                    raise broker_error(
                        error, "where partitions begin and end is not known"
                    ) from error
            _never.wait(0.02)
        return {}

    def delete_before(self, topic: str, offset: int) -> None:
        """Delete what stands before this offset of a topic with one partition."""
        asked = self._client.delete_records(
            [TopicPartition(topic, 0, offset)], request_timeout=ANSWERS_S
        )
        for future in asked.values():
            self._answer(future, f"records of {topic!r}")

    def positions(self, group: str) -> Sequence[TopicPartition]:
        """What a group has committed."""
        asked = self._client.list_consumer_group_offsets(
            [ConsumerGroupTopicPartitions(group)], request_timeout=ANSWERS_S
        )
        try:
            told = _result(asked[group])
        except KafkaException as error:
            if error.args[0].code() == KafkaError.GROUP_ID_NOT_FOUND:
                return []
            raise broker_error(error, f"group {group!r}") from error
        return [each for each in told.topic_partitions if each.offset >= 0]

    def members(self, group: str) -> int:
        """How many processes consume as this group."""
        asked = self._client.describe_consumer_groups([group], request_timeout=ANSWERS_S)
        try:
            return len(_result(asked[group]).members)
        except KafkaException as error:
            if error.args[0].code() == KafkaError.GROUP_ID_NOT_FOUND:
                return 0
            raise broker_error(error, f"group {group!r}") from error

    def _answer(self, future: Any, what: str) -> Any:
        try:
            return _result(future)
        except KafkaException as error:
            raise broker_error(error, f"{what}: nothing is known") from error


def _result(future: Any) -> Any:
    """What was asked for. Raises the driver's error, or `BrokerUnavailable` where there is none."""
    try:
        return future.result(ANSWERS_S + 2.0)
    except FutureTimeout as error:
        raise BrokerUnavailable(
            f"Kafka has not answered within {ANSWERS_S:.0f} s; look whether it can be reached"
        ) from error

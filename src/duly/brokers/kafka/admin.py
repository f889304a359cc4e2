"""`Admin`: topics and positions, as the cluster tells and makes them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
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

from duly.brokers.kafka import silence
from duly.brokers.kafka.address import Address
from duly.brokers.kafka.client import MOVING, broker_error, settings
from duly.brokers.kafka.looking import ANSWERS_S, Seen, cluster_of, look, result
from duly.errors import BrokerError, BrokerUnavailable, ConfigurationError
from duly.message import Topic

# The driver's types do not say that it has these.
NewTopic: Any = driver.NewTopic  # type: ignore[attr-defined]
OffsetSpec: Any = driver.OffsetSpec  # type: ignore[attr-defined]

_SETTLES_S = 10.0
# Of a partition where a transaction is open just now readers come further soon.
_LOOKS_AGAIN_S = 0.5
_WEEK_MS = 7 * 86_400_000
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
    """All that is asked of the cluster; safe to use from any thread."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._client = driver.AdminClient(settings(address.common, {}))
        # One is asked for nothing but where partitions begin and end: librdkafka 2.16 frees that
        # request twice where another thread asks what topics there are by the same client.
        self._asking = driver.AdminClient(settings(address.common, {}))
        self._cluster = ""
        self._was_answered = False

    @property
    def cluster(self) -> str:
        """The id of the cluster. Raises `BrokerError`."""
        if not self._cluster:
            try:
                self._cluster, _ = cluster_of(self._client)
            except KafkaException as error:
                raise self._wrong(error, "the cluster: nothing is known") from error
            self._was_answered = True
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
                told = result(future)
            except KafkaException as error:
                if error.args[0].code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
                    self._was_answered = True
                    continue
                raise self._wrong(error, f"topic {name!r}") from error
            self._was_answered = True
            found[name] = Found(str(told.topic_id), len(told.partitions))
        return found

    def look(self, topics: Iterable[str], groups: Iterable[str]) -> Seen:
        """What can be seen of the cluster and of these. Raises `BrokerError`."""
        try:
            return look(self._client, self._address, topics, groups)
        except KafkaException as error:
            raise self._wrong(error, "the cluster: nothing is known") from error

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
                result(future)
            except KafkaException as error:
                if error.args[0].code() == KafkaError.TOPIC_EXCEPTION:
                    raise ConfigurationError(
                        f"topic {name!r} cannot be made: {error.args[0].str()}"
                    ) from error
                if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                    raise broker_error(
                        error, f"topic {name!r} could not be made on {self._address.bootstrap}"
                    ) from error

        names, until = {each.name for each in wanted}, time.monotonic() + _SETTLES_S
        while not names <= self.find(names).keys():
            if time.monotonic() > until:
                raise BrokerUnavailable(f"topics were made, and are not seen: {sorted(names)}")
            _never.wait(0.02)

    def ends(self, places: Iterable[tuple[str, int]]) -> Mapping[tuple[str, int], int]:
        """Where each partition ends, for a reader of what is committed."""
        return self._offsets(dict.fromkeys(places, OffsetSpec.latest()))

    def standing(self, topics: Iterable[str]) -> Mapping[tuple[str, int], int]:
        """Partitions of these where readers of what is committed stand before what is there, and
        do not come further for a moment, and where that is. Raises `BrokerError`.
        """
        before = self.held_up(topics)
        if before:
            _never.wait(_LOOKS_AGAIN_S)
        after = self._held_up(before)
        return {place: at for place, (at, _) in before.items() if after.get(place, (-1,))[0] == at}

    def held_up(self, topics: Iterable[str]) -> Mapping[tuple[str, int], tuple[int, int]]:
        """Partitions of these where readers of what is committed stand before what is there just
        now: where they stand, and where it ends. Raises `BrokerError`.
        """
        found = self.find(topics)
        return self._held_up([(name, n) for name, f in found.items() for n in range(f.partitions)])

    def written(self, topic: str) -> Mapping[tuple[str, int], tuple[int, int]]:
        """Of each partition of this where it begins and ends, whatever is open there. Raises
        `BrokerError`.
        """
        found = self.find([topic])
        places = [(name, n) for name, each in found.items() for n in range(each.partitions)]
        first = self._offsets(dict.fromkeys(places, OffsetSpec.earliest()))
        latest = dict.fromkeys(places, OffsetSpec.latest())
        ends = self._offsets(latest, IsolationLevel.READ_UNCOMMITTED)
        return {place: (at, ends[place]) for place, at in first.items()}

    def _held_up(
        self, places: Iterable[tuple[str, int]]
    ) -> Mapping[tuple[str, int], tuple[int, int]]:
        asked = dict.fromkeys(places, OffsetSpec.latest())
        seen = self._offsets(asked)
        there = self._offsets(asked, IsolationLevel.READ_UNCOMMITTED)
        return {place: (at, there[place]) for place, at in seen.items() if at < there[place]}

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

    def _offsets(
        self,
        asked: Mapping[tuple[str, int], Any],
        isolation: IsolationLevel = IsolationLevel.READ_COMMITTED,
    ) -> Mapping[Any, int]:
        until = time.monotonic() + _SETTLES_S
        while asked:
            futures = self._asking.list_offsets(
                {TopicPartition(*place): spec for place, spec in asked.items()},
                isolation_level=isolation,
                request_timeout=ANSWERS_S,
            )
            try:
                told = {place: result(future) for place, future in futures.items()}
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
            told = result(asked[group])
        except KafkaException as error:
            if error.args[0].code() == KafkaError.GROUP_ID_NOT_FOUND:
                return []
            raise broker_error(error, f"group {group!r}") from error
        return [each for each in told.topic_partitions if each.offset >= 0]

    def members(self, group: str) -> int:
        """How many processes consume as this group."""
        asked = self._client.describe_consumer_groups([group], request_timeout=ANSWERS_S)
        try:
            return len(result(asked[group]).members)
        except KafkaException as error:
            if error.args[0].code() == KafkaError.GROUP_ID_NOT_FOUND:
                return 0
            raise broker_error(error, f"group {group!r}") from error

    def _answer(self, future: Any, what: str) -> Any:
        try:
            told = result(future)
        except KafkaException as error:
            raise self._wrong(error, f"{what}: nothing is known") from error
        self._was_answered = True
        return told

    def _wrong(self, error: KafkaException, what: str) -> BrokerError:
        """What is to be raised. Of one that has never answered somebody looks for the reason."""
        why = None
        if not self._was_answered and silence.is_silence(error.args[0]):
            why = silence.reason(self._address)
        return broker_error(why or error, what)


def config_of(topic: Topic[Any]) -> dict[str, str]:
    """What a topic is made with. Longer than the cluster's own retention where it asks for that,
    and never shorter: Kafka deletes what nobody has handled yet.
    """
    kept_ms = int(topic.retention_s * 1000)
    return {"retention.ms": str(kept_ms)} if kept_ms > _WEEK_MS else {}

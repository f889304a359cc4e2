"""What a cluster tells to who may ask: its brokers and their settings, topics, what is allowed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from typing import Any

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka import admin as driver

from duly.brokers.kafka.address import Address
from duly.brokers.kafka.features import TRANSACTIONS, levels
from duly.errors import BrokerUnavailable

# The driver's types do not say that it has these.
ConfigResource: Any = driver.ConfigResource  # type: ignore[attr-defined]

ANSWERS_S = 10.0
_ASKS_AGAIN_S = 0.1
_never = threading.Event()

Settings = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Layout:
    """A topic that is there: of how many copies the partition is that has the fewest, and what this
    login may do with it (empty: not told).
    """

    copies: int
    may: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen. A topic of which ``layouts`` knows and ``topics`` does not is there, and its
    settings could not be read. ``groups``: what may be done with those that are there.
    ``transactions``: their version on the cluster, where it was told.
    """

    cluster: str
    brokers: Mapping[int, Settings]
    count: int
    layouts: Mapping[str, Layout]
    topics: Mapping[str, Settings]
    groups: Mapping[str, frozenset[str]] = field(default_factory=dict)
    unseen: Sequence[str] = ()
    transactions: int | None = None


def result(future: Any) -> Any:
    """What was asked for. Raises the driver's error, or `BrokerUnavailable` where there is none."""
    try:
        return future.result(ANSWERS_S + 2.0)
    except FutureTimeout as error:
        raise BrokerUnavailable(
            f"Kafka has not answered within {ANSWERS_S:.0f} s; look whether it can be reached"
        ) from error


def cluster_of(client: Any) -> tuple[str, Sequence[int]]:
    """The id of the cluster, and the numbers of its brokers. Raises the driver's error.

    Asked for as any client asks what there is. To describe the cluster is another call, in which
    librdkafka 2.16 ends the process where a node that has only just begun answers that it knows of
    no broker; here that is an error of the driver's, and asked again.
    """
    until = time.monotonic() + ANSWERS_S
    while True:
        try:
            told = client.list_topics(timeout=max(0.1, until - time.monotonic()))
        except KafkaException as error:
            if error.args[0].code() != KafkaError._PARTIAL or time.monotonic() > until:
                raise
            _never.wait(_ASKS_AGAIN_S)
        else:
            return str(told.cluster_id), [*told.brokers]


def look(client: Any, address: Address, topics: Iterable[str], groups: Iterable[str]) -> Seen:
    """Look at the brokers, and at those of these topics and groups that are there.

    Raises `BrokerUnavailable` and the driver's error where nothing answers at all.
    """
    unseen: list[str] = []
    cluster, numbers = cluster_of(client)
    layouts = _layouts(client, topics, unseen)
    asked = [ConfigResource(ConfigResource.Type.TOPIC, name) for name in layouts]
    settings = _settings(client, [asked] if asked else [], "topic", unseen)
    # At most one broker a call, for each is asked itself.
    each = [[ConfigResource(ConfigResource.Type.BROKER, str(number))] for number in numbers]
    brokers = _settings(client, each, "broker", unseen)
    return Seen(
        cluster=cluster,
        brokers={int(name): found for name, found in brokers.items()},
        count=len(numbers),
        layouts=layouts,
        topics=settings,
        groups=_groups(client, groups, unseen),
        transactions=_transactions(address, unseen),
        unseen=unseen,
    )


def _transactions(address: Address, unseen: list[str]) -> int | None:
    try:
        return levels(address).get(TRANSACTIONS, 0)
    except (OSError, ValueError) as error:
        unseen.append(f"the features of the cluster not looked at: {error}")
        return None


def _layouts(client: Any, topics: Iterable[str], unseen: list[str]) -> Mapping[str, Layout]:
    names = list(topics)
    if not names:
        return {}
    asked = client.describe_topics(
        TopicCollection(names), include_authorized_operations=True, request_timeout=ANSWERS_S
    )
    found = {}
    for name, future in asked.items():
        told = _told(future, f"topic {name!r}", KafkaError.UNKNOWN_TOPIC_OR_PART, unseen)
        if told is not None:
            copies = min((len(each.replicas) for each in told.partitions), default=0)
            found[name] = Layout(copies, _may(told))
    return found


def _groups(client: Any, groups: Iterable[str], unseen: list[str]) -> Mapping[str, frozenset[str]]:
    names = list(groups)
    if not names:
        return {}
    asked = client.describe_consumer_groups(
        names, include_authorized_operations=True, request_timeout=ANSWERS_S
    )
    found = {}
    for name, future in asked.items():
        told = _told(future, f"group {name!r}", KafkaError.GROUP_ID_NOT_FOUND, unseen)
        if told is not None:
            found[name] = _may(told)
    return found


def _told(future: Any, what: str, missing: int, unseen: list[str]) -> Any:
    """What was told of one thing; None where it is not there, or may not be seen."""
    try:
        return result(future)
    except KafkaException as error:
        if error.args[0].code() != missing:
            unseen.append(_not_looked_at(what, error))
        return None


def _may(told: Any) -> frozenset[str]:
    return frozenset(operation.name for operation in told.authorized_operations or ())


def _settings(
    client: Any, calls: Iterable[Sequence[Any]], what: str, unseen: list[str]
) -> dict[str, Settings]:
    """Settings that are set, by the name of what has them; secrets are not told."""
    asked: dict[Any, Any] = {}
    for resources in calls:
        asked |= client.describe_configs(resources, request_timeout=ANSWERS_S)
    found: dict[str, Settings] = {}
    for resource, future in asked.items():
        try:
            told: Mapping[str, Any] = result(future)
        except KafkaException as error:
            unseen.append(_not_looked_at(f"the settings of {what} {resource.name!r}", error))
            continue
        found[resource.name] = {
            name: entry.value for name, entry in told.items() if entry.value is not None
        }
    return found


def _not_looked_at(what: str, error: KafkaException) -> str:
    return f"{what} not looked at: {error.args[0].str()} ({error.args[0].name()})"

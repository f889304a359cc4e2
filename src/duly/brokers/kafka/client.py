"""What every client of the driver is given beside the address, and what its errors mean."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from confluent_kafka import KafkaError, KafkaException

from duly.brokers.kafka.address import Address
from duly.errors import BrokerError, BrokerUnavailable, BrokerUnusable

log = logging.getLogger("duly.kafka")

# What concerns single connections, ten times a second while nobody listens; who wants to see it
# sets the level of this logger.
_quiet = logging.getLogger("duly.kafka.driver")
if _quiet.level == logging.NOTSET:
    _quiet.setLevel(logging.CRITICAL)

READ_COMMITTED: Mapping[str, Any] = {
    "enable.auto.commit": False,
    "enable.auto.offset.store": False,
    "auto.offset.reset": "error",
    "isolation.level": "read_committed",
    "enable.partition.eof": True,
    # A topic that was made a moment ago may be unknown to the broker that is asked first.
    "topic.metadata.refresh.interval.ms": 5000,
    # An answer that waits for messages holds up what else is asked on that connection.
    "fetch.wait.max.ms": 100,
    "fetch.queue.backoff.ms": 20,
    "queued.max.messages.kbytes": 32 * 1024,
    "allow.auto.create.topics": False,
}

# A topic that was just made, and one whose leader changes, answer so for a moment.
MOVING = frozenset(
    {
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError.FENCED_LEADER_EPOCH,
        KafkaError.UNKNOWN_LEADER_EPOCH,
        KafkaError._NOENT,
        KafkaError._UNKNOWN_TOPIC,
        KafkaError._UNKNOWN_PARTITION,
    }
)

_DENIED = frozenset(
    {
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.GROUP_AUTHORIZATION_FAILED,
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
        KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
        KafkaError.SASL_AUTHENTICATION_FAILED,
        KafkaError._AUTHENTICATION,
        KafkaError.UNSUPPORTED_VERSION,
    }
)


def settings(given: Mapping[str, str], more: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of one client."""
    return {
        "topic.metadata.refresh.interval.ms": 30_000,
        "reconnect.backoff.max.ms": 1000,
        "log_level": 3,
        "logger": _quiet,
        **given,
        **more,
    }


def reading(address: Address, group: str) -> dict[str, Any]:
    """The settings of a reader that is no member of a group; the driver wants a name all the
    same.
    """
    return settings(address.common, {**READ_COMMITTED, "group.id": group})


def broker_error(error: KafkaException | KafkaError, what: str) -> BrokerError:
    """What the driver raised, as duly tells it."""
    reason = error.args[0] if isinstance(error, KafkaException) else error
    if isinstance(reason, KafkaError):
        text = f"{what}: {reason.str()} ({reason.name()})"
        if reason.code() in _DENIED:
            return BrokerUnusable(text)
        return BrokerUnavailable(text)
    return BrokerUnavailable(f"{what}: {reason}")

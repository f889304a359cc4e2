"""What every client of the driver is given beside the address, and what its errors mean."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException

from duly.brokers.kafka.address import SESSION_TIMEOUT_MS, Address
from duly.errors import BrokerError, BrokerUnavailable, BrokerUnusable, ConfigurationError

log = logging.getLogger("duly.kafka")

# What concerns single connections, ten times a second while nobody listens; who wants to see it
# sets the level of this logger.
quiet = logging.getLogger("duly.kafka.driver")
if quiet.level == logging.NOTSET:
    quiet.setLevel(logging.CRITICAL)

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

_CLASSIC = {
    "partition.assignment.strategy": "cooperative-sticky",
    "session.timeout.ms": str(SESSION_TIMEOUT_MS),
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
        "logger": quiet,
        **given,
        **more,
    }


def check_consuming(address: Address, shown: str) -> None:
    """As `check_options`, of a member of a group."""
    check_options(Consumer, consuming(address, "options", lambda *_: None), shown)


def check_options(kind: Any, given: Mapping[str, Any], shown: str) -> None:
    """Have the driver look at the options of a client, before anything depends on them. Raises
    `ConfigurationError`.
    """
    try:
        client = kind({**given, "bootstrap.servers": ""})  # it is not to look for anybody
    except KafkaException as error:
        raise ConfigurationError(f"{shown!r}: {error.args[0].str().strip()}") from error
    if kind is Consumer:
        client.close()


def consuming(address: Address, group: str, committed: Callable[..., None]) -> dict[str, Any]:
    """The settings of a member of a group; ``committed`` is told what became of its positions."""
    return settings(
        {**({} if address.is_new_protocol else _CLASSIC), **address.consuming},
        {**READ_COMMITTED, "group.id": group, "on_commit": committed},
    )


def reading(address: Address, group: str) -> dict[str, Any]:
    """The settings of a reader that is no member of a group; the driver wants a name all the
    same.
    """
    return settings(address.common, {**READ_COMMITTED, "group.id": group})


def _is_untrusted(error: KafkaError) -> bool:
    """Whether a certificate is refused, by whichever side: that does not mend itself, as a
    connection does that was ended while it was made.
    """
    text = error.str().lower()
    return error.code() == KafkaError._SSL and ("verif" in text or "alert" in text)


def broker_error(error: KafkaException | KafkaError, what: str) -> BrokerError:
    """What the driver raised, as duly tells it."""
    reason = error.args[0] if isinstance(error, KafkaException) else error
    if isinstance(reason, KafkaError):
        text = f"{what}: {reason.str()} ({reason.name()})"
        if reason.code() in _DENIED or _is_untrusted(reason):
            return BrokerUnusable(text)
        return BrokerUnavailable(text)
    return BrokerUnavailable(f"{what}: {reason}")

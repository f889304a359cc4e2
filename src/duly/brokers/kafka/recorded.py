"""What is recorded of topics and subscriptions for as long as there are any, and not to change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from duly.broker import SubscribeOptions
from duly.brokers.kafka.records import Records
from duly.errors import ConfigurationError
from duly.guarantees import Guarantee
from duly.message import Topic

_WORKED = {"store": "with a database as store", "transactions": "by Kafka's transactions alone"}


def check_promises(topics: Iterable[Topic[Any]], recorded: Mapping[str, str]) -> None:
    """Raises `ConfigurationError` for a topic that is recorded with another guarantee."""
    for topic in topics:
        text = recorded.get(f"topic/{topic.name}", str(topic.guarantee))
        if text != str(topic.guarantee):
            raise ConfigurationError(
                f"topic {topic.name!r} is there with guarantee {text}, and declared with "
                f"{topic.guarantee}. Give it another name, or declare it as it is there."
            )


def key_lanes_of(options: SubscribeOptions, *, transactional: bool) -> int:
    """Into how many lanes of keys a subscription cuts each partition. ``transactional``: positions
    are committed by transactions of Kafka's, of which a partition has one.
    """
    cuts = options.guarantee is Guarantee.EXACTLY_ONCE and not transactional
    return options.key_lanes if cuts else 1


def check_subscription(
    records: Records, subscription: str, options: SubscribeOptions, *, transactional: bool
) -> None:
    """Record how this subscription is worked, unless that is recorded. Raises
    `ConfigurationError` where it was worked otherwise, and `BrokerError`.
    """
    wanted, key = str(options.guarantee), f"subscription/{subscription}"
    kept, by = "", f"effects/{subscription}"
    if options.guarantee is Guarantee.EXACTLY_ONCE:
        kept = "transactions" if transactional else "store"
    lanes = key_lanes_of(options, transactional=transactional)
    if kept:
        _check_key_lanes(records, subscription, lanes, by)
    fixed = records.fix({key: wanted, **({by: kept} if kept else {})})
    found = fixed[key]
    if found == wanted and kept and fixed[by] != kept:
        raise ConfigurationError(
            f"subscription {subscription!r} was worked {_WORKED[fixed[by]]}, and is now to be "
            f"{_WORKED[kept]}: what took effect is remembered in another place. Give the "
            "consumer a new name."
        )
    if found != wanted:
        raise ConfigurationError(
            f"subscription {subscription!r} is recorded as {found!r}, and this consumer "
            f"declares {wanted!r}. What was promised so far would no longer hold: give the "
            "consumer a new name, or declare the recorded guarantee."
        )


def _check_key_lanes(records: Records, subscription: str, lanes: int, by: str) -> None:
    """Raises `ConfigurationError` for another number than it began with: each lane has a cursor of
    its own, and in another one the same message would take effect once more.
    """
    key = f"lanes/{subscription}"
    found = records.found([key, by])
    if key not in found and by not in found:
        # Before the record that it was worked at all: who has read that one has read this.
        found = records.fix({key: str(lanes)})
    began = int(found.get(key, "1"))
    if began != lanes:
        raise ConfigurationError(
            f"subscription {subscription!r} began with key_lanes={began}, and this consumer "
            f"declares key_lanes={lanes}: what took effect is remembered by lane. Declare "
            f"key_lanes={began}, or give the consumer a new name."
        )

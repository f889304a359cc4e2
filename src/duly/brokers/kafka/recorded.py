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
    kept = ""
    if options.guarantee is Guarantee.EXACTLY_ONCE:
        kept = "transactions" if transactional else "store"
    key, by, lanes = (f"{what}/{subscription}" for what in ("subscription", "effects", "lanes"))
    wanted = {key: str(options.guarantee), **({by: kept} if kept else {})}
    found = records.found([*wanted, by, lanes])
    _check(subscription, {**wanted, **found}, wanted, key, by)
    if kept and lanes not in found and by not in found:
        # Before the record that it was worked at all: who has read that one has read this.
        found = records.fix({lanes: str(options.key_lanes)})
    began = int(found.get(lanes, "1"))
    if kept and began != options.key_lanes:
        # Each lane has a cursor of its own: in another the same message takes effect once more.
        raise ConfigurationError(
            f"subscription {subscription!r} began with key_lanes={began}, and this consumer "
            f"declares key_lanes={options.key_lanes}: what took effect is remembered by lane. "
            f"Declare key_lanes={began}, or give the consumer a new name."
        )
    fixed = records.fix({lanes: str(began), **wanted} if kept else wanted)
    _check(subscription, fixed, wanted, key, by)


def _check(
    subscription: str, found: Mapping[str, str], wanted: Mapping[str, str], key: str, by: str
) -> None:
    if found[key] != wanted[key]:
        raise ConfigurationError(
            f"subscription {subscription!r} is recorded as {found[key]!r}, and this consumer "
            f"declares {wanted[key]!r}. What was promised so far would no longer hold: give the "
            "consumer a new name, or declare the recorded guarantee."
        )
    if by in wanted and found[by] != wanted[by]:
        raise ConfigurationError(
            f"subscription {subscription!r} was worked {_WORKED[found[by]]}, and is now to be "
            f"{_WORKED[wanted[by]]}: what took effect is remembered in another place. Give the "
            "consumer a new name."
        )

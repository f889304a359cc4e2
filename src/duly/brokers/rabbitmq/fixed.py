"""What is checked of a subscription: what none here can have, and what cannot change once it is
there, which every process that comes asks again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from duly.broker import SubscribeOptions
from duly.errors import ConfigurationError
from duly.message import Topic

Recorded = Callable[[str, str, str], str]
"""Kind, name and text of a record; returns what is recorded, which may be another's text."""

# Channels for what is asked now and then, and for dead letters.
_SPARE_CHANNELS = 8


def check_options(subscription: str, options: SubscribeOptions) -> None:
    """What no subscription here can have. Raises `ConfigurationError`."""
    if options.hold_key_on_dead:
        raise ConfigurationError(
            f"subscription {subscription!r} asks for hold_key_on_dead=True, and RabbitMQ keeps "
            "dead letters apart from what waits behind them: leave it out, or use a broker "
            "that holds keys"
        )
    if not isinstance(options.start, str):
        raise ConfigurationError(
            f"subscription {subscription!r}: start={options.start}: RabbitMQ keeps nothing "
            "for those who come later; a subscription begins when it is first made"
        )


def check_channels(topics: Sequence[Topic[Any]], subscription: str, taken: int, most: int) -> None:
    """In order by key each partition has a channel of its own, and a connection no more than
    ``most``, of which others have ``taken`` some. Raises `ConfigurationError`.
    """
    partitions = sum(topic.partitions for topic in topics)
    if taken + partitions + 1 + _SPARE_CHANNELS > most:
        raise ConfigurationError(
            f"subscription {subscription!r} has {partitions:,} partitions, each of which needs a "
            f"channel; the server allows a connection {most:,}, of which the other consumers of "
            f"this process take {taken:,}. Raise channel_max in its rabbitmq.conf, declare the "
            "topic with fewer partitions under another name, or let another process work some of "
            "the consumers."
        )


def check_order(
    recorded: Recorded, topics: Sequence[Topic[Any]], subscription: str, *, order_by_key: bool
) -> None:
    """Whether a subscription is worked in order by key is fixed: it has other queues then. Raises
    `ConfigurationError`.
    """
    for topic in topics:
        if order_by_key and not topic.partitions:
            raise ConfigurationError(
                f"subscription {subscription!r} asks for order by key, and topic {topic.name!r} "
                "has no order: declare it with partitions=1 or more"
            )
    if not any(topic.partitions for topic in topics):
        return
    wanted = f"order_by_key={order_by_key}"
    found = recorded("order", subscription, wanted)
    if found != wanted:
        raise ConfigurationError(
            f"subscription {subscription!r} is there with {found}, and this consumer declares "
            f"{wanted}. Its messages wait in other queues: give the consumer a new name, or "
            "declare it as it is there."
        )

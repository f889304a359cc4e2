"""What cannot change once it is there, and is asked again by every process that comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from duly.errors import ConfigurationError
from duly.message import Topic

Recorded = Callable[[str, str, str], str]
"""Kind, name and text of a record; returns what is recorded, which may be another's text."""


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

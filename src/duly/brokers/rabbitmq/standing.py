"""`Standing`: what this process has declared, and which topics do not stand as they were."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from duly.broker import SubscribeOptions
from duly.brokers.rabbitmq.link import CHANNEL_ENDED, Connection, Link
from duly.brokers.rabbitmq.rest import Rest
from duly.brokers.rabbitmq.topology import Names, declare_subscription, declare_topic
from duly.errors import BrokerError, ConfigurationError
from duly.guarantees import Guarantee
from duly.message import Topic

log = logging.getLogger("duly.rabbitmq")

_ASK_S = 10.0
_WRONG = (ConfigurationError, BrokerError, CHANNEL_ENDED)


@dataclass(slots=True)
class _Wrong:
    why: str = ""
    rest: Rest = field(default_factory=Rest)


class Standing:
    """Topics and subscriptions, to be declared again with each connection: an exchange may be gone,
    and with it who listened. One that somebody made otherwise meanwhile is its own topic's matter:
    nothing is published to that, for some who are to get it would not, and the others go on.
    """

    def __init__(self, names: Names) -> None:
        self.topics: dict[str, Topic[Any]] = {}
        # Subscriptions that were made, and by how many partitions each is divided.
        self.known: dict[tuple[str, str], int] = {}
        self._names = names
        # Those of them that are at-most-once.
        self._taken_once: set[tuple[str, str]] = set()
        self._wrong: dict[str, _Wrong] = {}

    def note(self, topic: Topic[Any], subscription: str, options: SubscribeOptions) -> None:
        """This subscription was made."""
        self.known[topic.name, subscription] = topic.partitions if options.order_by_key else 0
        if options.guarantee is Guarantee.AT_MOST_ONCE:
            self._taken_once.add((topic.name, subscription))

    def declare_topics(self, connection: Connection) -> None:
        """Exchanges alone, for who consumes and declares his queues himself."""
        for topic in list(self.topics.values()):
            try:
                self._declare_topic(connection, topic)
            except _WRONG as error:
                log.warning("topic %r cannot be declared: %s", topic.name, error)

    def declare_all(self, connection: Connection) -> None:
        """Everything, and note what is wrong with which topic."""
        for topic in list(self.topics.values()):
            self._declare(connection, topic)

    def _declare(self, connection: Connection, topic: Topic[Any]) -> None:
        try:
            self._declare_topic(connection, topic)
            for of, partitions in self._of(topic):
                once = of in self._taken_once
                declare_subscription(connection, self._names, *of, partitions, once=once)
        except _WRONG as error:
            log.warning("topic %r: nothing is published to it: %s", topic.name, error)
            wrong = self._wrong.get(topic.name)
            if wrong is None:
                wrong = self._wrong[topic.name] = _Wrong()
                wrong.rest.begin()
            wrong.why = str(error)
        else:
            self._wrong.pop(topic.name, None)

    def _declare_topic(self, connection: Connection, topic: Topic[Any]) -> None:
        declare_topic(connection, self._names, topic.name, topic.partitions)

    def _of(self, topic: Topic[Any]) -> Iterable[tuple[tuple[str, str], int]]:
        return [each for each in list(self.known.items()) if each[0][0] == topic.name]

    def why_not(self, topic: Topic[Any], link: Link) -> str | None:
        """Why nothing may be published to a topic; asked of the server again now and then."""
        wrong = self._wrong.get(topic.name)
        if wrong is None:
            return None
        if wrong.rest.is_over and link.is_up:
            wrong.rest.begin()  # one asks for all
            try:
                link.call(lambda connection: self._declare(connection, topic), _ASK_S)
            except BrokerError as error:
                return f"{wrong.why} (asked again: {error})"
        return wrong.why if topic.name in self._wrong else None

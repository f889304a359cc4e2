"""What stands on the server: exchanges, queues, and records of what is fixed about them.

==============================  ================================================================
``duly/<topic>``                a fanout exchange: where a topic's messages are published
``duly/<topic>/<consumer>``     a quorum queue bound to it: what one subscription has to do
``.../<consumer>/alone``        suspects: what somebody died with is worked one at a time
``.../<consumer>/dead``         what the server gave up on, on its way to the dead letters
``duly/dead``                   a stream: dead letters of apps without a store
``duly/delay/<ms>``             an exchange and a queue from which messages go on after so long
``duly/is/...``                 records
==============================  ================================================================

``duly`` is the namespace. A record is an exchange that nobody publishes to; its alternate exchange,
which there need not be, is the text recorded. Declaring it again with another text is refused by
the server, which names the one that is there: so AMQP alone compares, whoever comes first.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from duly.brokers.rabbitmq.link import DENIED, NOT_FOUND, REFUSED, Connection
from duly.errors import BrokerUnavailable, ConfigurationError

_MAX_NAME_BYTES = 255
# Back from the dead so often is a fault of its own: the server then moves it to the dead letters.
# Without the argument 4.x drops a message after 20, and an older server never gives up.
_DELIVERY_LIMIT = 1000
_ALONE_LIMIT = 1_000_000
_CURRENT = re.compile(r"but current is (?:the value )?'(.*?)'(?: of type .*)?$")


class Names:
    """What things are called in one namespace. No name of duly's has a slash in it."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace

    def topic(self, topic: str) -> str:
        """The exchange of a topic."""
        return self._fitting("", topic)

    def queue(self, topic: str, subscription: str) -> str:
        """What a subscription has to do of a topic."""
        return self._fitting("", topic, subscription)

    def alone(self, topic: str, subscription: str) -> str:
        """What it has to do one at a time."""
        return self._fitting("/alone", topic, subscription)

    def dead(self, topic: str, subscription: str) -> str:
        """What the server gave up on for it."""
        return self._fitting("/dead", topic, subscription)

    @property
    def letters(self) -> str:
        """The dead letters of apps without a store."""
        return f"{self.namespace}/dead"

    def delay(self, delay_ms: int) -> str:
        """The exchange and the queue of one length of time."""
        return f"{self.namespace}/delay/{delay_ms}"

    def record(self, kind: str, name: str) -> str:
        """The record of something."""
        return f"{self.namespace}/is/{kind}/{name}"

    def _fitting(self, end: str, *parts: str) -> str:
        name = "/".join((self.namespace, *parts))
        if len(name) + len(end) > _MAX_NAME_BYTES:
            digest = hashlib.blake2b(name.encode(), digest_size=12).hexdigest()
            name = f"{name[: _MAX_NAME_BYTES - len(end) - 25]}~{digest}"
        return name + end


def record(connection: Connection, name: str, text: str) -> str:
    """What is recorded under a name: this text, unless there was one before."""
    channel = connection.channel()
    try:
        channel.exchange_declare(
            *(name, "direct"),
            durable=True,
            auto_delete=False,
            arguments={"alternate-exchange": text},
        )
        return text
    except REFUSED as error:
        found = _CURRENT.search(str(error))
        if found is None:
            raise ConfigurationError(f"the record {name!r} cannot be read: {error}") from None
        return found[1]
    finally:
        channel.close()


def declare_topic(connection: Connection, names: Names, topic: str) -> None:
    """The exchange of a topic. Raises `ConfigurationError` where it is there as another."""
    channel = connection.channel()
    try:
        channel.exchange_declare(names.topic(topic), "fanout", durable=True, auto_delete=False)
    except (REFUSED, DENIED) as error:
        raise _differs("exchange", names.topic(topic), error) from None
    finally:
        channel.close()


def declare_subscription(
    connection: Connection, names: Names, topic: str, subscription: str
) -> None:
    """The queues of a subscription, bound to the topic. Raises `ConfigurationError`."""
    main, dead = names.queue(topic, subscription), names.dead(topic, subscription)
    alone = names.alone(topic, subscription)
    declare_queue(connection, dead, {"x-delivery-limit": _ALONE_LIMIT})
    declare_queue(connection, alone, {"x-delivery-limit": _ALONE_LIMIT, **_to_queue(dead)})
    declare_queue(connection, main, {"x-delivery-limit": _DELIVERY_LIMIT, **_to_queue(dead)})
    channel = connection.channel()
    channel.queue_bind(main, names.topic(topic))
    channel.close()


def _to_queue(queue: str) -> Mapping[str, Any]:
    """Arguments: what is dead-lettered goes to this queue, and is not lost on the way."""
    return {
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": queue,
        **KEPT_UNTIL_TAKEN,
    }


# The default loses a message whose target does not take it. It asks for the other overflow.
KEPT_UNTIL_TAKEN: Mapping[str, Any] = {
    "x-dead-letter-strategy": "at-least-once",
    "x-overflow": "reject-publish",
}


def declare_queue(connection: Connection, name: str, arguments: Mapping[str, Any]) -> None:
    """A quorum queue. Raises `ConfigurationError` where it is there with other arguments."""
    channel = connection.channel()
    try:
        channel.queue_declare(
            name,
            durable=True,
            auto_delete=False,
            arguments={"x-queue-type": "quorum", **arguments},
        )
    except (REFUSED, DENIED) as error:
        raise _differs("queue", name, error) from None
    finally:
        channel.close()


# For so long a stream keeps what nobody has looked at.
_STREAM_AGE = "1Y"


def declare_stream(connection: Connection, name: str) -> None:
    """A stream. Raises `ConfigurationError` where it is there as something else."""
    channel = connection.channel()
    try:
        channel.queue_declare(
            name,
            durable=True,
            auto_delete=False,
            arguments={"x-queue-type": "stream", "x-max-age": _STREAM_AGE},
        )
    except (REFUSED, DENIED) as error:
        raise _differs("stream", name, error) from None
    finally:
        channel.close()


def count(connection: Connection, queues: Iterable[str]) -> Mapping[str, tuple[int, int]]:
    """How many messages of each queue wait to be delivered, and how many consumers it has; of
    those that are there. Raises `BrokerUnavailable` for one that is and does not answer.
    """
    found = {}
    channel = connection.channel()
    try:
        for name in queues:
            try:
                told = channel.queue_declare(name, passive=True, durable=True, auto_delete=False)
            except NOT_FOUND as error:
                check_absent(error, name)
                continue
            found[name] = (told.message_count, told.consumer_count)
    finally:
        channel.close()
    return found


def check_absent(error: Exception, queue: str) -> None:
    """Raise `BrokerUnavailable` where a queue is said not to be found because its node is down, or
    it did not come back with it.
    """
    if "no queue" not in str(error):
        reason = str(error).partition(" - ")[2] or error
        raise BrokerUnavailable(f"the queue {queue!r} does not answer: {reason}") from None


def _differs(kind: str, name: str, error: Exception) -> ConfigurationError:
    return ConfigurationError(
        f"the {kind} {name!r} cannot be declared: {str(error).partition(' - ')[2] or error}. "
        "Somebody else made it, or a version of duly that declared it otherwise: remove it when it "
        "is empty, or give the URL a namespace of its own (?namespace=...)"
    )

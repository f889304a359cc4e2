"""What stands on the server: exchanges, queues, and records of what is fixed about them.

==============================  ================================================================
``duly/<topic>``                a fanout exchange: where a topic's messages are published
``duly/<topic>/<consumer>``     a quorum queue bound to it: what one subscription has to do; of one
                                that is at-most-once, a transient classic one
``.../<consumer>/alone``        suspects: what somebody died with is worked one at a time
``.../<consumer>/dead``         what the server gave up on, on its way to the dead letters
``duly/dead``                   a stream: dead letters of apps without a store
``duly/<topic>/_due``           an exchange: where its messages with a due time are published
``.../<consumer>/_due``         its way to the delays, which is there as long as that queue is
``duly/_delay/<ms>``            an exchange and a queue from which messages go on after so long
``duly/_delay``                 an exchange: where they go on to what the header `TO` names
``duly/_unheard``               what had waited, and nobody was there to take
``duly/<topic>/by-key``         of a topic with partitions, a direct exchange bound to its fanout:
                                the routing key is the partition
``duly/<topic>/astray``         takes what has another routing key, to the first partition
``.../<consumer>/<partition>``  in place of the subscription's one queue, where it works in order by
                                key: one of several, each with a single active consumer
``.../<partition>/notes``       what is known of messages that stay in it
``.../<consumer>/present``      who works it: each process consumes this one, and nobody publishes
``duly/is/...``                 records
==============================  ================================================================

``duly`` is the namespace; no name that people give begins with ``_``. A record is an exchange that
nobody publishes to; its alternate exchange, which there need not be, is the text recorded.
Declaring it again with another text is refused by the server, which names the one that is there: so
AMQP alone compares, whoever comes first.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from duly.brokers.rabbitmq.link import DENIED, NOT_FOUND, REFUSED, Connection
from duly.errors import BrokerUnavailable, ConfigurationError
from duly.guarantees import GuaranteeName
from duly.message import Topic

_MAX_NAME_BYTES = 255
# The error that tells what is recorded has room for 255 bytes, with this name in it.
_MAX_RECORD_BYTES = 80
# Back from the dead so often is a fault of its own: the server then moves it to the dead letters.
# Without the argument 4.x drops a message after 20, and an older server never gives up.
_DELIVERY_LIMIT = 1000
_ALONE_LIMIT = 1_000_000
# The longest of the lengths of time that have a queue each, of which every delay is composed.
LONGEST_MS = 1 << 38
# Headers by which messages with a delay find their way: to which exchange or queue, and what
# becomes of one that nobody is there to take.
TO, IF_UNHEARD, KEEP, DROP = "duly-to", "duly-if-unheard", "keep", "drop"
# Those of the process at work, and of some before it that may not know yet that it is.
_SNAPSHOTS = 8
# In the name of every queue in which messages only wait.
DELAYS = "/_delay/"
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

    def due(self, topic: str) -> str:
        """The exchange of a topic's messages that have a due time."""
        return self._fitting("/_due", topic)

    def gate(self, topic: str, subscription: str) -> str:
        """The exchange by which they get to the delays while a subscription is there."""
        return self._fitting("/_due", topic, subscription)

    @property
    def letters(self) -> str:
        """The dead letters of apps without a store."""
        return f"{self.namespace}/dead"

    def by_key(self, topic: str) -> str:
        """The exchange that divides a topic into partitions."""
        return self._fitting("/by-key", topic)

    def astray(self, topic: str) -> str:
        """The exchange for what names no partition."""
        return self._fitting("/astray", topic)

    def partition(self, topic: str, subscription: str, number: int) -> str:
        """What a subscription has to do of one partition, in order by key."""
        return self._fitting(f"/{number}", topic, subscription)

    def notes(self, topic: str, subscription: str, number: int) -> str:
        """What is known of messages that stay in that."""
        return self._fitting(f"/{number}/notes", topic, subscription)

    def present(self, topic: str, subscription: str) -> str:
        """Where the processes that share the partitions count each other."""
        return self._fitting("/present", topic, subscription)

    def delay(self, delay_ms: int) -> str:
        """The exchange and the queue of one length of time."""
        return f"{self.namespace}{DELAYS}{delay_ms}"

    @property
    def onward(self) -> str:
        """The exchange that has what has waited."""
        return f"{self.namespace}/_delay"

    @property
    def unheard(self) -> str:
        """The exchange and the queue of what had waited, and nobody was there to take."""
        return f"{self.namespace}/_unheard"

    @property
    def nowhere(self) -> str:
        """The queue that keeps nothing: for what of that may be lost."""
        return f"{self.unheard}/nowhere"

    def record(self, kind: str, name: str) -> str:
        """The record of something."""
        return _cut(f"{self.namespace}/is/{kind}/{name}", _MAX_RECORD_BYTES)

    def _fitting(self, end: str, *parts: str) -> str:
        return _cut("/".join((self.namespace, *parts)), _MAX_NAME_BYTES - len(end)) + end


def _cut(name: str, most: int) -> str:
    if len(name) <= most:
        return name
    digest = hashlib.blake2b(name.encode(), digest_size=12).hexdigest()
    return f"{name[: most - 25]}~{digest}"


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
    except DENIED as error:
        raise _differs("record", name, error) from None
    finally:
        channel.close()


def recorded_topic(connection: Connection, names: Names, topic: str) -> Topic[Any] | None:
    """A topic as it was declared, by whichever process; None: nobody has."""
    # It is made behind its records.
    if not _is_there(connection, names.topic(topic)):
        return None
    told = []
    for kind in ("topic", "partitions"):
        name = names.record(kind, topic)
        told.append(record(connection, name, "") if _is_there(connection, name) else "")
    guarantee: Any = told[0].removeprefix("guarantee ")
    partitions = told[1].removeprefix("partitions=")
    if guarantee not in get_args(GuaranteeName) or not partitions.isdecimal():
        return None
    return Topic(topic, bytes, guarantee=guarantee, partitions=int(partitions))


def _is_there(connection: Connection, exchange: str) -> bool:
    channel = connection.channel()
    try:
        channel.exchange_declare(exchange, "direct", passive=True)
    except NOT_FOUND:
        return False
    finally:
        channel.close()
    return True


def declare_topic(connection: Connection, names: Names, topic: str, partitions: int) -> None:
    """The exchanges of a topic. Raises `ConfigurationError` where one is there as another."""
    _declare_onward(connection, names)
    exchange = names.topic(topic)
    declare_exchange(connection, exchange, "fanout", names.unheard)
    declare_exchange(connection, names.due(topic), "fanout")
    if partitions:
        by_key, astray = names.by_key(topic), names.astray(topic)
        declare_exchange(connection, astray, "fanout")
        declare_exchange(connection, by_key, "direct", astray)
    with connection.channel() as channel:
        channel.exchange_bind(exchange, names.onward, arguments={TO: exchange})
        if partitions:
            channel.exchange_bind(names.by_key(topic), exchange)


def _declare_onward(connection: Connection, names: Names) -> None:
    """Where messages go on to when they have waited. What does not get anywhere would hold up all
    behind it, so it is kept apart, or dropped where its topic may lose it.
    """
    unheard, nowhere = names.unheard, names.nowhere
    declare_exchange(connection, unheard, "headers")
    declare_exchange(connection, names.onward, "headers", unheard)
    declare_queue(connection, unheard, {"x-delivery-limit": _ALONE_LIMIT})
    # Of quorum, too: one that is on a single node cannot be declared while that is down, and every
    # process declares it.
    declare_queue(connection, nowhere, {"x-max-length": 0})
    with connection.channel() as channel:
        channel.queue_bind(unheard, unheard, arguments={IF_UNHEARD: KEEP})
        channel.queue_bind(nowhere, unheard, arguments={IF_UNHEARD: DROP})


def declare_exchange(
    connection: Connection, name: str, kind: str, otherwise: str = "", *, auto_delete: bool = False
) -> None:
    """An exchange; what it has no queue for goes on to ``otherwise``, another one. Raises
    `ConfigurationError` where it is there as another.
    """
    channel = connection.channel()
    arguments = {"alternate-exchange": otherwise} if otherwise else {}
    try:
        channel.exchange_declare(
            name, kind, durable=True, auto_delete=auto_delete, arguments=arguments
        )
    except (REFUSED, DENIED) as error:
        raise _differs("exchange", name, error) from None
    finally:
        channel.close()


def declare_subscription(
    connection: Connection,
    names: Names,
    topic: str,
    subscription: str,
    partitions: int = 0,
    *,
    once: bool = False,
) -> None:
    """The queues of a subscription, bound to the topic; in order by key, one for each partition.
    ``once``: of one that is at-most-once. Raises `ConfigurationError`.
    """
    dead = names.dead(topic, subscription)
    declare_queue(connection, dead, {"x-delivery-limit": _ALONE_LIMIT})
    if partitions:
        _declare_partitions(connection, names, topic, subscription, partitions)
        return
    queues = [main := names.queue(topic, subscription)]
    if once:
        declare_queue(connection, main, {"x-queue-type": "classic"}, durable=False)
    else:
        queues.append(names.alone(topic, subscription))
        declare_queue(connection, queues[1], {"x-delivery-limit": _ALONE_LIMIT, **_to_queue(dead)})
        declare_queue(connection, main, {"x-delivery-limit": _DELIVERY_LIMIT, **_to_queue(dead)})
    with connection.channel() as channel:
        channel.queue_bind(main, names.topic(topic))
        for queue in queues:
            channel.queue_bind(queue, names.onward, arguments={TO: queue})
    _declare_gate(connection, names, topic, subscription, main)


def _declare_gate(
    connection: Connection, names: Names, topic: str, subscription: str, queue: str
) -> None:
    """The way of messages with a due time to the delays, which ends with this queue: a topic whose
    subscriptions are all gone has none, so that the server returns what is published to it.

    The queue is bound by a header that no message has: nothing goes there, everything to the
    alternate, and the server removes the exchange with its last binding.
    """
    gate = names.gate(topic, subscription)
    declare_exchange(connection, gate, "headers", names.delay(LONGEST_MS), auto_delete=True)
    with connection.channel() as channel:
        channel.queue_bind(queue, gate, arguments={"duly-never": True})
        channel.exchange_bind(gate, names.due(topic))


def _declare_partitions(
    connection: Connection, names: Names, topic: str, subscription: str, partitions: int
) -> None:
    # Whoever works these counts by itself, and the server counts what nobody has looked at too.
    to_dead = _to_queue(names.dead(topic, subscription))
    one = {"x-single-active-consumer": True, "x-delivery-limit": _ALONE_LIMIT, **to_dead}
    queues = [names.partition(topic, subscription, number) for number in range(partitions)]
    for queue in queues:
        declare_queue(connection, queue, one)
    with connection.channel() as channel:
        for number, queue in enumerate(queues):
            channel.queue_bind(queue, names.by_key(topic), str(number))
        channel.queue_bind(queues[0], names.astray(topic))


def declare_notes(connection: Connection, queue: str) -> None:
    """The queue of the notes on a partition. Raises `ConfigurationError`."""
    declare_queue(connection, queue, {"x-max-length": _SNAPSHOTS, "x-delivery-limit": _ALONE_LIMIT})


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


def declare_queue(
    connection: Connection, name: str, arguments: Mapping[str, Any], *, durable: bool = True
) -> None:
    """A quorum queue, or another that ``arguments`` say. Raises `ConfigurationError` where it is
    there with others.
    """
    channel = connection.channel()
    try:
        channel.queue_declare(
            name,
            durable=durable,
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
    if isinstance(error, DENIED):
        own = f"{name.partition('/')[0]}/.*"
        return ConfigurationError(
            f"the {kind} {name!r} cannot be declared: {str(error).partition(' - ')[2] or error}. "
            f"The user needs the permissions to configure and read {own}, and to write .*"
        )
    return ConfigurationError(
        f"the {kind} {name!r} cannot be declared: {str(error).partition(' - ')[2] or error}. "
        "Somebody else made it, or a version of duly that declared it otherwise: remove it when it "
        "is empty, or give the URL a namespace of its own (?namespace=...)"
    )

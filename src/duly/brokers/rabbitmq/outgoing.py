"""`Outgoing`: from messages to what is sent, and from how that ended to outcomes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from duly.broker import Outcome, Published
from duly.brokers.rabbitmq.delays import Delays, way
from duly.brokers.rabbitmq.frames import written
from duly.brokers.rabbitmq.link import Link, content
from duly.brokers.rabbitmq.publisher import Publisher, Sending, State
from duly.brokers.rabbitmq.standing import Standing
from duly.brokers.rabbitmq.topology import Names, recorded_topic
from duly.brokers.rabbitmq.wire import properties_of
from duly.errors import (
    BrokerError,
    ConfigurationError,
    InvalidMessage,
    MessageTooLarge,
    PublishFailed,
    PublishUnknown,
)
from duly.guarantees import Guarantee
from duly.message import Message, Topic, partition_of

# What a server takes unless it is configured otherwise.
MAX_MESSAGE_BYTES = 128 * 1024 * 1024

Levels = Sequence[int]
"""Where a message waits until it is due; nowhere, if it is."""


class Outgoing:
    """``standing`` has the topics declared so far; ``link`` makes what is missing on the server."""

    def __init__(
        self,
        names: Names,
        standing: Standing,
        publisher: Publisher,
        delays: Delays,
        link: Link,
        wall_ms: Callable[[], int],
    ) -> None:
        self._names = names
        self._standing = standing
        self._topics = standing.topics
        self._publisher = publisher
        self._delays = delays
        self._link = link
        self._wall_ms = wall_ms
        self._exchanges: dict[str, str] = {}

    def publish(self, messages: Sequence[Message[Any]]) -> Sequence[Outcome]:
        """As `Broker.publish`."""
        refused = [self._refusal(message) for message in messages]
        waits = [
            () if refusal or message.due_ms is None else self._levels(message.due_ms)
            for message, refusal in zip(messages, refused, strict=True)
        ]
        no_way = self._make_delays(waits)
        ready = [
            refusal or self._ready(message, levels, no_way)
            for message, refusal, levels in zip(messages, refused, waits, strict=True)
        ]
        self._publisher.send([each for each in ready if isinstance(each, Sending)])
        return [
            self._outcome(message, each) if isinstance(each, Sending) else each
            for message, each in zip(messages, ready, strict=True)
        ]

    def _refusal(self, message: Message[Any]) -> PublishFailed | None:
        topic = self._topic_of(message)
        if topic is None:
            return PublishFailed(
                f"{_named(message)}: nobody has declared its topic", message_id=message.id
            )
        if (why_not := self._standing.why_not(topic, self._link)) is not None:
            return PublishFailed(f"{_named(message)}: not sent, {why_not}", message_id=message.id)
        if message.size > MAX_MESSAGE_BYTES:
            return MessageTooLarge(
                f"{_named(message)}: the body has {message.size:,} bytes, RabbitMQ carries at most "
                f"{MAX_MESSAGE_BYTES:,}. Nothing was sent.",
                message_id=message.id,
            )
        if message.due_ms is not None and topic.partitions:
            return InvalidMessage(
                f"{_named(message)}: it has a due time, and its topic an order by key: what waits "
                "elsewhere on RabbitMQ cannot hold up what comes behind it",
                message_id=message.id,
            )
        return None

    def _topic_of(self, message: Message[Any]) -> Topic[Any] | None:
        """A topic that was declared, be it by another process: what that one put into an outbox is
        brought here by whoever relays.
        """
        topic = self._topics.get(message.topic)
        if topic is None:
            look = partial(recorded_topic, names=self._names, topic=message.topic)
            if (topic := self._link.call(look)) is not None:
                self._topics.setdefault(message.topic, topic)
        return topic

    def _levels(self, due_ms: int) -> Levels:
        wait_ms = due_ms - self._wall_ms()
        return self._delays.levels_for(wait_ms / 1000, exactly=True) if wait_ms > 0 else ()

    def _make_delays(self, waits: Sequence[Levels]) -> BrokerError | ConfigurationError | None:
        """Make what messages with a due time need; why that cannot be done."""
        if levels := set[int]().union(*waits):
            try:
                self._delays.make(levels, self._link)
            except (BrokerError, ConfigurationError) as error:
                return error
        return None

    def _ready(
        self, message: Message[Any], levels: Levels, no_way: Exception | None
    ) -> Sending | PublishFailed:
        topic = self._topics[message.topic]
        surely = topic.promise is not Guarantee.AT_MOST_ONCE
        heard = surely and not topic.may_go_unheard
        exchange = self._exchange(message.topic)
        if not levels:
            sent = written(message) or content(message.body, properties_of(message))
        elif no_way is not None:
            return PublishFailed(f"{_named(message)}: not sent, {no_way}", message_id=message.id)
        else:
            properties = properties_of(message)
            properties["application_headers"] |= way(levels, exchange, keep=heard)
            sent = content(message.body, properties)
            exchange = self._names.due(message.topic)
        key = str(partition_of(message, topic.partitions)) if topic.partitions else ""
        return Sending(sent, exchange, key, confirm=surely, mandatory=heard)

    def _exchange(self, topic: str) -> str:
        if (exchange := self._exchanges.get(topic)) is None:
            exchange = self._exchanges[topic] = self._names.topic(topic)
        return exchange

    def _outcome(self, message: Message[Any], sending: Sending) -> Outcome:
        if sending.state is State.CONFIRMED:
            return Published(message.id)
        where = _named(message)
        match sending.state:
            case State.UNROUTABLE:
                self._delays.forget()  # or the way to them is gone
                return PublishFailed(
                    f"{where}: no subscription takes it, so it is stored nowhere. Start a consumer "
                    "of the topic once, or declare Topic(..., may_go_unheard=True).",
                    message_id=message.id,
                )
            case State.UNWRITABLE:
                return InvalidMessage(f"{where}: {sending.state.value}", message_id=message.id)
            case State.GIVEN_UP | State.WAITING:
                return PublishFailed(
                    f"{where}: not sent, {self._publisher.why_not}", message_id=message.id
                )
            case _:
                return PublishUnknown(
                    f"{where}: sent, and not confirmed: {self._publisher.why_not}. Publish it "
                    "again under its id.",
                    message_id=message.id,
                )


def _named(message: Message[Any]) -> str:
    return f"topic {message.topic!r}, message {message.id!r}"

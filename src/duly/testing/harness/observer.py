"""What was published, read from the broker itself by a subscription of the test's own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from duly.app import App
from duly.broker import Broker, SubscribeOptions, Subscription
from duly.errors import DecodeError
from duly.guarantees import Done, Guarantee
from duly.inspection import DeadLetter
from duly.message import Message, Topic
from duly.testing.harness.seams import Seen
from duly.worker.decoding import with_payload

# And behind it the topic's name: one subscription is one topic.
NAME = "duly-testing."
_A_LOT = 1 << 30


@dataclass(slots=True)
class _Stream:
    subscription: Subscription
    found: list[Message[Any]] = field(default_factory=list)


class Observer:
    """Reads every message of every topic that it was shown in time.

    Subscribed before the first message is handled: a broker may forget what all its
    subscriptions are done with.
    """

    def __init__(self, broker: Broker, calls: Seen) -> None:
        self._broker = broker
        self._seen = calls
        self._streams: dict[str, _Stream] = {}

    def watch(self, topics: Iterable[Topic[Any]]) -> None:
        """Read these too."""
        for topic in topics:
            if topic.name not in self._streams:
                self._broker.declare([topic])
                options = SubscribeOptions(Guarantee.AT_LEAST_ONCE)
                subscription = self._broker.subscribe([topic], NAME + topic.name, options)
                self._streams[topic.name] = _Stream(subscription)

    def read(self, topic: Topic[Any]) -> Sequence[Message[Any]]:
        """All messages of a topic in the broker's order, and behind them those not due yet."""
        self.watch([topic])
        stream = self._streams[topic.name]
        while deliveries := stream.subscription.claim(1000, _A_LOT, 0.0):
            stream.found += [decoded(topic, delivery.message) for delivery in deliveries]
            stream.subscription.settle([Done(delivery.receipt) for delivery in deliveries])
        there = {(message.source, message.id) for message in stream.found}
        late = [m for m in self._seen.messages if m.topic == topic.name]
        return [*stream.found, *(decoded(topic, m) for m in late if (m.source, m.id) not in there)]


def decoded(topic: Topic[Any] | None, message: Message[Any]) -> Message[Any]:
    """The message with its payload, where its body holds one."""
    if topic is None:
        return message
    try:
        return with_payload(message, topic.read(message))
    except DecodeError:
        return message


def letters_of(broker: Any, store: Any, app: App, consumer: str | None) -> Sequence[DeadLetter]:
    """The dead letters of one consumer or of all, oldest first."""
    found: list[DeadLetter] = list(reversed(broker.dead_letters(consumer, 10_000)))
    # Those of an ordered log are the store's.
    of_store = getattr(store, "dead_letters", None)
    if of_store is not None:
        names = [consumer] if consumer is not None else [each.name for each in app.consumers]
        found += [
            DeadLetter(d.subscription, d.message, d.error, d.attempts, d.at_ms)
            for name in names
            for d in of_store(name)
        ]
    return found

"""A broker that does what a test tells it to."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from duly.broker import (
    Capabilities,
    Outcome,
    Published,
    SubscribeOptions,
    Subscription,
)
from duly.message import Message, Topic

Answer = Callable[[Sequence[Message[Any]]], Sequence[Outcome]]


def stored(messages: Sequence[Message[Any]]) -> Sequence[Outcome]:
    return [Published(message.id) for message in messages]


class FakeBroker:
    """Keeps what is published. ``answer`` decides the outcomes; ``gate`` holds publishes up."""

    def __init__(self, **capabilities: Any) -> None:
        self.capabilities = Capabilities(**{"name": "fake", "database": "fake:1", **capabilities})
        self.declared: dict[str, Topic[Any]] = {}
        self.portions: list[list[Message[Any]]] = []
        self.answer: Answer = stored
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.recorded: Counter[str] = Counter()
        self.closed = 0

    @property
    def messages(self) -> list[Message[Any]]:
        return [message for portion in self.portions for message in portion]

    @property
    def bodies(self) -> list[bytes]:
        return [message.body for message in self.messages]

    def declare(self, topics: Iterable[Topic[Any]]) -> None:
        self.declared.update((topic.name, topic) for topic in topics)

    def publish(self, messages: Sequence[Message[Any]]) -> Sequence[Outcome]:
        assert all(message.topic in self.declared for message in messages)
        self.entered.release()
        assert self.gate.wait(30)
        outcomes = self.answer(messages)
        self.portions.append(
            [
                message
                for message, outcome in zip(messages, outcomes, strict=True)
                if isinstance(outcome, Published)
            ]
        )
        return outcomes

    def subscribe(
        self, topics: Sequence[Topic[Any]], subscription: str, options: SubscribeOptions
    ) -> Subscription:
        raise NotImplementedError

    def record_drops(self, topic: str, count: int) -> None:
        self.recorded[topic] += count

    def close(self) -> None:
        self.closed += 1

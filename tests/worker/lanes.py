"""Lanes over the in-memory database, driven step by step with a clock of the test's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from duly import App
from duly.broker import SubscribeOptions
from duly.brokers.memory import MemoryDatabase
from duly.dependencies import Resolver
from duly.guarantees import Admission, Guarantee
from duly.message import Topic
from duly.stores.memory.store import MemoryStore
from duly.worker.lane import Lane
from duly.worker.process import subscribe_options
from duly.worker.steps import Surroundings

__all__ = ["Bench", "SubscribeOptions"]


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def wall_ms(self) -> int:
        return int(self.now * 1000)


class Bench:
    """A broker, its store, and an app whose consumers are worked by `lane(...)`."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.broker = MemoryDatabase(clock=self.clock, wall_ms=self.clock.wall_ms)
        self.store = MemoryStore(self.broker, wall_ms=self.clock.wall_ms)
        self.app = App("bench", broker=self.broker, store=self.store)
        self.seen: list[Any] = []

    def publish(self, topic: Topic[Any], *payloads: Any) -> None:
        self.broker.declare([topic])
        self.store.declare([topic])
        outcomes = self.broker.publish([topic.message(p, source="bench") for p in payloads])
        assert not [o for o in outcomes if isinstance(o, Exception)]

    def lane(self, name: str, *, on_loop: Callable[..., Any] | None = None) -> Lane:
        consumer = next(c for c in self.app.consumers if c.name == name)
        self.broker.declare(consumer.topics)
        exactly = consumer.guarantee is Guarantee.EXACTLY_ONCE
        return Lane(
            consumer,
            self.broker.subscribe(consumer.topics, name, subscribe_options(consumer)),
            Resolver().bind(consumer.handler),
            Surroundings("bench", clock=self.clock, roll=lambda: 0.0, wait_s=0.0, on_loop=on_loop),
            store=self.store if exactly else None,
            admission=Admission.BY_CLAIM if exactly else None,
        )

    def drain(self, lane: Lane, *, steps: int = 1000) -> None:
        """Step until a whole round claimed nothing."""
        start, left_over = 0, False
        for _ in range(steps):
            if lane.idle():
                start, left_over = lane.counts.claimed, bool(lane.pending)
            lane.step()
            if lane.idle() and not (left_over or lane.pending) and lane.counts.claimed == start:
                return
        raise AssertionError(f"not drained after {steps} steps")

    def dead(self, name: str) -> list[Any]:
        return list(self.broker.dead_letters(name))

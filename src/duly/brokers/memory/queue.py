"""The queue in memory: at-least-once by nature, no order, no memory of ids: admission by inbox."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from duly.broker import Capabilities, Outcome, SubscribeOptions, Subscription
from duly.brokers.memory.lane import Claims, Clock, Lane
from duly.brokers.memory.schedules import Reached
from duly.guarantees import Settlement
from duly.inspection import DeadLetter, Incident, Selection, SubscriptionState
from duly.message import Message, Topic, now_ms


class MemoryQueue:
    """A queue for each subscription, as cloud queues are.

    A settlement may be lost though `settle` answered: then the message comes again when its
    lease ends. By itself that never happens here; a test brings it about with ``loses``, which
    is asked about each settlement. Repeated publishes are not dropped.
    """

    def __init__(
        self, *, clock: Clock = time.monotonic, wall_ms: Callable[[], int] = now_ms
    ) -> None:
        self._capabilities = Capabilities(
            name="in-memory queue",
            durable=False,
            confirms_settlement=False,
            identity_retention=False,
            orders_by_key=False,
            holds_keys=False,
        )
        self.claims = Claims(self._capabilities, clock, wall_ms)
        self._schedules = Reached(self.publish, self.claims.registry.refusal)

    @property
    def capabilities(self) -> Capabilities:
        """What this broker provides."""
        return self._capabilities

    @property
    def loses(self) -> Callable[[Settlement], bool] | None:
        """Which settlements are lost, though they were answered."""
        return self.claims.loses

    @loses.setter
    def loses(self, choose: Callable[[Settlement], bool] | None) -> None:
        self.claims.loses = choose

    def declare(self, topics: Iterable[Topic[Any]]) -> None:
        """As `Broker.declare`; ``partitions`` and ``guarantee`` of a topic are fixed."""
        self.claims.declare(topics)

    def publish(self, messages: Sequence[Message[Any]]) -> Sequence[Outcome]:
        """As `Broker.publish`."""
        return self.claims.append(messages)

    def subscribe(
        self, topics: Sequence[Topic[Any]], subscription: str, options: SubscribeOptions
    ) -> Lane:
        """As `Broker.subscribe`; refuses order by key."""
        return self.claims.join(topics, subscription, options)

    def crash(self, lane: Subscription) -> None:
        """The worker behind a lane dies: nothing of it is settled, its claims are suspect."""
        self.claims.crash(lane)

    def reached(self, schedule: str, now_ms: int) -> int:
        """As `Ticking.reached`."""
        return self._schedules.reached(schedule, now_ms)

    def ticked(self) -> Mapping[str, int]:
        """As `Ticking.ticked`."""
        return self._schedules.ticked()

    def tick(
        self, schedule: str, reached_ms: int, to_ms: int, messages: Sequence[Message[Any]]
    ) -> Sequence[Outcome] | None:
        """As `Ticking.tick`."""
        return self._schedules.tick(schedule, reached_ms, to_ms, messages)

    def record_drops(self, topic: str, count: int) -> None:
        """Make visible that ``count`` at-most-once publishes were never stored."""
        self.claims.record_drops(topic, count)

    def select(self, which: Selection, limit: int) -> Sequence[DeadLetter]:
        """As `Mending.select`."""
        return self.claims.select(which, limit)

    def replay(self, letters: Sequence[DeadLetter]) -> Sequence[DeadLetter]:
        """As `Mending.replay`."""
        return self.claims.mend(letters, again=True)

    def discard(self, letters: Sequence[DeadLetter]) -> Sequence[DeadLetter]:
        """As `Mending.discard`."""
        return self.claims.mend(letters, again=False)

    def subscriptions(self) -> Sequence[SubscriptionState]:
        """As `Inspection.subscriptions`."""
        return self.claims.subscriptions()

    def dead_letters(
        self, subscription: str | None = None, limit: int = 100
    ) -> Sequence[DeadLetter]:
        """As `Inspection.dead_letters`."""
        return self.claims.select(Selection(subscription), limit)

    def incidents(
        self, subscription: str | None = None, kind: str | None = None, limit: int = 100
    ) -> Sequence[Incident]:
        """As `Inspection.incidents`."""
        return self.claims.incidents(subscription, kind, limit)

    def incident_counts(self) -> Mapping[tuple[str, str], int]:
        """As `Inspection.incident_counts`."""
        return self.claims.incident_counts()

    def close(self) -> None:
        """Close every lane; nothing can be published or claimed after."""
        self.claims.close()

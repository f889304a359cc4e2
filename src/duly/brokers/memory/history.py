"""What a broker in memory keeps for people to see: dead letters and incidents."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from itertools import count, islice
from typing import Any

from duly.broker import Delivery, Outcome, RepeatDropped
from duly.errors import IdentityConflict
from duly.inspection import DeadLetter, Incident, Selection
from duly.message import Message

# Incidents are for a person to look at: the latest tell the story, the counts tell how often.
MAX_INCIDENTS = 10_000


class History:
    """The incidents of one broker: the latest are kept, all of them are counted."""

    def __init__(self, wall_ms: Callable[[], int]) -> None:
        self._wall_ms = wall_ms
        self._latest: deque[Incident] = deque(maxlen=MAX_INCIDENTS)
        self._counts: Counter[tuple[str, str]] = Counter()
        self._letters = count(1)

    def letter(
        self, subscription: str, message: Message[Any], error: str, attempts: int, replays: int
    ) -> DeadLetter:
        """A new dead letter, with a number of its own."""
        at_ms, number = self._wall_ms(), next(self._letters)
        return DeadLetter(subscription, message, error, attempts, at_ms, number, replays)

    def add(
        self,
        kind: str,
        *,
        subscription: str | None = None,
        message: Message[Any] | None = None,
        position: int | None = None,
        detail: str = "",
    ) -> None:
        """Keep and count one incident; ``kind`` is one of `duly.inspection.KINDS`."""
        topic = source = id = None
        if message is not None:
            topic, source, id = message.topic, message.source, message.id
        self._latest.append(
            Incident(
                self._wall_ms(), kind, topic, subscription, source, id, position, 1, None, detail
            )
        )
        self._counts[subscription or topic or "", kind] += 1

    def mended(self, letter: DeadLetter, position: int, *, again: bool) -> None:
        """Note that a person brought a dead letter back, or removed it."""
        kind = "replayed" if again else "discarded"
        self.add(
            kind,
            subscription=letter.subscription,
            message=letter.message,
            position=position,
            detail=f"{kind}; had been given up on at attempt {letter.attempts}: {letter.error}",
        )

    def published(self, message: Message[Any], outcome: Outcome) -> None:
        """Note a publish that was not plain success."""
        if isinstance(outcome, RepeatDropped):
            self.add("repeat-dropped", message=message)
        elif isinstance(outcome, IdentityConflict):
            self.add("identity-conflict", message=message, detail=str(outcome))

    def suppressed(self, subscription: str, deliveries: Sequence[Delivery]) -> None:
        """Note deliveries of what had taken effect before."""
        for delivery in deliveries:
            at = delivery.position
            self.add(
                "repeat-suppressed",
                subscription=subscription,
                message=delivery.message,
                position=at.offset if at else getattr(delivery.receipt, "position", None),
            )

    def dropped(self, topic: str, count: int) -> None:
        """Note at-most-once publishes that were never stored."""
        at_ms = self._wall_ms()
        self._latest.append(
            Incident(at_ms, "dropped", topic, None, None, None, None, count, None, "")
        )
        self._counts[topic, "dropped"] += count

    def incidents(
        self, subscription: str | None, kind: str | None, limit: int
    ) -> Sequence[Incident]:
        """The latest incidents, newest first."""
        found = (
            incident
            for incident in reversed(self._latest)
            if subscription in (None, incident.subscription) and kind in (None, incident.kind)
        )
        return list(islice(found, limit))

    def counts(self) -> Mapping[tuple[str, str], int]:
        """How many messages met which kind."""
        return dict(self._counts)


def newest(letters: Sequence[DeadLetter], which: Selection, limit: int) -> Sequence[DeadLetter]:
    """The latest of these dead letters that are meant, newest first."""
    meant = [letter for letter in letters if which.matches(letter)]
    return sorted(meant, key=lambda letter: -letter.number)[:limit]

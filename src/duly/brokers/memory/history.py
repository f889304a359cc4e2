"""What a broker in memory keeps for people to see: dead letters and incidents."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from duly.message import Message

# Incidents are for a person to look at: the latest tell the story, the counts tell how often.
MAX_INCIDENTS = 10_000


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that one subscription gave up on, after ``attempts`` starts."""

    id: int
    subscription: str
    message: Message[Any]
    error: str
    attempts: int
    at_ms: int


@dataclass(frozen=True, slots=True)
class Incident:
    """Something that was not plain success, for ``duly trace`` and for counting."""

    kind: str
    subscription: str
    message_id: str
    attempt: int
    at_ms: int
    detail: str = ""


class History:
    """The incidents of one broker or store, the latest kept, all of them counted."""

    def __init__(self) -> None:
        self._latest: deque[Incident] = deque(maxlen=MAX_INCIDENTS)
        self._counts: Counter[tuple[str, str]] = Counter()

    def add(self, incident: Incident) -> None:
        """Keep and count one incident."""
        self._latest.append(incident)
        self._counts[incident.subscription, incident.kind] += 1

    def latest(self) -> Sequence[Incident]:
        """The kept incidents, oldest first."""
        return list(self._latest)

    def counts(self, subscription: str) -> dict[str, int]:
        """How often each kind of incident happened to a subscription."""
        return {kind: n for (name, kind), n in self._counts.items() if name == subscription}

"""Removing a person's messages from everywhere they are kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class Whose:
    """Which messages are meant: those of a key, of an id, or both; what is None does not narrow.

    One of ``key`` and ``id`` is given, and ``source`` with an id.
    """

    key: str | None = None
    id: str | None = None
    source: str | None = None
    topic: str | None = None


@runtime_checkable
class Erasing(Protocol):
    """What a broker, or a store, can do to messages that must not be kept any more."""

    def holdings(self, whose: Whose) -> int:
        """How many copies of such messages it keeps now. Only reads."""
        ...

    def erase(self, whose: Whose) -> Iterator[int]:
        """Remove them, some hundred at a time; gives how many copies each step removed.

        Each step is one short transaction, and again is harmless: interrupted, it is simply
        done again. Nothing of them is delivered any more; who has claimed one already may
        still settle it. A repeat of an exactly-once publish is dropped as before. Incidents
        stay without their identity and what they said.
        """
        ...

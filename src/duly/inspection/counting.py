"""What goes through a broker, as counts whose differences are rates; and who is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable


@runtime_checkable
class Counting(Protocol):
    """What a broker can count without keeping anything for it."""

    def published(self) -> Mapping[str, int]:
        """How many messages each topic ever stored, by its name."""
        ...

    def workers(self) -> Sequence[str]:
        """The worker processes that are alive, also those that hold nothing now."""
        ...

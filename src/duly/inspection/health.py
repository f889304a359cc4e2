"""What endangers a promise where an app runs, as findings that a person can act on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

Level = Literal["ok", "warning", "wrong"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. ``wrong``: a promise is not kept, or soon will not be;
    ``remedy`` says what to do.
    """

    level: Level
    what: str
    found: str
    remedy: str = ""


@runtime_checkable
class Examining(Protocol):
    """What a broker or store can say of itself and of where it runs. Changes nothing."""

    def examine(self) -> Sequence[Finding]:
        """Every finding, in an order that reads well; never raises about what it looks at."""
        ...

"""Which faults hit where: drawn from a seed, or given one by one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from random import Random
from typing import NamedTuple, Protocol


class Hit(NamedTuple):
    """A fault that hit: the process, the number of its point, and the kind."""

    process: str
    number: int
    kind: str

    def text(self) -> str:
        """The hit as one word for the command line."""
        return f"{self.process}@{self.number}={self.kind.replace(' ', '_')}"


def hits_of(text: str) -> list[Hit]:
    """The hits that `Hit.text` wrote, with commas between. Raises ValueError."""
    hits = []
    for part in filter(None, text.split(",")):
        where, _, kind = part.partition("=")
        process, _, number = where.partition("@")
        if not (process and number.isdecimal() and kind):
            raise ValueError(f"{part!r} is no fault; one is written like w1@12=crash")
        hits.append(Hit(process, int(number), kind.replace("_", " ")))
    return hits


class Plan(Protocol):
    """Says which fault hits at a point."""

    def fault(self, process: str, number: int, possible: Sequence[str]) -> str | None:
        """One of ``possible``, or None."""
        ...


class Given:
    """Faults as listed; one that is not possible where it should hit does not."""

    def __init__(self, hits: Iterable[Hit]) -> None:
        self._kinds = {(hit.process, hit.number): hit.kind for hit in hits}

    def fault(self, process: str, number: int, possible: Sequence[str]) -> str | None:
        """As `Plan.fault`."""
        kind = self._kinds.get((process, number))
        return kind if kind in possible else None


class Drawn:
    """Faults from a seed: up to ``most``, each point with probability ``rate``."""

    def __init__(self, random: Random, most: int, rate: float) -> None:
        self._random = random
        self._left = most
        self._rate = rate

    def fault(self, process: str, number: int, possible: Sequence[str]) -> str | None:
        """As `Plan.fault`."""
        del process, number  # wherever it is
        if not self._left or self._random.random() >= self._rate:
            return None
        self._left -= 1
        return self._random.choice(possible)

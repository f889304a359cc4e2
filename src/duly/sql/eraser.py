"""A person's messages removed from a log, in short transactions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from duly.inspection.erasing import Whose
from duly.sql import erasing
from duly.sql.erasing import Copy, Identity
from duly.sql.steps import Steps

if TYPE_CHECKING:
    from duly.sql.operated import Ground


class Eraser:
    """What was found is removed from incidents and dead letters, then from the log, and from
    those once more: a message may have failed for the last time meanwhile. What came to the
    incidents since goes in the transaction that removes the message.
    """

    def __init__(self, ground: Ground, whose: Whose) -> None:
        self._ground = ground
        self._whose = whose
        self._identities: set[Identity] = set()
        # Up to which incident they have been looked through.
        self._looked = 0

    def holdings(self) -> int:
        """How many copies there are."""
        found = [self._find(of) for of in (erasing.in_log, erasing.in_dead, erasing.in_identities)]
        log, dead, remembered = found
        known = {copy.identity for copy in (*log, *dead)}
        return len(log) + len(dead) + sum(copy.identity not in known for copy in remembered)

    def erase(self) -> Iterator[int]:
        """Remove them; gives how many copies each transaction removed."""
        total = 0
        for count in self._steps():
            total += count
            yield count
        if total:
            now_ms = self._ground.now_ms()
            self._ground.write(lambda: erasing.note(total, now_ms))

    def _steps(self) -> Iterator[int]:
        self._identities = self._ground.read(lambda: erasing.meant(self._whose))
        self._incidents()
        yield from self._all(self._find(erasing.in_dead), erasing.from_dead)
        logged = self._find(erasing.in_log)
        yield from self._all(logged, erasing.from_log)
        for some in erasing.portions(logged):
            self._ground.await_holders([copy.number for copy in some])
        yield from self._all(self._find(erasing.in_dead), erasing.from_dead)
        yield from self._all(self._find(erasing.in_identities), erasing.from_identities)
        self._incidents()

    def _all(
        self, copies: Sequence[Copy], remove: Callable[[Sequence[Copy], int], Steps[int]]
    ) -> Iterator[int]:
        for portion in erasing.portions(copies):
            yield self._remove(portion, remove)

    def _remove(
        self, copies: Sequence[Copy], remove: Callable[[Sequence[Copy], int], Steps[int]]
    ) -> int:
        now_ms = self._ground.now_ms()
        return self._ground.write(
            lambda: self._ground.erase(self._with_traces(remove(copies, now_ms)))
        )

    def _with_traces(self, removal: Steps[int]) -> Steps[int]:
        yield from erasing.from_incidents_since(self._looked, self._identities)
        return (yield from removal)

    def _find(self, of: Callable[[Whose], Steps[list[Copy]]]) -> list[Copy]:
        return self._ground.read(lambda: of(self._whose))

    def _incidents(self) -> None:
        after: int | None = 0
        while after is not None:
            self._looked = max(self._looked, after)
            after = self._stretch(after)

    def _stretch(self, after: int) -> int | None:
        end, numbers = self._ground.read(lambda: erasing.incidents(after, self._identities))
        if numbers:
            self._ground.write(lambda: erasing.from_incidents(numbers))
        return end

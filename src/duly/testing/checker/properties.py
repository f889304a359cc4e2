"""The list of properties, each with the name the specification gives it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from duly.guarantees import Guarantee
from duly.testing.checker.case import Case

Find = Callable[[Case], Iterator[str]]
"""Finds what breaks a property: one sentence for each anomaly."""

EVERY = tuple(Guarantee)


@dataclass(frozen=True, slots=True)
class Property:
    """What may not happen under ``guarantees``; with ``ordered`` only in order by key."""

    name: str
    guarantees: tuple[Guarantee, ...]
    ordered: bool
    find: Find

    def applies(self, case: Case) -> bool:
        """Whether the terms of a case promise this."""
        return case.terms.guarantee in self.guarantees and (
            case.terms.order_by_key or not self.ordered
        )


PROPERTIES: dict[str, Property] = {}


def forbids(name: str, *guarantees: Guarantee, ordered: bool = False) -> Callable[[Find], Find]:
    """Enter a function into the list under the property's name."""

    def enter(find: Find) -> Find:
        PROPERTIES[name] = Property(name, guarantees or EVERY, ordered, find)
        return find

    return enter

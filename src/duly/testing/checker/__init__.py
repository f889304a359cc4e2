"""Judges a history by every property of the specification, each by its name.

A verdict is *valid*, *invalid* (a property is broken) or *unknown*: nothing is broken, but the
run did not do what it had to do for that to mean something.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from duly.guarantees import Guarantee
from duly.testing.checker import (  # noqa: F401 - each enters its properties into the list
    at_least_once,
    at_most_once,
    exactly_once,
    liveness,
    order,
    publishing,
)
from duly.testing.checker.case import DEATHS, Case, Terms, case_of
from duly.testing.checker.properties import PROPERTIES, Property
from duly.testing.history import Event, Row

__all__ = [
    "DEATHS",
    "PROPERTIES",
    "Anomaly",
    "Case",
    "Judgement",
    "Property",
    "Terms",
    "case_of",
    "different_rows",
    "judge",
]

Verdict = Literal["valid", "invalid", "unknown"]


@dataclass(frozen=True, slots=True)
class Anomaly:
    """One way in which a property was broken."""

    name: str
    found: str

    def __str__(self) -> str:
        return f"{self.name}: {self.found}"


@dataclass(frozen=True, slots=True)
class Judgement:
    """``unknown`` says why the run proves nothing, where it does not."""

    anomalies: tuple[Anomaly, ...]
    unknown: tuple[str, ...]

    @property
    def verdict(self) -> Verdict:
        """The verdict."""
        if self.anomalies:
            return "invalid"
        return "unknown" if self.unknown else "valid"

    def names(self) -> set[str]:
        """The properties that were broken."""
        return {anomaly.name for anomaly in self.anomalies}


def judge(events: Iterable[Event], terms: Terms) -> Judgement:
    """Judge a history by all that ``terms`` promise."""
    case = case_of(events, terms)
    anomalies = tuple(
        Anomaly(each.name, found)
        for each in PROPERTIES.values()
        if each.applies(case)
        for found in each.find(case)
    )
    return Judgement(anomalies, tuple(_unknowns(case)))


def _unknowns(case: Case) -> Iterator[str]:
    for what, happened in _kinds(case):
        if not happened:
            yield f"no {what} ever succeeded"
    hit = {fault.kind for _, fault in case.faults}
    for kind in sorted(case.planned - hit):
        yield f"the fault {kind!r} never hit"
    reached = {fault.point for _, fault in case.faults}
    for point in sorted(case.terms.crash_points - reached):
        yield f"the crash point {point!r} was never reached"
    if not case.was_read:
        yield "the resources were never read"


def _kinds(case: Case) -> Iterator[tuple[str, bool]]:
    tries = [each for _, all_ in case.inputs() for each in all_]
    yield "publish", any(case.outcome(each) == "ok" for each in tries)
    yield "claim", bool(case.claims)
    yield "handler", any(run.how == "returned" for run in case.runs)
    if case.terms.guarantee is Guarantee.EXACTLY_ONCE:
        yield "commit", any(tx.outcome == "ok" and tx.admit for tx in case.txs.values())
    else:
        settles = [settle for all_ in case.settles.values() for _, settle in all_]
        yield "settlement", any(settle.phase == "ok" for settle in settles)


def different_rows(
    reference: Iterable[Row], found: Iterable[Row], *, volatile: frozenset[str] = frozenset()
) -> list[Anomaly]:
    """Final rows that differ from those of a fault-free run, for any handler at all.

    Rows are compared by table and message; those of ``volatile`` tables are left out.
    """
    wanted, there = (
        {
            (row.table, row.message.identity, row.message.content)
            for row in rows
            if row.table not in volatile
        }
        for rows in (reference, found)
    )
    return [
        *(
            Anomaly("different rows", f"{table}: {identity[2]} is missing")
            for table, identity, _ in sorted(wanted - there)
        ),
        *(
            Anomaly("different rows", f"{table}: {identity[2]} should not be there")
            for table, identity, _ in sorted(there - wanted)
        ),
    ]

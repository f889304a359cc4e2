"""Small scenarios that together pass every crash point, for each kind and guarantee."""

from __future__ import annotations

from collections.abc import Iterator

from duly.testing.simulation.scenario import (
    GUARANTEES,
    KINDS,
    MEMORY_KINDS,
    POSTGRES_KINDS,
    SQLITE_KINDS,
    Kind,
    Manner,
    Scenario,
)

# A retry, a dead letter, a handler that takes long, and one that dies with its worker.
_MANNERS: tuple[Manner, ...] = ("fail once", "reject", "slow", "die once")


def _covering(kinds: tuple[Kind, ...]) -> Iterator[Scenario]:
    for kind in kinds:
        for guarantee in GUARANTEES:
            exactly = guarantee == "exactly-once"
            if (kind == "queue" and guarantee == "at-most-once") or (
                kind in _ONLY_EXACTLY and not exactly
            ):
                continue
            yield Scenario(
                kind=kind,
                guarantee=guarantee,
                # On files and a server, which are slower, only what a store there can do otherwise.
                messages=4 if kind in MEMORY_KINDS else 2 if kind in SQLITE_KINDS else 3,
                batch=2,
                manners=_MANNERS,
                within=exactly and kind in ("database", "sqlite", "postgres"),
            )


_ONLY_EXACTLY: tuple[Kind, ...] = (
    *("log-inbox", "sqlite-inbox", "sqlite-cursor"),
    *("postgres-inbox", "postgres-cursor"),
)

COVERING: tuple[Scenario, ...] = tuple(_covering(KINDS))
"""Every single crash of these reaches every crash point that there is."""

POSTGRES_COVERING: tuple[Scenario, ...] = tuple(_covering(POSTGRES_KINDS))
"""The same on a server."""

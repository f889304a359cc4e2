"""The generated part of docs/guarantees.md: what was run behind each guarantee, and what was found.

``python -m tests.proof.table`` runs the sample, some seconds of schedules, and writes the page;
with ``--long`` the long campaign runs first, which takes a quarter of an hour. Both are from seeds:
what they show is the same every time, until the code changes.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import msgspec
from msgspec.structs import replace

from duly.guarantees import PROMISES, Guarantee
from duly.testing.simulation.campaign import Cells, campaign, count, covering, crashes, one_of
from duly.testing.simulation.covering import COVERING
from duly.testing.simulation.points import CRASH_POINTS
from duly.testing.simulation.results import Shown, shown
from duly.testing.simulation.run import Outcome
from duly.testing.simulation.scenario import KINDS, MEMORY_KINDS, SQLITE_KINDS, Scenario, any_of

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "guarantees.md"
SHOWN = ROOT / "docs" / "internals" / "shown"
SAMPLE, LONG, PAIRS, POWER_LOSS = (
    SHOWN / f"{name}.json" for name in ("sample", "long", "pairs", "power_loss")
)

LONG_DISTINCT = 100_000
# Random schedules of each cell in the sample; files are some ten times as slow as memory.
IN_MEMORY, ON_SQLITE = 60, 12

# What stands in front of a row, and why a cell is empty.
PLACES: Mapping[str, str] = {
    "sqlite": "SQLite, effects in the same file (by claim)",
    "sqlite-inbox": "SQLite, effects in another file (by inbox)",
    "sqlite-cursor": "a log in memory, effects in a SQLite file (by cursor)",
    "database": "the database in memory (by claim)",
    "log": "the log in memory, effects in memory (by cursor)",
    "log-inbox": "the log in memory, effects in memory (by inbox)",
    "queue": "the queue in memory, effects in memory (by inbox)",
}
GUARANTEES = ("at-most-once", "at-least-once", "exactly-once")
REFUSED = {("queue", "at-most-once"): "refused: it does not confirm settlement"}


# --- the runs


def sample() -> dict[str, Shown]:
    """Every crash of the covering scenarios, and some random schedules of each cell.

    Without coroutines: in which order a loop runs what is ready may differ between Pythons.
    """
    return shown(count(itertools.chain(covering(), _random())))


def _random() -> Iterator[Outcome]:
    for scenario in COVERING:
        for seed in range(IN_MEMORY if scenario.kind in MEMORY_KINDS else ON_SQLITE):
            random = Random(seed)
            drawn = any_of(random, scenario.kind, scenario.guarantee)
            yield one_of(replace(drawn, asynchronous=False, concurrency=1), seed, random)


def long() -> dict[str, Shown]:
    """The long campaign: ``python -m duly.testing.simulation --schedules 100000``."""
    processes = os.cpu_count() or 1
    return shown(campaign(KINDS, distinct=LONG_DISTINCT, processes=processes))


def pairs() -> dict[str, Shown]:
    """A worker dies at one of its points, and its successor at one of its own: all of them."""
    cells: Cells = {}
    for kind in KINDS:
        cells |= count(crashes(Scenario(kind=kind, guarantee="exactly-once", messages=1)))
    return shown(cells)


def kept(path: Path) -> dict[str, Shown]:
    """What a run showed."""
    return msgspec.json.decode(path.read_bytes(), type=dict[str, Shown])


def keep(path: Path, what: Mapping[str, Shown]) -> None:
    """Keep what a run showed."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(what)) + b"\n")


# --- the page

_BLOCK = re.compile(r"(<!-- (\w+), written by make guarantees -->\n).*?(<!-- end -->\n)", re.DOTALL)


def page(text: str) -> str:
    """The page with its generated blocks as the kept results have them."""
    results, power = kept(LONG), msgspec.json.decode(POWER_LOSS.read_bytes())
    blocks = {
        "promises": promises_table,
        "cells": lambda: cells_table(results),
        "sample": lambda: cells_table(kept(SAMPLE)),
        "points": lambda: points_table(results),
        "faults": lambda: faults_table(results),
        "pairs": lambda: pairs_table(kept(PAIRS)),
        "power": lambda: power_table(power),
    }
    return _BLOCK.sub(lambda found: found[1] + blocks[found[2]]() + found[3], text)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def promises_table() -> str:
    """The promises, as the code has them."""
    names = ("promise", "a_crash_costs", "publish", "consume", "fits")
    rows = [
        (name.replace("_", " "), *(getattr(PROMISES[Guarantee(g)], name) for g in GUARANTEES))
        for name in names
    ]
    return _table(("", *GUARANTEES), rows)


def cells_table(results: Mapping[str, Shown]) -> str:
    """By broker and store, and by guarantee."""
    rows = [
        (place, *(_cell(results, kind, guarantee) for guarantee in GUARANTEES))
        for kind, place in PLACES.items()
    ]
    return _table(("messages and effects in", *GUARANTEES), rows)


def _cell(results: Mapping[str, Shown], kind: str, guarantee: str) -> str:
    if (kind, guarantee) in REFUSED:
        return REFUSED[kind, guarantee]
    found = results.get(f"{kind}, {guarantee}")
    if found is None:
        return "no store takes part"
    wrong = ", ".join(f"{n} {name}" for name, n in found.anomalies.items()) or "0 anomalies"
    return (
        f"{found.distinct:,} schedules, {len(found.crashes)} crash points, "
        f"{len(found.faults)} kinds of fault: {wrong}"
    )


def _sum(results: Mapping[str, Shown], what: str, kinds: tuple[str, ...]) -> Counter[str]:
    total: Counter[str] = Counter()
    for name, found in results.items():
        if name.partition(",")[0] in kinds:
            total.update(getattr(found, what))
    return total


def points_table(results: Mapping[str, Shown]) -> str:
    """How often a process died at each crash point."""
    memory, files = (_sum(results, "crashes", kinds) for kinds in (MEMORY_KINDS, SQLITE_KINDS))
    rows = [(name, f"{memory[name]:,}", f"{files[name]:,}") for name in CRASH_POINTS]
    return _table(("crash point", "in memory", "with SQLite"), rows)


def faults_table(results: Mapping[str, Shown]) -> str:
    """How often each kind of fault hit."""
    memory, files = (_sum(results, "faults", kinds) for kinds in (MEMORY_KINDS, SQLITE_KINDS))
    names = sorted(memory | files, key=lambda name: -(memory + files)[name])
    rows = [(name, f"{memory[name]:,}", f"{files[name]:,}") for name in names]
    return _table(("fault", "in memory", "with SQLite"), rows)


def pairs_table(results: Mapping[str, Shown]) -> str:
    """Pairs of crashes, by broker and store."""
    rows = []
    for kind, place in PLACES.items():
        found = results[f"{kind}, exactly-once"]
        wrong = ", ".join(f"{n} {name}" for name, n in found.anomalies.items()) or "0"
        rows.append((place, f"{found.schedules:,}", wrong))
    return _table(("messages and effects in", "crashes and pairs of crashes", "anomalies"), rows)


def power_table(found: Mapping[str, Any]) -> str:
    """Images of a lost disk."""
    kinds = ", ".join(f"{n} {kind}" for kind, n in found["kinds"].items())
    rows = [
        ("images opened", f"{found['images']:,}, of {found['moments']:,} moments"),
        ("what became of unsynced writes", kinds),
        ("acknowledged publishes looked for", f"{found['acknowledged']:,}"),
        ("committed effects looked for", f"{found['committed']:,}"),
        ("lost, torn, taken effect twice, or a broken file", "0"),
    ]
    return _table(("power loss on SQLite", f"seed {found['seed']}"), rows)


def main() -> None:
    """Run what is asked for and write the page."""
    SHOWN.mkdir(exist_ok=True)
    if "--long" in sys.argv:
        keep(LONG, long())
        keep(PAIRS, pairs())
    keep(SAMPLE, sample())
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()

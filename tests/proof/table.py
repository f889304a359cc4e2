"""The generated part of docs/guarantees.md: what was run behind each guarantee, and what was found.

``python -m tests.proof.table`` runs the sample, some seconds of schedules, and writes the page;
with ``--long`` the long campaign runs first, which takes a quarter of an hour, and with
``--postgres 4000`` every pair of crashes, every single one and so many random schedules on a
PostgreSQL server. All are from seeds: what they
show is the same every time, until the code changes; on a server nearly so, for what waits for a
lock there gives up in real time.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import msgspec
from msgspec.structs import replace

from duly.guarantees import PROMISES, Guarantee
from duly.testing.chaos.setup import FAULTS
from duly.testing.postgres import OTHER, PrivateServer
from duly.testing.simulation.campaign import (
    Cells,
    Tally,
    campaign,
    count,
    covering,
    crashes,
    one_of,
)
from duly.testing.simulation.covering import COVERING, POSTGRES_COVERING
from duly.testing.simulation.points import CRASH_POINTS
from duly.testing.simulation.results import Shown, shown
from duly.testing.simulation.run import Outcome
from duly.testing.simulation.scenario import (
    KINDS,
    MEMORY_KINDS,
    POSTGRES_KINDS,
    SQLITE_KINDS,
    Kind,
    Scenario,
    any_of,
)
from tests.postgres import planted as planted_store
from tests.postgres import planted_broker
from tests.proof.mutations import MUTATIONS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "guarantees.md"
SHOWN = ROOT / "docs" / "internals" / "shown"
SAMPLE, LONG, PAIRS, POWER_LOSS, POSTGRES, POSTGRES_PAIRS = (
    SHOWN / f"{name}.json"
    for name in ("sample", "long", "pairs", "power_loss", "postgres", "postgres_pairs")
)
CHAOS = SHOWN / "chaos"

LONG_DISTINCT = 100_000
# A server is slower still than files: at least so many random ones, or as many as are asked for.
POSTGRES_DISTINCT = 1_000
# Nothing there has to outlive the server, and what would come in between is kept out.
_SETTINGS = (
    *("fsync=off", "synchronous_commit=off", "full_page_writes=off", "autovacuum=off"),
    *("wal_level=minimal", "max_wal_senders=0"),
)
# So that processes end at nearly the same time.
SHARES = 8
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
    "postgres": "PostgreSQL, effects in the same schema (by claim)",
    "postgres-inbox": "a queue in memory, effects in PostgreSQL (by inbox)",
    "postgres-cursor": "a log in memory, effects in PostgreSQL (by cursor)",
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


def on_postgres(distinct: int) -> dict[str, Shown]:
    """Every crash of the covering scenarios on a server, and random schedules."""
    processes = os.cpu_count() or 1
    cells: Cells = {}
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        for part in pool.map(_crashes_of, POSTGRES_COVERING):
            cells |= part
    some = campaign(POSTGRES_KINDS, distinct=distinct, processes=processes)
    for cell, tally in some.items():
        cells.setdefault(cell, Tally()).merge(tally)
    return shown(cells)


def _crashes_of(scenario: Scenario) -> Cells:
    return count(covering([scenario]))


def pairs_on_postgres() -> dict[str, Shown]:
    """The same as `pairs` on a server, by as many processes as there are cores."""
    processes = os.cpu_count() or 1
    shares = [(kind, (n, SHARES)) for kind in POSTGRES_KINDS for n in range(SHARES)]
    cells: Cells = {}
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        for part in pool.map(_pairs_of, shares):
            for cell, tally in part.items():
                cells.setdefault(cell, Tally()).merge(tally)
    return shown(cells)


def _pairs_of(part: tuple[Kind, tuple[int, int]]) -> Cells:
    kind, share = part
    return count(crashes(_one_message(kind), share=share))


def _one_message(kind: Kind) -> Scenario:
    return Scenario(kind=kind, guarantee="exactly-once", messages=1)


def pairs() -> dict[str, Shown]:
    """A worker dies at one of its points, and its successor at one of its own: all of them."""
    cells: Cells = {}
    for kind in KINDS:
        cells |= count(crashes(_one_message(kind)))
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
    results, power = kept(LONG) | kept(POSTGRES), msgspec.json.decode(POWER_LOSS.read_bytes())
    chaos = crowds()
    blocks = {
        "promises": promises_table,
        "cells": lambda: cells_table(results),
        "sample": lambda: cells_table(kept(SAMPLE)),
        "points": lambda: points_table(results),
        "faults": lambda: faults_table(results),
        "pairs": lambda: pairs_table(kept(PAIRS) | kept(POSTGRES_PAIRS)),
        "planted": planted_table,
        "chaos": lambda: chaos_table(chaos),
        "struck": lambda: struck_table(chaos),
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
        if any(name.partition(",")[0] == kind for name in results)
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


_PLACES = (MEMORY_KINDS, SQLITE_KINDS, POSTGRES_KINDS)
_IN_PLACES = ("in memory", "with SQLite", "with PostgreSQL")


def points_table(results: Mapping[str, Shown]) -> str:
    """How often a process died at each crash point."""
    by_place = [_sum(results, "crashes", kinds) for kinds in _PLACES]
    rows = [(name, *(f"{counts[name]:,}" for counts in by_place)) for name in CRASH_POINTS]
    return _table(("crash point", *_IN_PLACES), rows)


def faults_table(results: Mapping[str, Shown]) -> str:
    """How often each kind of fault hit."""
    by_place = [_sum(results, "faults", kinds) for kinds in _PLACES]
    whole = sum(by_place, Counter[str]())
    rows = [
        (name, *(f"{counts[name]:,}" for counts in by_place)) for name, _ in whole.most_common()
    ]
    return _table(("fault", *_IN_PLACES), rows)


def pairs_table(results: Mapping[str, Shown]) -> str:
    """Pairs of crashes, by broker and store."""
    rows = []
    for kind, place in PLACES.items():
        found = results.get(f"{kind}, exactly-once")
        if found is None:
            continue
        wrong = ", ".join(f"{n} {name}" for name, n in found.anomalies.items()) or "0"
        rows.append((place, f"{found.schedules:,}", wrong))
    return _table(("messages and effects in", "crashes and pairs of crashes", "anomalies"), rows)


def planted_table() -> str:
    """How many bugs are planted where, and what has to find them."""
    rows = [
        ("the core, memory and SQLite", f"{len(MUTATIONS)}", f"{len(MUTATIONS)}", "0"),
        *(
            (
                f"PostgreSQL: the {name}",
                f"{len(of.SIMULATED) + len(of.TESTED)}",
                f"{len(of.SIMULATED)}",
                f"{len(of.TESTED)}",
            )
            for name, of in (("broker", planted_broker), ("store", planted_store))
        ),
    ]
    head = ("planted into", "bugs", "found by simulation", "by tests on a real server")
    return _table(head, rows)


def crowds() -> list[dict[str, Any]]:
    """What the kept runs of crowds showed, by their setup: `duly.testing.chaos --save`."""
    by_setup: dict[str, dict[str, Any]] = {}
    for path in sorted(CHAOS.glob("*.json")):
        run = msgspec.json.decode(path.read_bytes())
        whole = by_setup.setdefault(run["setup"], run)
        if whole is not run:
            for name in ("seconds", "rounds", "events", "complaints"):
                whole[name] += run[name]
            for name in ("operations", "hits", "anomalies"):
                whole[name] = dict(Counter(whole[name]) + Counter(run[name]))
    return list(by_setup.values())


def chaos_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """What crowds of real processes did, by where messages and effects were."""
    rows = [
        (
            run["setup"],
            f"{run['seconds'] / 60:.0f} min, {run['rounds']} rounds",
            *(f"{run['operations'][name]:,}" for name in _OPERATIONS),
            f"{sum(run['hits'].values()):,}",
            ", ".join(f"{n} {name}" for name, n in run["anomalies"].items()) or "0",
        )
        for run in runs
    ]
    head = ("chaos", "ran for", *_OPERATIONS, "faults that hit", "anomalies")
    return _table(head, rows)


_OPERATIONS = ("publish", "claim", "settle", "commit", "handler")


def struck_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Which faults hit there."""
    names = [name for name in FAULTS if any(name in run["profile"] for run in runs)]
    rows = [
        (name, *(f"{run['hits'].get(name, 0):,}" if name in run["profile"] else "" for run in runs))
        for name in names
    ]
    return _table(("fault", *(run["setup"] for run in runs)), rows)


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


def _number_after(option: str) -> int:
    following = sys.argv[sys.argv.index(option) + 1 :]
    return int(following[0]) if following and following[0].isdecimal() else 0


def main() -> None:
    """Run what is asked for and write the page."""
    SHOWN.mkdir(exist_ok=True)
    if "--long" in sys.argv:
        keep(LONG, long())
        keep(PAIRS, pairs())
    if "--postgres" in sys.argv:
        with PrivateServer(_SETTINGS) as server:
            os.environ[OTHER] = server.near_url
            keep(POSTGRES_PAIRS, pairs_on_postgres())
            keep(POSTGRES, on_postgres(max(POSTGRES_DISTINCT, _number_after("--postgres"))))
    keep(SAMPLE, sample())
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()

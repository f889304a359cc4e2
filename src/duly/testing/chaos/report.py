"""The table that a chaos run prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

from duly.testing.chaos.setup import Setup
from duly.testing.chaos.verdict import Tally

Verdict = Literal["valid", "invalid", "unknown"]
_COLOURS: dict[Verdict, str] = {"valid": "bold green", "invalid": "bold red", "unknown": "yellow"}
_PHASES = ("ok", "fail", "refused", "info")
_SHOWN = 20
_ON_FILES = Setup().profile()


def verdict_of(tally: Tally, profile: Sequence[str] = _ON_FILES) -> Verdict:
    """Of a whole run: it is unknown what was shown, where a fault of its profile never hit or
    something never succeeded.
    """
    if not tally.is_good:
        return "invalid"
    return "unknown" if any(reasons(tally, profile)) else "valid"


def reasons(tally: Tally, profile: Sequence[str]) -> Iterator[str]:
    """Why a run shows nothing: what succeeded in no round, and what hit in none."""
    yield from sorted(why for why, rounds in tally.unknown.items() if rounds == tally.rounds)
    for kind in profile:
        if not tally.hits[kind]:
            yield f"the fault {kind!r} never hit"


def report(console: Console, tally: Tally, profile: Sequence[str], seconds: float) -> None:
    """Print operations, faults, and for each consumer what was broken, and the verdict."""
    console.print(_operations(tally))
    console.print(_faults(tally, profile))
    console.print(_consumers(tally))
    for round_, consumer, anomaly in tally.anomalies[:_SHOWN]:
        console.print(f"[red]{round_} {consumer}[/]: {anomaly}", highlight=False)
    if len(tally.anomalies) > _SHOWN:
        console.print(f"... and {len(tally.anomalies) - _SHOWN} more")
    for complaint in tally.complaints[:_SHOWN]:
        console.print(f"[red]complaint[/]: {complaint}", highlight=False)
    verdict = verdict_of(tally, profile)
    for why in reasons(tally, profile):
        console.print(f"unknown: {why}", highlight=False)
    console.print(
        f"{tally.rounds} rounds, {tally.events:,} events in {seconds:.0f} s, "
        f"{len(tally.anomalies)} anomalies: [{_COLOURS[verdict]}]{verdict}[/]",
        highlight=False,
    )


def shown(tally: Tally, setup: str, profile: Sequence[str], seconds: float) -> bytes:
    """The same in a form that is kept beside documents: JSON."""
    told = {
        "setup": setup,
        "seconds": round(seconds),
        "rounds": tally.rounds,
        "events": tally.events,
        "operations": {
            name: tally.operations[name, "invoke"]
            for name in ("publish", "claim", "settle", "commit", "handler")
        },
        "profile": list(profile),
        "hits": {name: tally.hits[name] for name in profile},
        "anomalies": dict(Counter(each.name for _, _, each in tally.anomalies)),
        "complaints": len(tally.complaints),
        "verdict": verdict_of(tally, profile),
    }
    return msgspec.json.format(msgspec.json.encode(told)) + b"\n"


def _operations(tally: Tally) -> Table:
    table = Table("operation", box=box.SIMPLE, title="operations", title_justify="left")
    for name in ("invoked", "ok", "failed", "refused", "unknown"):
        table.add_column(name, justify="right")
    for operation in ("publish", "claim", "settle", "commit"):
        ended = [tally.operations[operation, phase] for phase in _PHASES]
        invoked = tally.operations[operation, "invoke"]
        # Deliveries are counted one by one, claims by the call: their sum says nothing. A commit
        # that was never asked for is a rollback. What has no end died in between.
        counted = operation not in ("claim", "commit")
        lost = f"{max(0, invoked - sum(ended)) + ended[3]:,}" if counted else f"{ended[3]:,}"
        table.add_row(operation, f"{invoked:,}", *(f"{n:,}" for n in ended[:3]), lost)
    starts = tally.operations["handler", "invoke"]
    returned = tally.operations["handler", "returned"]
    raised = tally.operations["handler", "raised"] + tally.operations["handler", "cancelled"]
    cut = starts - returned - raised
    table.add_row("handler", f"{starts:,}", f"{returned:,}", f"{raised:,}", "", f"{cut:,}")
    return table


def _faults(tally: Tally, profile: Sequence[str]) -> Table:
    table = Table("fault", box=box.SIMPLE, title="faults", title_justify="left")
    table.add_column("done", justify="right")
    table.add_column("hit", justify="right")
    for kind in profile:
        done = max(tally.struck.get(kind, 0), tally.hits[kind])
        table.add_row(kind, f"{done:,}", f"{tally.hits[kind]:,}")
    return table


def _consumers(tally: Tally) -> Table:
    table = Table("consumer", "guarantee", box=box.SIMPLE, title="judged", title_justify="left")
    for name in ("messages", "starts", "dead"):
        table.add_column(name, justify="right")
    table.add_column("anomalies")
    for consumer, guarantee in tally.consumers.items():
        names = Counter(each.name for _, name, each in tally.anomalies if name == consumer)
        found = ", ".join(f"{count} {name}" for name, count in names.most_common())
        table.add_row(
            consumer,
            guarantee,
            f"{tally.messages[consumer]:,}",
            f"{tally.starts[consumer]:,}",
            f"{tally.dead[consumer]:,}",
            f"[red]{found}[/]" if found else "0",
        )
    return table

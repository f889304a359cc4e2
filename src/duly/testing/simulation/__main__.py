"""``python -m duly.testing.simulation``: run schedules, or replay one of them.

Without options it runs random schedules for ten seconds and prints what was covered and found.
``--seed`` alone replays one of those; with ``--scenario`` and ``--faults`` it replays exactly
what a failure printed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from time import monotonic

import click
import msgspec

from duly.testing.simulation.campaign import (
    Cells,
    campaign,
    count,
    covering,
    crashes,
    hunt,
    merged,
    one_of,
    random_schedule,
)
from duly.testing.simulation.plan import Given, hits_of
from duly.testing.simulation.points import covered
from duly.testing.simulation.results import shown
from duly.testing.simulation.run import Outcome, run
from duly.testing.simulation.scenario import KINDS, Kind, scenario_of
from duly.testing.simulation.shrink import command, shrink


@click.command(help=__doc__)
@click.option("--seed", type=int, help="The seed of one schedule.")
@click.option("--scenario", "scenario_text", help="What is simulated, as a failure printed it.")
@click.option("--faults", help="The faults that hit, as a failure printed them; or none.")
@click.option("--seconds", type=float, default=10.0, show_default=True)
@click.option("--schedules", type=int, help="Not for some time: until so many distinct ones ran.")
@click.option("--processes", type=int, default=0, help="0: one for each core.")
@click.option("--first", type=int, default=0, help="The first seed of a campaign.")
@click.option("--kinds", default=",".join(KINDS), show_default=True)
@click.option(
    "--enumerate",
    "enumerates",
    is_flag=True,
    help="Every crash, and every pair, of --scenario; without it every crash of the covering ones.",
)
@click.option("--save", type=click.Path(path_type=Path), help="Keep what was shown, as JSON.")
@click.option("--until", metavar="PROPERTY", help="Run --scenario until this is broken.")
def main(
    seed: int | None,
    scenario_text: str | None,
    faults: str | None,
    seconds: float,
    schedules: int | None,
    processes: int,
    first: int,
    kinds: str,
    enumerates: bool,
    save: Path | None,
    until: str | None,
) -> None:
    """Run or replay what the options say; ends with 1 where a property was broken."""
    chosen: tuple[Kind, ...] = tuple(scenario_of(f"kind={kind}").kind for kind in kinds.split(","))
    if until is not None:
        found = hunt(scenario_of(scenario_text or ""), until)
        if found is not None:
            tell(found)  # as it is: its scenario is small
        sys.exit(found is not None)
    if seed is not None:
        sys.exit(not replay(seed, scenario_text, faults, chosen))
    started = monotonic()
    if enumerates:
        pairs = None if scenario_text is None else crashes(scenario_of(scenario_text))
        cells = count(pairs or covering())
    else:
        cells = campaign(
            chosen,
            first=first,
            distinct=schedules,
            seconds=seconds,
            processes=processes or os.cpu_count() or 1,
        )
    if save is not None:
        save.write_bytes(msgspec.json.format(msgspec.json.encode(shown(cells))))
    sys.exit(not report(cells, monotonic() - started))


def replay(
    seed: int, scenario_text: str | None, faults: str | None, kinds: tuple[Kind, ...]
) -> bool:
    """Run one schedule and print what happened; whether nothing was broken."""
    if scenario_text is None:
        outcome = random_schedule(seed, kinds)
    elif faults is None:
        outcome = one_of(scenario_of(scenario_text), seed)
    else:
        hits = hits_of("" if faults == "none" else faults)
        outcome = run(scenario_of(scenario_text), seed, Given(hits))
    for event in outcome.events:
        click.echo(str(event))
    for anomaly in outcome.judgement.anomalies:
        click.echo(f"ANOMALY {anomaly}")
    for why in outcome.judgement.unknown:
        click.echo(f"unknown: {why}")
    click.echo(outcome.judgement.verdict)
    return not outcome.judgement.anomalies


def report(cells: Cells, seconds: float) -> bool:
    """Print what was covered and found, and for each failure the command that replays it; whether
    nothing was broken.
    """
    tally = merged(cells)
    click.echo(
        f"{tally.runs:,} schedules, {len(tally.traces):,} distinct, in {seconds:.0f} s "
        f"({tally.runs / seconds * 60:,.0f} a minute); "
        + ", ".join(f"{count:,} {verdict}" for verdict, count in tally.verdicts.most_common())
    )
    click.echo("\ndistinct schedules, by kind and guarantee:")
    for (kind, guarantee), part in sorted(cells.items()):
        click.echo(f"  {len(part.traces):8,}  {kind}, {guarantee}")
    click.echo("\nfaults that hit:")
    for fault, hits in tally.faults.most_common():
        click.echo(f"  {hits:8,}  {fault}")
    click.echo("\ncrashes, by crash point:")
    for point, hits in covered(tally.crashes).items():
        click.echo(f"  {hits:8,}  {point}")
    click.echo("\nanomalies:" if tally.anomalies else "\n0 anomalies")
    for name, found in tally.anomalies.most_common():
        click.echo(f"  {found:8,}  {name}")
    told: set[str] = set()
    for outcome in tally.failures:
        if not outcome.judgement.names() <= told:
            told |= outcome.judgement.names()
            tell(shrink(outcome))
    return not tally.anomalies


def tell(outcome: Outcome) -> None:
    """Print what a schedule broke, and what replays it."""
    for anomaly in outcome.judgement.anomalies:
        click.echo(f"\n{anomaly}")
    click.echo(command(outcome))


if __name__ == "__main__":
    main()

"""``python -m duly.testing.simulation``: run schedules, or replay one of them.

Without options it runs random schedules for ten seconds and prints what was covered and found.
``--seed`` alone replays one of those; with ``--scenario`` and ``--faults`` it replays exactly
what a failure printed. Ends with 1 where a property was broken, and with 2 where what was asked
for shows nothing: an option is wrong, or a fault of a replay never hit.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from time import monotonic

import click
import msgspec

from duly.testing.checker import PROPERTIES
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
from duly.testing.simulation.plan import Given, Hit, hits_of
from duly.testing.simulation.points import covered
from duly.testing.simulation.results import shown
from duly.testing.simulation.run import Outcome, run
from duly.testing.simulation.scenario import ALL_KINDS, KINDS, Kind, Scenario, scenario_of
from duly.testing.simulation.shrink import command, shrink
from duly.testing.wrong_use import Command, Seconds, WrongUse, check_together, writable_file


@click.command(cls=Command, help=__doc__)
@click.option("--seed", type=int, help="The seed of one schedule.")
@click.option("--scenario", "scenario_text", help="What is simulated, as a failure printed it.")
@click.option("--faults", help="The faults that hit, as a failure printed them; or none.")
@click.option("--seconds", type=Seconds(), default=10.0, show_default=True)
@click.option(
    "--schedules",
    type=click.IntRange(min=1),
    help="Not for some time: until so many distinct ones ran.",
)
@click.option("--processes", type=click.IntRange(min=0), default=0, help="0: one for each core.")
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
@click.pass_context
def main(
    ctx: click.Context,
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
    mode = "until" if until else "seed" if seed is not None else "enumerates" if enumerates else ""
    check_together(ctx, OPTIONS[mode], MODES[mode])
    chosen: tuple[Kind, ...] = tuple(_kind(each) for each in kinds.split(","))
    scenario = None if scenario_text is None else _scenario(scenario_text)
    if until is not None:
        found = hunt(scenario or _scenario(""), _property(until))
        if found is not None:
            tell(found)  # as it is: its scenario is small
        sys.exit(found is not None)
    if seed is not None:
        if faults is not None and scenario is None:
            raise WrongUse("--faults means nothing without the --scenario that it was printed with")
        sys.exit(replay(seed, scenario, None if faults is None else _hits(faults), chosen))
    if schedules is not None:
        check_together(ctx, OPTIONS[""] - {"seconds"}, "with --schedules")
    if save is not None:
        writable_file(save)
    started = monotonic()
    if enumerates:
        pairs = None if scenario is None else crashes(scenario)
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


MODES = {
    "until": "while a property is hunted",
    "seed": "where one schedule is replayed",
    "enumerates": "where crashes are enumerated",
    "": "in a campaign of random schedules",
}
OPTIONS = {
    "until": {"until", "scenario_text"},
    "seed": {"seed", "scenario_text", "faults", "kinds"},
    "enumerates": {"enumerates", "scenario_text", "save"},
    "": {"seconds", "schedules", "processes", "first", "kinds", "save"},
}


def _kind(named: str) -> Kind:
    known: dict[str, Kind] = {kind: kind for kind in ALL_KINDS}
    if named in known:
        return known[named]
    raise WrongUse(f"--kinds: {named!r} is no kind; there are {', '.join(ALL_KINDS)}")


def _scenario(text: str) -> Scenario:
    try:
        return scenario_of(text)
    except ValueError as error:
        raise WrongUse(f"--scenario: {error}") from None


def _hits(text: str) -> list[Hit]:
    try:
        return hits_of("" if text == "none" else text)
    except ValueError as error:
        raise WrongUse(f"--faults: {error}") from None


def _property(named: str) -> str:
    if named not in PROPERTIES:
        raise WrongUse(f"--until: {named!r} is no property; there are {', '.join(PROPERTIES)}")
    return named


def replay(
    seed: int, scenario: Scenario | None, hits: list[Hit] | None, kinds: tuple[Kind, ...]
) -> int:
    """Run one schedule and print what happened; 1 where something was broken, 2 where a fault
    that was asked for never hit.
    """
    if scenario is None:
        outcome = random_schedule(seed, kinds)
    elif hits is None:
        outcome = one_of(scenario, seed)
    else:
        outcome = run(scenario, seed, Given(hits))
    missed = [hit.text() for hit in hits or () if hit not in outcome.hits]
    for event in outcome.events:
        click.echo(str(event))
    for anomaly in outcome.judgement.anomalies:
        click.echo(f"ANOMALY {anomaly}")
    for why in outcome.judgement.unknown:
        click.echo(f"unknown: {why}")
    for text in missed:
        click.echo(f"unknown: the fault {text} never hit")
    click.echo(
        "unknown" if missed and not outcome.judgement.anomalies else outcome.judgement.verdict
    )
    return 1 if outcome.judgement.anomalies else 2 if missed else 0


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

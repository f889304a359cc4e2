"""``python -m duly.testing.simulation``: run schedules, or replay one of them.

Without options it runs random schedules of the brokers in memory for ten seconds and prints
what was covered and found. ``--seed`` alone replays one of those; with ``--scenario`` and
``--faults`` it replays exactly what a failure printed.
"""

from __future__ import annotations

import os
import sys
from multiprocessing import get_context
from time import monotonic

import click

from duly.testing.simulation.campaign import (
    Tally,
    crashes,
    one_of,
    random_schedule,
    random_schedules,
)
from duly.testing.simulation.plan import Given, hits_of
from duly.testing.simulation.points import covered
from duly.testing.simulation.run import Outcome, run
from duly.testing.simulation.scenario import MEMORY_KINDS, Kind, scenario_of
from duly.testing.simulation.shrink import command, shrink

SHARE = 1_000_000_000


@click.command(help=__doc__)
@click.option("--seed", type=int, help="The seed of one schedule.")
@click.option("--scenario", "scenario_text", help="What is simulated, as a failure printed it.")
@click.option("--faults", help="The faults that hit, as a failure printed them; or none.")
@click.option("--seconds", type=float, default=10.0, show_default=True)
@click.option("--processes", type=int, default=0, help="0: one for each core.")
@click.option("--first", type=int, default=0, help="The first seed of a campaign.")
@click.option("--kinds", default=",".join(MEMORY_KINDS), show_default=True)
@click.option(
    "--enumerate", "enumerates", is_flag=True, help="Every crash, and every pair, of --scenario."
)
def main(
    seed: int | None,
    scenario_text: str | None,
    faults: str | None,
    seconds: float,
    processes: int,
    first: int,
    kinds: str,
    enumerates: bool,
) -> None:
    """Run or replay what the options say; ends with 1 where a property was broken."""
    if enumerates:
        tally = Tally()
        started = monotonic()
        for outcome in crashes(scenario_of(scenario_text or "")):
            tally.add(outcome)
        report(tally, monotonic() - started)
        sys.exit(bool(tally.anomalies))
    if seed is not None:
        sys.exit(not replay(seed, scenario_text, faults))
    chosen: tuple[Kind, ...] = tuple(scenario_of(f"kind={kind}").kind for kind in kinds.split(","))
    started = monotonic()
    tally = campaign(first, seconds, chosen, processes or os.cpu_count() or 1)
    report(tally, monotonic() - started)
    sys.exit(bool(tally.anomalies))


def replay(seed: int, scenario_text: str | None, faults: str | None) -> bool:
    """Run one schedule and print what happened; whether nothing was broken."""
    if scenario_text is None:
        outcome = random_schedule(seed)
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


def campaign(first: int, seconds: float, kinds: tuple[Kind, ...], processes: int) -> Tally:
    """Random schedules, on several processes where there are several."""
    shares = [(first + number * SHARE, seconds, kinds) for number in range(processes)]
    if processes == 1:
        return _share(shares[0])
    with get_context("spawn").Pool(processes) as pool:
        tallies = pool.map(_share, shares)
    whole = Tally()
    for tally in tallies:
        merge(whole, tally)
    return whole


def _share(share: tuple[int, float, tuple[Kind, ...]]) -> Tally:
    first, seconds, kinds = share
    tally = Tally()
    for outcome in random_schedules(first, SHARE, kinds, seconds):
        tally.add(outcome)
    return tally


def merge(whole: Tally, part: Tally) -> None:
    """Add what another process has run."""
    whole.runs += part.runs
    whole.traces |= part.traces
    whole.failures += part.failures
    for name in ("faults", "reached", "crashes", "anomalies", "verdicts"):
        getattr(whole, name).update(getattr(part, name))


def report(tally: Tally, seconds: float) -> None:
    """Print what was covered and found, and for each failure the command that replays it."""
    click.echo(
        f"{tally.runs:,} schedules, {len(tally.traces):,} distinct, in {seconds:.0f} s "
        f"({tally.runs / seconds * 60:,.0f} a minute); "
        + ", ".join(f"{count:,} {verdict}" for verdict, count in tally.verdicts.most_common())
    )
    click.echo("\nfaults that hit:")
    for kind, count in tally.faults.most_common():
        click.echo(f"  {count:8,}  {kind}")
    click.echo("\ncrashes, by crash point:")
    for point, count in covered(tally.crashes).items():
        click.echo(f"  {count:8,}  {point}")
    click.echo("\nanomalies:" if tally.anomalies else "\n0 anomalies")
    for name, count in tally.anomalies.most_common():
        click.echo(f"  {count:8,}  {name}")
    told: set[str] = set()
    for outcome in tally.failures:
        if not outcome.judgement.names() <= told:
            told |= outcome.judgement.names()
            tell(shrink(outcome))


def tell(outcome: Outcome) -> None:
    """Print what a schedule broke, and what replays it."""
    for anomaly in outcome.judgement.anomalies:
        click.echo(f"\n{anomaly}")
    click.echo(command(outcome))


if __name__ == "__main__":
    main()

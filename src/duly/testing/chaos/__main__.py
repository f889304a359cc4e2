"""``python -m duly.testing.chaos``: real processes, real files, real faults, and a verdict.

Ends with 1 where a promise was broken, and with 2 where the run does not show whether it was: a
fault never hit, or something never succeeded. A round that broke something is kept, histories,
logs and database files; ``--judge`` judges it again.
"""

from __future__ import annotations

import itertools
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console

from duly.testing.chaos.processes import Nursery
from duly.testing.chaos.report import report, verdict_of
from duly.testing.chaos.round import STRIKES, Round
from duly.testing.chaos.verdict import FAULTS, Tally, judged

PROGRAM = "duly.testing.chaos.program:run"
EXIT = {"valid": 0, "invalid": 1, "unknown": 2}
FAULTS_S = 12.0


@click.command(help=__doc__)
@click.option(
    "--minutes", type=click.FloatRange(min=0, min_open=True), default=1.0, show_default=True
)
@click.option("--seed", type=int, default=None, help="Of all that is random; left out, any.")
@click.option("--round", "only", type=int, default=None, help="Play this round of the seed only.")
@click.option(
    "--faults-s", type=float, default=FAULTS_S, show_default=True, help="Seconds of each round."
)
@click.option("--folder", type=click.Path(path_type=Path), help="Where rounds are played.")
@click.option(
    "--without", multiple=True, type=click.Choice(list(STRIKES)), help="Leave out such strikes."
)
@click.option(
    "--before",
    metavar="MODULE:FUNCTION",
    help="Called in every process first, to break something and see it found.",
)
@click.option("--no-mount", is_flag=True, help="Mount no disk; limit the size of files instead.")
@click.option("--keep", is_flag=True, help="Keep rounds in which nothing was broken too.")
@click.option(
    "--judge",
    "kept",
    type=click.Path(path_type=Path, exists=True),
    help="Judge a round that was kept, and play none.",
)
def main(
    minutes: float,
    seed: int | None,
    only: int | None,
    faults_s: float,
    folder: Path | None,
    without: tuple[str, ...],
    before: str | None,
    no_mount: bool,
    keep: bool,
    kept: Path | None,
) -> None:
    """Play rounds until the time is over, judge each, print the table."""
    console = Console(soft_wrap=True)
    began = time.monotonic()
    if kept is not None:
        tally = judged(kept)
        report(console, tally, (), time.monotonic() - began)
        sys.exit(EXIT[verdict_of(tally, ())])
    seed = int(time.time()) % 1_000_000 if seed is None else seed
    place = folder or Path(tempfile.mkdtemp(prefix="duly-chaos-"))
    profile = [kind for kind in FAULTS if kind not in without]
    console.print(f"seed {seed}, rounds in {place}", highlight=False)
    campaign = Campaign(console, place, seed, faults_s, without, before, not no_mount)
    whole = campaign.run(minutes * 60, only)
    report(console, whole, profile, time.monotonic() - began)
    if not whole.is_good:
        console.print(
            f"kept in {place}; again, though never quite the same: "
            f"python -m duly.testing.chaos --seed {seed} --minutes {minutes:g}",
            highlight=False,
        )
    elif not keep:
        shutil.rmtree(place, ignore_errors=True)
    sys.exit(EXIT[verdict_of(whole, profile)])


@dataclass(frozen=True, slots=True)
class Campaign:
    """Rounds, one after the other."""

    console: Console
    place: Path
    seed: int
    faults_s: float
    without: tuple[str, ...]
    before: str | None
    mount: bool

    def run(self, seconds: float, only: int | None) -> Tally:
        """Play rounds until the time is over, or only one."""
        whole, until = Tally(), time.monotonic() + seconds
        nursery = Nursery(PROGRAM)
        try:
            for number in itertools.count() if only is None else [only]:
                whole.add(self._play(nursery, number))
                if time.monotonic() >= until:
                    break
        finally:
            nursery.close()
        return whole

    def _play(self, nursery: Nursery, number: int) -> Tally:
        folder = self.place / f"round-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        round_ = Round(
            nursery,
            folder,
            self.seed * 1_000_003 + number,
            faults_s=self.faults_s,
            # In turn: what may be full, and what is synced.
            on_disk="real" if number % 2 else "small" if self.mount else "limited",
            without=self.without,
            before=self.before,
        )
        played = round_.play()
        tally = judged(folder)
        tally.struck.update(played.struck)
        tally.complaints += [f"round-{number}: {each}" for each in played.complaints]
        self.console.print(
            f"round {number}: {played.seconds:.1f} s, {sum(tally.starts.values()):,} handlers "
            f"started, {sum(tally.hits.values())} faults hit, {len(tally.anomalies)} anomalies",
            highlight=False,
        )
        if tally.is_good:
            shutil.rmtree(folder / "histories", ignore_errors=True)
        return tally


if __name__ == "__main__":
    main()

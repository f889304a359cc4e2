"""Sensors: a reading is handled once or not at all, and nobody waits for it.

Publishing puts a reading into a bounded buffer and returns; what finds no room is dropped and
counted. A reading is settled before its handler runs, so that a crash loses some and repeats
none. `duly contract ex02_sensors:app` says how many: `batch` of them for each process.

    duly run ex02_sensors:app
    python ex02_sensors.py
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass

import duly


@dataclass(frozen=True)
class Reading:
    """What one sensor has measured."""

    sensor: str
    number: int
    celsius: float


readings = duly.Topic("readings", Reading, guarantee="at-most-once")
app = duly.App("greenhouse", broker="sqlite:///greenhouse.db")


def history() -> Iterator[sqlite3.Connection]:
    """A database of its own, which no message depends on."""
    db = sqlite3.connect("history.db", isolation_level=None, check_same_thread=False)
    db.execute("pragma busy_timeout = 10000")
    db.execute("create table if not exists history (sensor, number, celsius)")
    yield db
    db.close()


@app.consumer(readings, name="history", guarantee="at-most-once", batch=20)
def keep(reading: Reading, *, db: sqlite3.Connection = duly.use(history, per="worker")) -> None:
    row = (reading.sensor, reading.number, reading.celsius)
    db.execute("insert into history values (?, ?, ?)", row)
    if reading.celsius > 35:
        print(f"{reading.sensor} is hot: {reading.celsius:.1f}", flush=True)


def main() -> None:
    dice = random.Random(1)
    with app:
        for number in range(2000):
            app.publish(readings, Reading(f"s-{number % 10}", number, dice.gauss(25, 4)))
    print(f"dropped: {app.drops.get('readings', 0)}")


if __name__ == "__main__":
    main()

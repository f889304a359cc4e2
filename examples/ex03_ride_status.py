"""Ride status: in order for each ride, side by side for different ones, nothing lost.

At-least-once: a status may be shown again after a crash, so the handler is idempotent. Order by
key keeps "arrived" behind "ordered", also where "ordered" has to be tried again.

    duly run ex03_ride_status:app --processes 2
    python ex03_ride_status.py
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass

import duly


@dataclass(frozen=True)
class Status:
    """Where a ride has got to."""

    ride: str
    step: int
    status: str


STEPS = ("ordered", "accepted", "driving", "arrived")

statuses = duly.Topic(
    "statuses", Status, guarantee="at-least-once", key=lambda status: status.ride, partitions=8
)
app = duly.App("rides", broker="sqlite:///rides.db")


def board() -> Iterator[sqlite3.Connection]:
    """What passengers see."""
    db = sqlite3.connect("board.db", isolation_level=None, check_same_thread=False)
    db.execute("pragma busy_timeout = 10000")
    db.execute("create table if not exists board (ride primary key, step, status, trail)")
    yield db
    db.close()


@app.consumer(
    statuses,
    name="board",
    guarantee="at-least-once",
    order_by_key=True,
    retry=duly.RetryPolicy(attempts=20, first_s=0.05),
)
def show(
    status: duly.Message[Status], *, db: sqlite3.Connection = duly.use(board, per="worker")
) -> None:
    now = status.payload
    # The same row again changes nothing: this is what makes a repeat harmless.
    db.execute(
        """
        insert into board values (:ride, :step, :status, :step)
        on conflict do update set step = :step, status = :status,
            trail = trail || case when board.step = :step then '' else ',' || :step end
        """,
        {"ride": now.ride, "step": now.step, "status": now.status},
    )


def main() -> None:
    with app:
        for step, status in enumerate(STEPS):
            app.publish_many(statuses, [Status(f"r-{n}", step, status) for n in range(200)])


if __name__ == "__main__":
    main()

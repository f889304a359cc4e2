"""Ad clicks: billed once each, though the publisher is interrupted and simply run again.

The handler adds to a sum, which is not idempotent at all; exactly-once makes that right. Clicks
come in batches of up to 500 and commit together. Every click has the name it got at its source,
so that publishing all of them again after an interruption bills nothing twice.

    duly run ex04_ad_clicks:app
    python ex04_ad_clicks.py       # interrupt it, and run it again
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from dataclasses import dataclass

import duly


@dataclass(frozen=True)
class Click:
    """Somebody followed an advertisement."""

    ad: str
    cents: int


clicks = duly.Topic("clicks", Click, guarantee="exactly-once")
app = duly.App("ads", broker="sqlite:///ads.db")


@app.batch_consumer(clicks, name="billing", guarantee="exactly-once", batch=500)
def bill(batch: list[Click], tx: duly.Transaction[sqlite3.Connection]) -> None:
    tx.connection.execute(
        "create table if not exists bills (ad primary key, clicks integer, cents integer)"
    )
    sums: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for click in batch:
        sums[click.ad] += click.cents
        count[click.ad] += 1
    tx.connection.executemany(
        """
        insert into bills values (?, ?, ?) on conflict do update
            set clicks = clicks + excluded.clicks, cents = cents + excluded.cents
        """,
        [(ad, count[ad], sums[ad]) for ad in sums],
    )


def main() -> None:
    repeats = 0
    with app:
        for hour in range(24):
            ids = [f"2026-01-01T{hour:02}/{n}" for n in range(500)]
            batch = [Click(f"ad-{n % 7}", 3 + n % 2) for n in range(500)]
            outcomes = app.publish_many(clicks, batch, ids=ids)
            repeats += sum(isinstance(outcome, duly.RepeatDropped) for outcome in outcomes)
            print(f"hour {hour} is published", flush=True)
    print(f"{repeats} repeats were dropped")


if __name__ == "__main__":
    main()

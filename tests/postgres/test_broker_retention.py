"""Retention beside those who bring back what it is about to delete."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from duly.brokers.postgres import PostgresBroker
from duly.brokers.postgres.lane import Lane
from duly.guarantees import Dead, Retry
from duly.inspection import Selection
from duly.message import now_ms
from duly.sql import log
from duly.sql.steps import Ask, Steps
from tests.postgres.brokers import claim, lane, opened, publish, take, topic
from tests.servers.postgres import Schema
from tests.waiting import eventually

T = topic()


def sweep_beside(broker: PostgresBroker, name: str, meanwhile: Callable[[], object]) -> int:
    """A sweep, with something happening after its statement ``name``."""

    def steps() -> Steps[int]:
        [(mine,)] = yield Ask("lock_retention")
        assert mine
        sweeping = log.sweep(log.Broom(), now_ms() + 1000)
        answer: Any = None
        try:
            while True:
                step = sweeping.send(answer)
                answer = yield step
                if isinstance(step, Ask) and step.name == name:
                    meanwhile()
        except StopIteration as stop:
            return int(stop.value)

    return broker.database.write(steps)


def no_sweep(sub: Lane) -> None:
    """Lanes leave sweeping to the test."""
    sub._shared.sweeper._next_s = float("inf")


def test_a_replay_waits_for_a_sweep_that_has_begun(pg_schema: Schema):
    """It would delete what the replay has found in the log."""
    with opened(pg_schema, T) as broker, pg_schema.connect() as looking:
        looking.autocommit = True
        sub = lane(broker, T)
        no_sweep(sub)
        publish(broker, T, "a")
        sub.settle([Dead(each.receipt, "no") for each in claim(sub)])
        letters = broker.select(Selection("sub"), 10)
        replaying = threading.Thread(target=lambda: broker.replay(letters))

        def waits() -> bool:
            [(count,)] = looking.execute(
                "select count(*) from pg_locks where locktype = 'advisory' and not granted "
                "and classid = %s::regclass::oid",
                (f"{pg_schema.duly}.messages",),
            ).fetchall()
            return bool(count) or not replaying.is_alive()

        def replay() -> None:
            replaying.start()
            eventually(waits, "the replay waits, or was too early")

        assert sweep_beside(broker, "any_parked", replay) == 1
        replaying.join(30)
        assert take(sub) == ["a"]


@pytest.mark.parametrize("beside", [(), ("b",)], ids=["alone", "beside another that is parked"])
@pytest.mark.parametrize("looked", ["low_water", "any_parked"])
def test_what_is_claimed_again_during_a_sweep_is_kept(
    pg_schema: Schema, looked: str, beside: tuple[str, ...]
):
    """It was parked when the sweep looked for claims, and claimed when it looked for the parked."""
    with opened(pg_schema, T) as broker:
        sub = lane(broker, T)
        no_sweep(sub)
        publish(broker, T, "a", *beside)
        sub.settle(
            [Retry(each.receipt, 0 if n == 0 else 60.0, "no") for n, each in enumerate(claim(sub))]
        )
        claimed: list[Any] = []
        sweep_beside(broker, looked, lambda: claimed.extend(claim(sub)))
        assert len(claimed) == 1
        assert sub.settle([Retry(each.receipt, 0, "no") for each in claimed]) == []
        assert take(sub) == ["a"]

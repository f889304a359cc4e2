"""What happens between two statements of another, and by whose clock: claims and ticks in turn."""

from __future__ import annotations

import threading
import time
from typing import Any

import psycopg
import pytest

from duly.brokers.postgres import listener
from duly.guarantees import Done
from duly.sql import ticks
from duly.sql.postgres import OwnLine
from duly.sql.steps import Steps
from tests.postgres.brokers import bodies, claim, drain, lane, opened, publish, topic
from tests.servers.postgres import Schema
from tests.waiting import eventually

T = topic()


def test_what_commits_between_the_statements_of_a_tick_is_found(pg_schema: Schema):
    """The snapshot that a tick leaves is the one it has looked by, or it would pass over these."""
    with opened(pg_schema, T) as broker, pg_schema.connect() as connection:
        sub = lane(broker, T)
        sent: list[str] = []

        def between(steps: Steps[int]) -> Steps[int]:
            try:
                step = next(steps)
                while True:
                    answer = yield step
                    sent.append(str(len(sent)))
                    publish(broker, T, sent[-1])
                    step = steps.send(answer)
            except StopIteration as stop:
                return int(stop.value)

        line = OwnLine(connection, pg_schema.duly)
        for _ in range(3):
            line.run(between(ticks.tick(broker.database.facts.system)))
            connection.commit()
        assert len(sent) >= 6
        assert sorted(drain(sub), key=int) == sent


def test_claims_of_a_subscription_are_made_in_turn(pg_schema: Schema):
    with opened(pg_schema, T) as broker, opened(pg_schema, T) as other:
        publish(broker, T, "a", "b")
        first, second = lane(broker, T), lane(other, T)
        second._shared.ticker.tick()
        claimed: list[str] = []
        with pg_schema.connect() as connection:
            line = OwnLine(connection, pg_schema.duly)
            assert line.run(first._claim_steps(1, 1 << 20)()).token
            waiting = threading.Thread(
                target=lambda: claimed.extend(bodies(claim(second, 1, wait_s=20)))
            )
            waiting.start()
            with pg_schema.connect(autocommit=True) as watching:
                eventually(lambda: _anybody_waits(watching) or claimed, "it waits for its turn")
            assert not claimed
            connection.commit()
            waiting.join(30)
        assert claimed == ["b"]


def _anybody_waits(connection: psycopg.Connection[Any]) -> bool:
    [(count,)] = connection.execute("select count(*) from pg_locks where not granted").fetchall()
    return bool(count)


@pytest.mark.parametrize("hour_s", [-3600, 3600])
def test_a_host_whose_clock_is_wrong_takes_nothing_from_others(
    pg_schema: Schema, monkeypatch: pytest.MonkeyPatch, hour_s: int
):
    with opened(pg_schema, T) as broker:
        publish(broker, T, "a")
        held = claim(lane(broker, T, lease_s=600))
        assert bodies(held) == ["a"]
        now_s, now_ns = time.time, time.time_ns
        monkeypatch.setattr(time, "time", lambda: now_s() + hour_s)
        monkeypatch.setattr(time, "time_ns", lambda: now_ns() + hour_s * 1_000_000_000)
        with opened(pg_schema, T) as wrong:
            sub = lane(wrong, T)
            assert list(claim(sub, wait_s=0.6)) == []


def test_a_session_that_comes_back_in_time_is_no_death(
    pg_schema: Schema, monkeypatch: pytest.MonkeyPatch
):
    """A worker whose link was cut, and who is still at work, keeps what it holds."""
    monkeypatch.setattr(listener, "GRACE_S", 60.0)
    with opened(pg_schema, T) as broker, opened(pg_schema, T) as other:
        publish(broker, T, "a")
        mine, theirs = lane(broker, T, lease_s=600), lane(other, T)
        [held] = claim(mine)
        back, found = threading.Event(), broker._started().listener
        open_ = found._open
        monkeypatch.setattr(found, "_open", lambda: back.wait(60) and open_())
        session = found._connection
        assert session is not None
        try:
            with pg_schema.connect(autocommit=True) as admin:
                admin.execute("select pg_terminate_backend(%s)", (session.info.backend_pid,))
            eventually(lambda: not other.holders()[0].alive, "its session is seen to be gone")
            assert list(claim(theirs, wait_s=1.0)) == []
        finally:
            back.set()
        eventually(lambda: other.holders()[0].alive, "it is back")
        assert list(mine.settle([Done(held.receipt)])) == []

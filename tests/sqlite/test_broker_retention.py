"""Retention: what everybody is done with goes, nothing else does, no position comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from duly.broker import Published, RepeatDropped
from duly.brokers.sqlite import SQLiteBroker
from duly.guarantees import Release, Retry
from duly.message import Topic
from duly.sql import retention
from duly.sql.sqlite.driver import named_statements
from tests.sqlite.brokers import (
    ONCE,
    PLAIN,
    Hands,
    bodies,
    claim,
    done,
    drain,
    execute,
    messages,
    opened,
    options,
    publish,
    receipts,
)

KEPT = Topic("kept", bytes, guarantee="at-least-once", retention_s=100)


def sweep(broker: SQLiteBroker, times: int = 5) -> None:
    for _ in range(times):
        broker._sweeper._sweep()


def stored(broker: SQLiteBroker) -> list[str]:
    rows = execute(broker, "select body from duly_messages order by position")
    return [body.decode() for (body,) in rows]


def test_what_everybody_has_settled_goes(db_path: Path):
    broker = opened(db_path, hands=Hands(wall=1 << 42))
    publish(broker, PLAIN, range(10))
    one, two = (broker.subscribe([PLAIN], name, options()) for name in ("one", "two"))
    assert len(drain(one)) == 10
    sweep(broker)
    assert len(stored(broker)) == 10
    two.settle(done(claim(two, 4)))
    sweep(broker)
    assert stored(broker) == [str(i) for i in range(4, 10)]
    assert len(drain(two)) == 6
    sweep(broker)
    assert stored(broker) == []


def test_without_a_subscription_all_is_kept(db_path: Path):
    broker = opened(db_path, hands=Hands(wall=1 << 42))
    publish(broker, PLAIN, range(3))
    sweep(broker)
    assert drain(broker.subscribe([PLAIN], "late", options())) == ["0", "1", "2"]


def test_claimed_and_waiting_messages_are_kept(db_path: Path):
    hands = Hands(wall=1 << 42)
    broker = opened(db_path, hands=hands)
    publish(broker, PLAIN, range(10))
    lane = broker.subscribe([PLAIN], "s", options())
    got = claim(lane)
    held, retried, released = got[5], got[2], got[7]
    lane.settle([Retry(retried.receipt, 60, "boo"), Release(released.receipt)])
    lane.settle(done([d for d in got if d not in (held, retried, released)]))
    sweep(broker)
    assert {"2", "5", "7"} <= set(stored(broker))
    lane.settle(done([held]))
    assert drain(lane) == ["7"]
    sweep(broker)
    # One that waits does not keep those around it.
    assert stored(broker) == ["2"]
    hands.advance(61)
    assert drain(lane) == ["2"]
    sweep(broker)
    assert stored(broker) == []


def test_a_retention_keeps_what_is_settled_that_long(db_path: Path):
    hands = Hands()
    broker = opened(db_path, KEPT, hands=hands)
    publish(broker, KEPT, ["old"], time_ms=hands.wall)
    drain(broker.subscribe([KEPT], "s", options()))
    hands.advance(99)
    sweep(broker)
    assert drain(broker.subscribe([KEPT], "late", options())) == ["old"]
    hands.advance(2)
    sweep(broker)
    assert drain(broker.subscribe([KEPT], "later", options())) == []


def test_positions_are_never_used_again(db_path: Path):
    broker = opened(db_path, hands=Hands(wall=1 << 42))
    used: list[Any] = []
    for round in range(3):
        lane = broker.subscribe([PLAIN], "s", options())
        publish(broker, PLAIN, [f"{round}-{i}" for i in range(3)])
        used += [p for (p,) in execute(broker, "select position from duly_messages")]
        assert drain(lane) == [f"{round}-{i}" for i in range(3)]
        sweep(broker)
        assert stored(broker) == []
        broker.close()
        broker = opened(db_path, hands=Hands(wall=1 << 42))
    assert used == sorted(set(used))


def test_a_subscription_that_starts_behind_a_swept_log_misses_nothing(db_path: Path):
    broker = opened(db_path, hands=Hands(wall=1 << 42))
    publish(broker, PLAIN, range(5))
    drain(broker.subscribe([PLAIN], "s", options()))
    sweep(broker)
    late = broker.subscribe([PLAIN], "late", options())
    publish(broker, PLAIN, ["new"])
    assert drain(late) == ["new"]


def test_identities_outlive_their_messages_up_to_their_retention(db_path: Path):
    short = Topic("short", bytes, guarantee="exactly-once", identity_retention_s=100)
    hands = Hands(wall=1 << 42)
    broker = opened(db_path, short, ONCE, hands=hands)
    sent = [*messages(short, ["s"], id="s"), *messages(ONCE, ["o"], id="o")]
    assert broker.publish(sent) == [Published("s"), Published("o")]
    drain(broker.subscribe([short, ONCE], "s", options()))
    hands.advance(99)
    sweep(broker)
    assert stored(broker) == []
    assert broker.publish(sent) == [RepeatDropped("s"), RepeatDropped("o")]
    hands.advance(61)  # identities are gone through once a minute
    sweep(broker)
    assert broker.publish(sent) == [Published("s"), RepeatDropped("o")]


def test_each_step_is_bounded_and_many_finish(db_path: Path, monkeypatch: Any):
    monkeypatch.setattr(retention, "_IDENTITIES", 25)
    monkeypatch.setattr(retention, "_FIRST_ROUND_MS", 0)
    hands = Hands(wall=1 << 42)
    topic = Topic("t", bytes, guarantee="exactly-once", identity_retention_s=1)
    broker = opened(db_path, topic, hands=hands)
    publish(broker, topic, range(100))
    drain(broker.subscribe([topic], "s", options()))
    hands.advance(2)
    broker._sweeper._broom.most = 30
    broker._sweeper._broom.reached.clear()
    left = []
    for _ in range(6):
        sweep(broker, 1)
        left.append(len(stored(broker)))
    assert left[:4] == [70, 40, 10, 0]
    assert execute(broker, "select count(*) from duly_identities") == [(0,)]


def test_a_working_lane_sweeps_by_itself(db_path: Path):
    broker = opened(db_path)
    lane = broker.subscribe([PLAIN], "s", options())
    for _ in range(10):
        publish(broker, PLAIN, range(1000))
        drain(lane)
    assert len(stored(broker)) < 6000


def test_incidents_are_bounded(db_path: Path, monkeypatch: Any):
    monkeypatch.setattr(retention, "INCIDENTS_KEPT", 10)
    hands = Hands(wall=1 << 42)
    broker = opened(db_path, hands=hands)
    publish(broker, PLAIN, range(30))
    lane = broker.subscribe([PLAIN], "s", options())
    lane.settle([Retry(r, 0, "boo") for r in receipts(claim(lane))])
    sweep(broker)
    assert len(broker.incidents()) == 10
    hands.advance(31 * 86_400)
    sweep(broker)
    assert broker.incidents() == []
    assert len(bodies(claim(lane))) == 30


def test_trimming_looks_messages_up_among_the_parked_and_never_through_them(db_path: Path):
    """Else a hundred thousand retries that wait make every sweep take minutes."""
    broker = opened(db_path)
    broker.subscribe([PLAIN], "s", options())
    trim = named_statements("")["trim"]
    plan = [row[3] for row in execute(broker, f"explain query plan {trim}", 0, 1, 1, 1)]
    assert any("SEARCH p USING PRIMARY KEY" in step for step in plan)
    assert not any(step.startswith("SCAN p") for step in plan)

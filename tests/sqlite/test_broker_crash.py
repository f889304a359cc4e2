"""Real processes on one file: killed while they hold claims, competing, stopped and resumed."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path
from typing import Any

from duly.broker import Delivery
from duly.guarantees import Dead
from tests.sqlite.brokers import (
    ONCE,
    PLAIN,
    bodies,
    claim,
    done,
    drain,
    leftovers,
    opened,
    options,
    publish,
    receipts,
)
from tests.sqlite.programs import run, running

HOLDER = """
import sys
from tests.sqlite.brokers import *
broker = opened(sys.argv[1])
lane = broker.subscribe([PLAIN], "s", options(lease_s=float(sys.argv[3])))
got = lane.claim(int(sys.argv[2]), 1 << 30, 20)
print(",".join(bodies(got)), got[0].attempt, got[0].alone)
input()
print(len(lane.settle(done(got))), "refused")
"""


def die_holding(path: Path, limit: int) -> str:
    """Start a process, let it claim, kill it; what it had claimed."""
    with running(HOLDER, path, limit, 3600) as holder:
        said = holder.line()
        holder.kill()
    return said


def claim_soon(lane: Any, limit: int = 100) -> list[Delivery]:
    """Claim, waiting far less than the lease of whoever died."""
    return list(lane.claim(limit, 1 << 30, 20.0))


def test_the_messages_of_a_killed_process_come_at_once_one_by_one(db_path: Path):
    broker = opened(db_path)
    publish(broker, PLAIN, range(3))
    lane = broker.subscribe([PLAIN], "s", options())
    assert die_holding(db_path, 10) == "0,1,2 1 False"
    got = [claim_soon(lane) for _ in range(3)]
    assert [bodies(some) for some in got] == [["0"], ["1"], ["2"]]
    assert {(d.attempt, d.alone, d.repeated) for [d] in got} == {(1, True, True)}
    assert lane.settle(done([d for [d] in got])) == []
    assert broker.incident_counts() == {("s", "redelivery"): 3}


def test_a_waiting_lane_notices_that_another_process_died(db_path: Path):
    broker = opened(db_path)
    publish(broker, PLAIN, ["x"])
    lane = broker.subscribe([PLAIN], "s", options())
    with running(HOLDER, db_path, 1, 3600) as holder:
        holder.line()
        holder.signal(signal.SIGKILL)  # and nobody writes to the file any more
        assert bodies(claim_soon(lane)) == ["x"]


def test_only_who_was_alone_is_charged(db_path: Path):
    broker = opened(db_path)
    publish(broker, PLAIN, ["poison", "mate"])
    assert die_holding(db_path, 10) == "poison,mate 1 False"
    # From here on it is alone each time, and each death counts.
    assert [die_holding(db_path, 10) for _ in range(3)] == [
        "poison 1 True",
        "poison 2 True",
        "poison 3 True",
    ]
    lane = broker.subscribe([PLAIN], "s", options())
    [poison] = claim_soon(lane)
    assert (poison.message.body, poison.attempt) == (b"poison", 4)
    lane.settle([Dead(poison.receipt, "kills its worker")])
    [mate] = claim_soon(lane)
    assert (mate.message.body, mate.attempt, mate.alone) == (b"mate", 1, True)
    lane.settle(done([mate]))
    assert leftovers(broker) == {"duly_claims": 0, "duly_parked": 0}


def test_a_process_stopped_past_its_lease_is_refused_when_it_goes_on(db_path: Path):
    broker = opened(db_path)
    publish(broker, PLAIN, range(2))
    with running(HOLDER, db_path, 10, 0.3) as holder:
        assert holder.line() == "0,1 1 False"
        holder.signal(signal.SIGSTOP)
        lane = broker.subscribe([PLAIN], "s", options())
        first, second = claim_soon(lane), claim_soon(lane)
        holder.signal(signal.SIGCONT)
        holder.tell("")
        holder.expect("2 refused")
    assert [bodies(first), bodies(second)] == [["0"], ["1"]]
    assert lane.settle(done([*first, *second])) == []
    counts = broker.incident_counts()
    assert (counts["s", "redelivery"], counts["s", "stale-settle"]) == (2, 2)


WORKER = """
import sys
from tests.sqlite.brokers import *
broker = opened(sys.argv[1])
lane = broker.subscribe([PLAIN], "s", options())
print("ready")
input()
while got := lane.claim(7, 1 << 30, 0.0):
    assert lane.settle(done(got[::2])) == []
    assert lane.settle(done(got[1::2])) == []
    print(*bodies(got))
"""


def test_competing_processes_share_without_overlap(db_path: Path):
    broker = opened(db_path)
    publish(broker, PLAIN, range(700))
    with running(WORKER, db_path) as one, running(WORKER, db_path) as two:
        for worker in (one, two):
            worker.expect("ready")
        for worker in (one, two):
            worker.tell("")
        shares = [" ".join(worker.rest()).split() for worker in (one, two)]
    assert Counter(map(int, shares[0] + shares[1])) == Counter(range(700))
    assert leftovers(broker) == {"duly_claims": 0, "duly_parked": 0}
    assert broker.incident_counts() == {}


PUBLISHER = """
import sys
from tests.sqlite.brokers import *
broker = opened(sys.argv[1])
for i in range(100):
    publish(broker, PLAIN, [f"{sys.argv[2]}-{i}-{j}" for j in range(3)])
print("done")
"""


def test_publishing_and_consuming_processes_at_once(db_path: Path):
    broker = opened(db_path)
    lane = broker.subscribe([PLAIN], "s", options())
    seen: list[str] = []
    with running(PUBLISHER, db_path, "a") as a, running(PUBLISHER, db_path, "b") as b:
        while len(seen) < 600:
            got = claim_soon(lane, 50)
            assert got, f"{len(seen)} of 600 came"
            lane.settle(done(got))
            seen += bodies(got)
        for publisher in (a, b):
            publisher.expect("done")
    for name in "ab":
        mine = [body for body in seen if body.startswith(name)]
        assert mine == [f"{name}-{i}-{j}" for i in range(100) for j in range(3)]


KILLED_PUBLISHER = """
import sys
from tests.sqlite.brokers import *
broker = opened(sys.argv[1])
for i in range(10 ** 6):
    publish(broker, ONCE, [f"{i}-{j}" for j in range(5)])
    print(i)
"""


def test_what_a_killed_publisher_was_told_is_there_and_batches_are_whole(db_path: Path):
    broker = opened(db_path)
    for _ in range(5):
        with running(KILLED_PUBLISHER, db_path) as publisher:
            told = [publisher.line() for _ in range(20)]
            publisher.kill()
            told += publisher.rest()
        lane = broker.subscribe([ONCE], "s", options())
        seen = drain(lane)
        whole = [f"{i}-{j}" for i in range(len(seen) // 5) for j in range(5)]
        assert seen == whole
        assert len(told) <= len(seen) // 5 <= len(told) + 1


def test_a_process_that_ends_well_gives_back_uncharged(db_path: Path):
    publish(opened(db_path), PLAIN, range(3))
    run(
        """
        import sys
        from tests.sqlite.brokers import *
        broker = opened(sys.argv[1])
        claim(broker.subscribe([PLAIN], "s", options()), 1)
        broker.close()
        """,
        db_path,
    )
    got = claim(opened(db_path).subscribe([PLAIN], "s", options()))
    got = [*got, *claim(opened(db_path).subscribe([PLAIN], "s", options()))]
    assert sorted(bodies(got)) == ["0", "1", "2"]
    assert {d.attempt for d in got} == {1}
    assert len(set(receipts(got))) == 3

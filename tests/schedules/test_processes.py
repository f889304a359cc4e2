"""Several real processes, killed at any moment: each tick is there once."""

from __future__ import annotations

import random
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

from tests.schema.versions import rows
from tests.sqlite.programs import Program, running
from tests.waiting import eventually

# Its clock runs a thousand times as fast, from the same start in every process.
PROGRAM = """
import sys, time, threading
import duly
from duly.schedules import Scheduler, ticking

began = float(sys.argv[2])
def wall_ms():
    return 1_800_000_000_000 + int((time.time() - began) * 1_000_000)

polls = duly.Topic("polls", str, guarantee="at-least-once")
app = duly.App("city", broker="sqlite:///" + sys.argv[1])
app.every("1m", polls, lambda tick: str(tick), name="poll", misfire=1000)
broker, _ = app.backends()
machine = Scheduler(app.schedules, ticking(broker, app.schedules), "city", wall_ms=wall_ms)
machine.step()
print("ticking", flush=True)
while True:
    machine.step()
"""


def ids(path: Path) -> list[str]:
    return [id for (id,) in rows(path, "select id from duly_messages order by position")]


def test_each_tick_once_while_processes_are_killed(db_path: Path):
    import time

    roll, began = random.Random(4), time.time()
    with ExitStack() as stack:
        crowd: list[Program] = []

        def start() -> None:
            program = stack.enter_context(running(PROGRAM, db_path, began))
            program.expect("ticking")
            crowd.append(program)

        for _ in range(2):
            start()
        for _ in range(8):
            seen = len(ids(db_path))
            eventually(lambda seen=seen: len(ids(db_path)) > seen + 5, "it ticks")  # type: ignore[misc]
            crowd.pop(roll.randrange(len(crowd))).kill()
            start()
        for program in crowd:
            program.kill()
    found = ids(db_path)
    assert len(found) > 40
    assert len(found) == len(set(found)), "a tick twice"
    times = [datetime.fromisoformat(id.removeprefix("poll/")).timestamp() for id in found]
    assert times == [times[0] + 60 * n for n in range(len(times))], "a tick left out"
    [(reached,)] = rows(db_path, "select tick_ms from duly_schedules")
    assert reached == times[-1] * 1000

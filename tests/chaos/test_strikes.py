"""What is to befall a crowd befalls it, also where it could not when its turn was."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, cast

import psycopg

from duly.testing.chaos.crowd import Crowd
from duly.testing.chaos.processes import Nursery
from duly.testing.chaos.round import Round
from duly.testing.chaos.schema import is_amidst, url_of
from duly.testing.chaos.setup import Setup
from tests.servers.postgres import Schema


class Busy:
    """A server that is on its way up for a while."""

    is_private = True

    def __init__(self, refuses: int) -> None:
        self.refuses = refuses
        self.taken_down: list[str] = []

    def take_down(self, kind: str, pause_s: float) -> bool:
        self.refuses -= 1
        if self.refuses >= 0:
            return False
        self.taken_down.append(kind)
        return True


class Nobody:
    """A crowd in which nobody runs."""

    counts: Counter[str]

    def __init__(self) -> None:
        self.counts = Counter()

    def any_running(self, random: Any, role: str) -> None:
        return None


def test_what_could_not_be_done_is_owed_until_it_is(tmp_path: Path) -> None:
    server = Busy(refuses=3)
    round_ = Round(
        cast(Nursery, None),
        tmp_path,
        1,
        setup=Setup("postgres", "postgres", cast(Any, server)),
        name="chaos",
        faults_s=1.0,
        on_disk="real",
    )
    crowd = cast(Crowd, Nobody())
    round_.strike_in_turn(crowd, iter(["kill server"]))
    assert server.taken_down == []
    for _ in range(3):
        round_.strike_in_turn(crowd, itertools.repeat("drain", 0))
    assert server.taken_down == ["kill server"], "once, when it was possible"
    assert crowd.counts["kill server"] == 1


def test_a_process_in_the_middle_of_a_transaction_is_known(pg_schema: Schema) -> None:
    server = pg_schema.database
    # Sessions are named by the process; which schema is duly's, the driver does not know.
    named = url_of(server, "chaos", 7).replace("schema=chaos&", "")
    with psycopg.connect(named) as connection:
        assert not is_amidst(server, 7)
        connection.execute("select 1")
        assert is_amidst(server, 7)
        assert not is_amidst(server, 8)
        connection.rollback()
        assert not is_amidst(server, 7)


TOLD_ALL_THE_TIME = """
import signal, sys
from duly.testing.chaos.processes import Told

told = Told()
signal.signal(signal.SIGALRM, lambda *_: told.set())
signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
for _ in range(30_000):
    told.wait(0.00001)
signal.setitimer(signal.ITIMER_REAL, 0)
print(told.is_set())
"""


def test_a_signal_tells_the_thread_that_it_interrupts_wherever_that_is() -> None:
    """With a `threading.Event` in its place this process waits for itself within a second."""
    ended = subprocess.run(
        [sys.executable, "-c", TOLD_ALL_THE_TIME],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (ended.returncode, ended.stdout) == (0, "True\n"), ended.stderr

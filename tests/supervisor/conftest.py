"""A supervisor in a process of its own, and what its workers wrote down."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from duly.supervisor.supervisor import SAME_SIGNAL_S
from tests.waiting import alive, eventually

PARENT = Path(__file__).with_name("parent.py")


@dataclass
class Supervised:
    """A running supervisor."""

    process: subprocess.Popen[str]
    journal: Path

    def pids(self, what: str) -> list[int]:
        """The processes that wrote this down, in order."""
        lines = self.journal.read_text().split("\n") if self.journal.exists() else []
        return [int(line.split()[1]) for line in lines if line.startswith(f"{what} ")]

    def await_pids(self, what: str, count: int) -> list[int]:
        """Wait until so many wrote this down."""
        eventually(lambda: len(self.pids(what)) >= count, f"{count} x {what}", self.describe)
        return self.pids(what)

    def describe(self) -> str:
        return self.journal.read_text() if self.journal.exists() else "nothing in the journal"

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def send_again(self, number: int) -> None:
        """Send a second signal, late enough not to count as the first."""
        at = time.monotonic() + SAME_SIGNAL_S + 0.1
        eventually(lambda: time.monotonic() > at, "the first signal is long ago")
        self.send(number)

    def ended(self, timeout_s: float = 30) -> tuple[int, str, str]:
        """Exit status, standard output and error, once it has ended."""
        out, err = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, out, err

    def everybody(self) -> set[int]:
        """Every process that was ever there."""
        return {*self.pids("started"), *self.pids("child")}


Start = Callable[..., Supervised]


@pytest.fixture
def supervise(tmp_path: Path) -> Iterator[Start]:
    """Start a supervisor; at the end it is gone, and nothing it started is left."""
    started: list[Supervised] = []

    def start(
        *behaviour: str,
        processes: int = 1,
        show: bool = False,
        run_by: Sequence[str] = (),
        **patience: float,
    ):
        journal = tmp_path / "journal"
        told = {
            "journal": str(journal),
            "behaviour": behaviour,
            "processes": processes,
            "show": show,
            "run_by": run_by,
            "patience": {"first_backoff_s": 0.01, **patience},
        }
        process = subprocess.Popen(
            [sys.executable, str(PARENT), json.dumps(told)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(Supervised(process, journal))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.process.kill()
        eventually(partial(_is_over, each), "nothing is left", each.describe)


def _is_over(supervised: Supervised) -> bool:
    """Kill what is left, until nobody holds the pipes: a worker that was just being started
    writes itself, and then its child, down only now.
    """
    for pid in filter(alive, supervised.everybody()):
        os.kill(pid, signal.SIGKILL)
    try:
        supervised.process.communicate(timeout=0.2)
    except subprocess.TimeoutExpired:
        return False
    return True

"""Processes that are started through a zygote, signalled, and waited for."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

DEADLINE_S = 30.0
KILLED = -signal.SIGKILL

_never = threading.Event()


def eventually(
    condition: Callable[[], object],
    what: str,
    describe: Callable[[], str] = lambda: "",
    timeout_s: float = DEADLINE_S,
) -> None:
    """Wait until ``condition`` holds; fails with what was awaited and how things are."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() >= deadline:
            raise AssertionError(f"after {timeout_s} s still not: {what}\n{describe()}")
        _never.wait(0.01)


class Told:
    """What the handler of a signal tells the thread that it interrupts.

    No `threading.Event`: that thread may just be holding the lock which setting one takes, and
    would then wait for itself, for ever.
    """

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._poll = select.poll()
        self._poll.register(self._read, select.POLLIN)

    def set(self) -> None:
        """Tell it."""
        with contextlib.suppress(BlockingIOError):  # so often told that nothing more fits
            os.write(self._write, b"\0")

    def is_set(self) -> bool:
        """Whether it was told."""
        return self.wait(0)

    def wait(self, timeout_s: float) -> bool:
        """Wait for it; whether it was told."""
        return bool(self._poll.poll(timeout_s * 1000))


def alive(pid: int) -> bool:
    """Whether the process runs; one that is dead and not reaped yet does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def free_port() -> int:
    """A port of the loopback interface that nobody listens on just now."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


class Child:
    """A process that a nursery started."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.pid = 0
        self.status: int | None = None
        self.started = threading.Event()
        self.ended = threading.Event()

    def wait(self, timeout_s: float = DEADLINE_S) -> int:
        """Its exit status; negative: the signal that ended it."""
        if not self.ended.wait(timeout_s):
            self.signal(signal.SIGKILL)
            raise AssertionError(f"process {self.pid} did not end:\n{self.said()}")
        assert self.status is not None, "who has ended has a status"
        return self.status

    def signal(self, number: int) -> None:
        """Send it a signal, if it is still there."""
        if not self.ended.is_set():
            with contextlib.suppress(ProcessLookupError):  # it has ended, and we are not told yet
                os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.signal(signal.SIGKILL)
        self.ended.wait(DEADLINE_S)

    def is_stopped(self) -> bool:
        """Whether SIGSTOP has taken effect on every thread."""
        tasks = Path(f"/proc/{self.pid}/task")
        return all(
            (task / "stat").read_text().rpartition(")")[2].split()[0] in "Tt"
            for task in tasks.iterdir()
        )

    def is_stopping(self) -> bool:
        """Whether a SIGSTOP has reached it, from wherever."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return False
        return stat.rpartition(")")[2].split()[0] in "Tt"

    def stop(self) -> None:
        """SIGSTOP, and wait until it stands still."""
        self.signal(signal.SIGSTOP)
        eventually(self.is_stopped, f"process {self.pid} stands still")

    def said(self) -> str:
        """What it wrote to its standard output and error."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class Nursery:
    """Starts children through a zygote, and hears how they end.

    ``program`` is what each of them runs, ``package.module:function``; ``modules`` are imported
    once for all of them.
    """

    def __init__(
        self, program: str, folder: Path | None = None, modules: Sequence[str] = ()
    ) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "duly.testing.chaos.zygote", program, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=folder,
        )
        self._numbers = itertools.count()
        self._mutex = threading.Lock()
        self._starting: dict[int, Child] = {}
        self._running: dict[int, Child] = {}
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def start(self, orders: dict[str, Any]) -> Child:
        """Start a child with these orders; its ``log`` says where its output goes."""
        child = Child(Path(orders["log"]))
        with self._mutex:
            number = next(self._numbers)
            self._starting[number] = child
            assert self._process.stdin is not None, "it was asked for"
            self._process.stdin.write(
                json.dumps({"number": number, "orders": orders}).encode() + b"\n"
            )
            self._process.stdin.flush()
        if not child.started.wait(DEADLINE_S):
            raise AssertionError("the zygote does not answer")
        return child

    def _read(self) -> None:
        assert self._process.stdout is not None, "it was asked for"
        for line in self._process.stdout:
            told = json.loads(line)
            if "started" in told:
                child = self._starting.pop(told["number"])
                child.pid = told["started"]
                self._running[child.pid] = child
                child.started.set()
            else:
                child = self._running.pop(told["ended"])
                child.status = told["status"]
                child.ended.set()

    def close(self) -> None:
        """End the zygote, and with it whoever is left."""
        assert self._process.stdin is not None, "it was asked for"
        assert self._process.stdout is not None, "it was asked for"
        self._process.stdin.close()
        self._process.wait(DEADLINE_S)
        self._reader.join(DEADLINE_S)
        self._process.stdout.close()

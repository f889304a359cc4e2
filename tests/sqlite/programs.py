"""Programs run as processes of their own, which tests talk to, stop and kill."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, Queue

# Longer than a worker drains: what keeps one from that shows as its own answer.
DEADLINE_S = 60.0


# Each line is one write: those of two processes do not mix, as unbuffered ones do, where the text
# and its end are two.
BY_LINES = "import sys; sys.stdout.reconfigure(line_buffering=True)\n"


class Program:
    """A running Python program; its lines of output arrive one by one."""

    def __init__(self, source: str, *args: object) -> None:
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-X", "faulthandler"),
                *("-c", BY_LINES + textwrap.dedent(source), *map(str, args)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.pid = self.process.pid
        self._lines: Queue[str] = Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.rstrip("\n"))

    def line(self) -> str:
        """Its next line of output."""
        try:
            return self._lines.get(timeout=DEADLINE_S)
        except Empty:
            raise AssertionError("the program said nothing") from None

    def expect(self, line: str) -> None:
        """Its next line must be this one."""
        found = self.line()
        if found != line:
            raise AssertionError("\n".join([f"expected {line!r}:", found, *self.rest()]))

    def rest(self) -> list[str]:
        """What it says until it ends."""
        try:
            self.process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGABRT)  # it says where each of its threads is
            self.process.wait(DEADLINE_S)
            self._reader.join(DEADLINE_S)
            said = "\n".join(list(self._lines.queue)[-100:])
            raise AssertionError(f"after {DEADLINE_S} s still running:\n{said}") from None
        self._reader.join(DEADLINE_S)
        return list(self._lines.queue)

    def tell(self, line: str) -> None:
        """Write a line to its standard input."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.wait(DEADLINE_S)


@contextmanager
def running(source: str, *args: object) -> Iterator[Program]:
    """A program that is killed at the end, if it still runs."""
    program = Program(source, *args)
    try:
        yield program
    finally:
        program.kill()
        assert program.process.stdin is not None
        assert program.process.stdout is not None
        program.process.stdin.close()  # ends its children too, which wait for a line
        program._reader.join(DEADLINE_S)
        program.process.stdout.close()


def run(source: str, *args: object) -> list[str]:
    """Run a program to its end; it must end well. Returns its output."""
    with running(source, *args) as program:
        lines = program.rest()
        assert program.process.returncode == 0, "\n".join(lines)
        return lines


def count(path: Path) -> int:
    """How long a file is; programs append to one to count what they did."""
    return path.stat().st_size if path.exists() else 0

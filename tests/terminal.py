"""A page, done as a newcomer would: its files written, its commands given, what they print.

A Python block is a file, named in its first line; one without a name continues the file before.
A console block is what happens on a terminal: ``$`` before a command, below it what it prints,
``...`` for anything. ``duly run`` stays running beside what follows, and has to drain at the end.
A look is repeated until it shows what it should: work takes its time.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.waiting import eventually


@dataclass
class Terminal:
    """A folder and the commands given in it."""

    folder: Path
    running: list[tuple[str, subprocess.Popen[bytes]]] = field(default_factory=list)

    def start(self, command: str) -> subprocess.Popen[bytes]:
        # The interpreter that runs this test, and the duly installed beside it.
        words = shlex.split(command)
        ours = Path(sys.executable).with_name(words[0])
        words[0] = str(ours) if ours.exists() else words[0]
        log = self.folder / f"{len(self.running)}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                words, cwd=self.folder, stdout=out, stderr=subprocess.STDOUT, env=environment()
            )
        self.running.append((log.name, process))
        return process

    def output(self, command: str) -> str:
        """What a command prints, which has to succeed."""
        process = self.start(command)
        log, _ = self.running.pop()
        status = process.wait(60)
        text = (self.folder / log).read_text()
        assert status == 0, f"$ {command}\n{text}"
        return text

    def look(self, command: str) -> str:
        """What a command prints that may come too early, and fail."""
        process = self.start(command)
        log, _ = self.running.pop()
        process.wait(60)
        return (self.folder / log).read_text()

    def drain(self) -> None:
        """Ask what still runs to end, and see that it does."""
        for _, process in self.running:
            process.send_signal(signal.SIGTERM)
        for log, process in self.running:
            assert process.wait(60) == 0, (self.folder / log).read_text()
        self.running.clear()

    def kill(self) -> None:
        for _, process in self.running:
            process.kill()
            process.wait()


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**kept, "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "100"}


def sessions(block: str) -> Iterator[tuple[str, str]]:
    """The commands of a console block, in order, with what they print."""
    _, *found = re.split(r"^\$ ", block, flags=re.MULTILINE)
    for session in found:
        command, _, printed = session.partition("\n")
        yield command, printed


def matches(printed: str, expected: str) -> bool:
    parts = [re.escape(part) for part in expected.split("...")]
    return re.fullmatch(".*".join(parts), printed, re.DOTALL) is not None


def wait_until_shown(terminal: Terminal, command: str, expected: str) -> None:
    eventually(
        lambda: matches(terminal.look(command), expected),
        f"$ {command}\n{expected}",
        lambda: terminal.look(command),
    )

"""The README, run as a newcomer would: its files written, its commands given, what they print.

A Python block is a file, named in its first line; one without a name continues the file before.
A console block is what happens on a terminal: ``$`` before a command, below it what it prints,
``...`` for anything. ``duly run`` stays running beside what follows, and has to drain at the end.
A look (``python -c``, ``look.py``) is repeated until it shows what it should: work takes its time.
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

import pytest

from duly.guarantees import PROMISES
from tests.waiting import eventually

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


@dataclass
class Terminal:
    """A folder and the commands given in it."""

    folder: Path
    running: list[tuple[str, subprocess.Popen[bytes]]] = field(default_factory=list)

    def start(self, command: str) -> subprocess.Popen[bytes]:
        # The interpreter that runs this test, and the duly installed beside it.
        words = shlex.split(command)
        words[0] = str(Path(sys.executable).with_name(words[0]))
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


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    made = Terminal(tmp_path)
    try:
        yield made
    finally:
        made.kill()


def blocks(language: str) -> Iterator[str]:
    for found in re.finditer(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL):
        yield found.group(1)


def files() -> dict[str, str]:
    """The README's Python files by name."""
    found: dict[str, str] = {}
    name = ""
    for block in blocks("python"):
        named = re.match(r"# (\w+\.py)\n", block)
        if named:
            name = named.group(1)
            assert name not in found, f"{name} is there twice"
        assert name, f"this block belongs to no file:\n{block}"
        found[name] = found.get(name, "") + block
    return found


def commands() -> Iterator[tuple[str, str]]:
    """The README's commands, in order, with what they print."""
    for block in blocks("console"):
        _, *sessions = re.split(r"^\$ ", block, flags=re.MULTILINE)
        for session in sessions:
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


def test_what_the_readme_shows_is_what_happens(terminal: Terminal):
    for name, text in files().items():
        (terminal.folder / name).write_text(text)
    for command, expected in commands():
        if command.startswith("duly run"):
            terminal.start(command)
        elif command.startswith(("python -c", "python look.py")):
            wait_until_shown(terminal, command, expected)
        else:
            printed = terminal.output(command)
            assert matches(printed, expected), f"$ {command}\n{printed}"
    terminal.drain()


def test_the_table_is_the_promise():
    """A row of the README for each field of `Promise`, in the order of `PROMISES`."""
    rows = {
        cells[0]: cells[1:]
        for line in README.splitlines()
        if line.startswith("| ")
        for cells in [[cell.strip() for cell in line.strip("|").split("|")]]
    }
    assert rows[""] == [guarantee.value for guarantee in PROMISES]
    for field_name in ("promise", "a_crash_costs", "publish", "consume", "fits"):
        said = rows[field_name.replace("_", " ")]
        assert said == [getattr(promise, field_name) for promise in PROMISES.values()]


def test_a_first_application_has_twenty_lines():
    lines = [line for line in files()["shop.py"].splitlines() if line and line[0] != "#"]
    assert len(lines) <= 20, len(lines)


@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [
        ("a\n", "a\n", True),
        ("a\nb\nc\n", "a\n...\nc\n", True),
        ("a\nb\n", "a\n", False),
        ("", "a\n", False),
    ],
)
def test_what_matches(printed: str, expected: str, same: bool):
    assert matches(printed, expected) is same

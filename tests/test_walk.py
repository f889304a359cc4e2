"""The walk: whoever has the quickstart page and nothing else gets from nothing to an application
that runs, was killed, looked into and mended. The page itself is what is run, in its order.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.terminal import Terminal, matches, sessions, wait_until_shown
from tests.waiting import alive, eventually

PAGE = (Path(__file__).parent.parent / "docs/quickstart.md").read_text(encoding="utf-8")
LOOKS = ("duly status", "duly dead list", "python -c")


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    made = Terminal(tmp_path)
    try:
        yield made
    finally:
        made.kill()


def blocks() -> Iterator[tuple[str, str]]:
    """The page's blocks in order, with their languages."""
    for found in re.finditer(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        yield found[1], found[2]


def started_workers(terminal: Terminal) -> list[int]:
    """The processes that ``duly run`` said it has started, in its terminal."""
    [(log, _)] = terminal.running
    said = (terminal.folder / log).read_text()
    return [int(pid) for pid in re.findall(r"worker \d+ started \(pid (\d+)\)", said)]


def give(terminal: Terminal, command: str, expected: str) -> None:
    if command.startswith("duly run"):
        terminal.start(command)
    elif command.startswith("kill -9"):
        kill_one(terminal, command)
    elif command.startswith(LOOKS):
        wait_until_shown(terminal, command, expected)
    else:
        printed = terminal.output(command)
        assert matches(printed, expected), f"$ {command}\n{printed}"


def kill_one(terminal: Terminal, command: str) -> None:
    """The page's process id stands for one that the terminal shows."""
    eventually(lambda: len(started_workers(terminal)) == 2, "two workers have started")
    victim = started_workers(terminal)[0]
    terminal.output(re.sub(r"\d+$", str(victim), command))
    eventually(lambda: not alive(victim), "it is dead")
    eventually(lambda: len(started_workers(terminal)) == 3, "another has been started")


def test_the_page_works_as_it_stands(terminal: Terminal):
    began = time.monotonic()
    given: list[str] = []
    for language, block in blocks():
        if language == "python":
            name = re.match(r"# (\w+\.py)\n", block)
            assert name, block
            (terminal.folder / name[1]).write_text(block)
        elif language == "console":
            for command, expected in sessions(block):
                give(terminal, command, expected)
                given.append(command)
    terminal.drain()
    assert time.monotonic() - began < 15 * 60
    # The walk is whole: run, killed, looked into, mended.
    steps = ("duly contract", "duly run", "kill -9", "duly status", "duly dead list", "duly dead r")
    at = [next(n for n, c in enumerate(given) if c.startswith(step)) for step in steps]
    assert at == sorted(at), given


def test_what_is_installed_is_what_the_page_says():
    assert [block for language, block in blocks() if language == "sh"] == ["pip install duly\n"]

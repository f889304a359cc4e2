"""The README, run as a newcomer would; a look is ``python -c`` or ``look.py``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from duly.guarantees import PROMISES
from tests.terminal import Terminal, matches, sessions, wait_until_shown

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


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
        yield from sessions(block)


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

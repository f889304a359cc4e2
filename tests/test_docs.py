"""What the documents name is there: files, tests, rooms, tables."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from duly.sql.steps import statements

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
    if path.is_file()
)
ARCHITECTURE = (ROOT / "docs/internals/architecture.md").read_text(encoding="utf-8")


def text_of(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(
        r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )


def rows_of(page: str, heading: str) -> Iterator[list[str]]:
    """The cells of the first table below a heading, without its head."""
    below = page.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    table = [line for line in below.splitlines() if line.startswith("|")]
    for line in table[2:]:
        yield [cell.strip() for cell in line.strip("|").split("|")]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if not re.match(r"https?://|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tests_that_are_named_exist(page: Path):
    for file, name in re.findall(r"`(tests/[\w/.]+\.py)::(\w+)`", text_of(page)):
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert name in names, f"{file} has no {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page: Path):
    """By their path, as they are imported, or from `src/duly` on."""
    for name in re.findall(r"`((?:\w+/)+(?:\w+\.(?:py|sql|md))?)`", text_of(page)):
        assert any((ROOT / place / name).exists() for place in (".", "src", "src/duly")), name


def test_every_room_is_in_the_page_in_the_order_of_the_contract():
    named = [
        (at, room.removesuffix("/"))
        for at, cells in enumerate(rows_of(ARCHITECTURE, "Rooms"))
        for room in quoted(cells[0])
    ]
    height = {room: at for at, room in named}
    modules = {path.stem for path in (ROOT / "src/duly").iterdir()} - {
        *("__init__", "__pycache__", "py"),
    }
    assert {room for _, room in named} == modules
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = [re.findall(r"\((\w+)\)", layer) for layer in contracts["contracts"][0]["layers"]]
    heights = [height[room] for layer in layers for room in layer if room in height]
    assert heights == sorted(heights), "a layer stands higher in the page than in the contract"


def test_every_table_is_in_the_page():
    named = {
        name for cells in rows_of(ARCHITECTURE, "The SQLite file") for name in quoted(cells[0])
    }
    there = {"duly_meta"}  # of the file itself
    for dialect in ("sqlite", "sqlite_store"):
        for block in statements(dialect).values():
            there |= set(re.findall(r"create table if not exists (\w+)", block))
    assert named == there

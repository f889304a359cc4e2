"""The pages of the site: what they show is executed, what they name is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest

import duly
from duly.guarantees import PROMISES, Settlement
from duly.inspection import KINDS, SubscriptionState

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def blocks(text: str, language: str = "python") -> list[tuple[int, str]]:
    """The blocks whose first line begins so, with the line at which their code begins."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, block.start(1)), block[1]) for block in found]


def execute(name: str, language: str = "python") -> dict[str, Any]:
    """Run a page's blocks as one file; a failure shows the line of the page."""
    space: dict[str, Any] = {"__name__": "page"}
    found = blocks(page(name), language)
    assert found, f"{name} shows nothing to run"
    for line, code in found:
        exec(compile("\n" * line + code, str(DOCS / name), "exec"), space)
    return space


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_each_mistake_of_a_handler_ends_as_the_page_says():
    execute("handlers.md")


@pytest.mark.parametrize("heading", re.findall(r"^## (.+)$", page("handlers.md"), re.MULTILINE))
def test_each_mistake_has_a_remedy(heading: str):
    [section] = re.findall(
        rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)",
        page("handlers.md"),
        re.MULTILINE | re.DOTALL,
    )
    assert re.search(r"nstead:\*|raised where the handler is declared", section)


def test_what_a_guarantee_refuses_is_refused():
    execute("choosing.md")


def test_the_side_of_duly_does_what_its_comparison_says():
    execute("migrating.md", 'python title="duly"')
    others = re.findall(r'^```python title="(\w+)"', page("migrating.md"), re.MULTILINE)
    assert others == ["celery", "duly", "faststream", "duly"]


def test_the_first_page_has_the_promises():
    rows = {
        cells[0]: cells[1:]
        for line in page("index.md").splitlines()
        if line.startswith("| ")
        for cells in [[cell.strip() for cell in line.strip("|").split("|")]]
    }
    for name in ("promise", "a_crash_costs"):
        assert rows[name.replace("_", " ")] == [getattr(p, name) for p in PROMISES.values()]


def test_every_numbered_example_is_shown():
    shown = re.findall(r'^--8<-- "(.+)"$', page("examples.md"), re.MULTILINE)
    there = [path.relative_to(ROOT).as_posix() for path in ROOT.glob("examples/*.py")]
    assert sorted(shown) == sorted(name for name in there if re.search(r"ex\d\d_", name))


def test_the_reference_has_every_public_name():
    """By itself, as an error of the tree, or as what its section is about."""
    text = page("reference.md")
    errors = {n for n in duly.__all__ if issubclass_of(getattr(duly, n), Exception)}
    rest = {"ConsumerOptions", "Guarantee"}  # how the options are typed; the three words
    named = set(re.findall(r"^::: duly\.(\w+)$", text, re.MULTILINE))
    assert set(duly.__all__) - named - errors == rest
    assert "::: duly.errors\n" in text


def issubclass_of(value: object, kind: type) -> bool:
    return isinstance(value, type) and issubclass(value, kind)


# --- the states of a message


def cells_below(heading: str) -> list[list[str]]:
    """The first cells of the tables below a heading of the page of states."""
    below = page("internals/states.md").split(heading, 1)[1]
    table = re.search(r"(?:^\|.*\n)+", below, re.MULTILINE)
    assert table is not None
    return [
        [cell.strip() for cell in row.strip("|").split("|")] for row in table[0].splitlines()[2:]
    ]


def test_every_settlement_is_on_the_page():
    named = [row[0].strip("`") for row in cells_below("one of four settlements")]
    assert named == [settlement.__name__ for settlement in get_args(Settlement)]


def test_every_incident_is_on_the_page():
    named = {name for row in cells_below("leaves an incident") for name in row[0].split()}
    assert {name.strip("`") for name in named} == set(KINDS)


def test_every_state_is_counted_by_its_name():
    counted = {row[2].strip("`") for row in cells_below("compares both tables")} - {""}
    fields = {*SubscriptionState.__dataclass_fields__} - {"name", "topic"}
    assert counted == fields

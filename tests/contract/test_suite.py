"""The suite can fail: it finds each of the mistakes that are planted, and says what is wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from duly.brokers.memory import MemoryDatabase
from duly.errors import ConfigurationError
from duly.testing.conformance import conformance
from duly.testing.conformance.areas import every_area
from duly.testing.conformance.areas.counted import Counted, Suppressed
from duly.testing.conformance.areas.mending import (
    DurableMending,
    Mending,
    MendingHeldKeys,
    MendingInOrder,
    NoMending,
)
from duly.testing.conformance.areas.observing import NoObserving, Observing, States
from duly.testing.conformance.areas.remembered import Forgotten, Remembered
from duly.testing.conformance.areas.ticked import Ticked, TickedDurably
from duly.testing.conformance.page import DEVIATIONS, expected_on
from duly.testing.conformance.plugin import in_ci
from tests.contract.broken.mistake import Mistake
from tests.contract.broken.mistakes import MISTAKES, page_of
from tests.contract.subjects import DOCS

ROOT = Path(__file__).parents[2]


def run(folder: Path, *args: str, **more: str) -> tuple[int, str]:
    """Run pytest in a folder, as somebody would who has duly installed; status and output."""
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    # Plugins that have nothing to do with it would cost each of these runs half a second.
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "duly.testing.conformance.plugin", *args],
        cwd=folder,
        env=environment | {"PYTHONPATH": path, "COLUMNS": "200"} | more,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


# --- mistakes


def areas_of(mistake: Mistake) -> list[str]:
    return sorted({test.partition("::")[0] for test in mistake.fails})


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, dict[str, str]]:
    """Which of the tests that have to find a mistake fail with it, as Area::test, and why."""
    folder = tmp_path_factory.mktemp("mistakes")
    for name, mistake in MISTAKES.items():
        (folder / f"{name}.md").write_text(page_of(mistake))
    applied = "\n".join(
        f"Test{name} = conformance(subject_with({name!r}), page='{name}.md')" for name in MISTAKES
    )
    (folder / "test_mistakes.py").write_text(
        "from duly.testing.conformance import conformance\n"
        f"from tests.contract.broken.mistakes import subject_with\n\n{applied}\n"
    )
    nodes = [
        f"test_mistakes.py::Test{name}::{test}"
        for name, mistake in MISTAKES.items()
        for test in mistake.fails
    ]
    status, output = run(folder, "-q", "--tb=no", "-rfE", *nodes)
    assert status == 1, output
    found: dict[str, dict[str, str]] = {name: {} for name in MISTAKES}
    line = re.compile(r"^(?:FAILED|ERROR) \S+?::Test(\w+?)::(.*?)(?: - (.*))?$", re.MULTILINE)
    for name, test, why in line.findall(output):
        found[name][test] = why
    return found


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found(name: str, failed: Mapping[str, dict[str, str]]):
    for expected in MISTAKES[name].fails:
        reasons = [why for test, why in failed[name].items() if test.startswith(expected)]
        assert reasons, f"{expected} does not fail"
        # The suite has to find it, not a coat that does not fit.
        assert not any(re.match("(Name|Attribute|Type|Import)Error", why) for why in reasons)


def test_every_area_finds_a_mistake():
    there = {area.__name__ for area in every_area()}
    tried = {area for mistake in MISTAKES.values() for area in areas_of(mistake)}
    assert tried | {"ManyWriters"} == there, "that one is tried in test_many_writers.py"


def test_every_test_of_what_people_see_and_ask_for_finds_a_mistake():
    tried = {test.partition("[")[0] for mistake in MISTAKES.values() for test in mistake.fails}
    for area in (
        Counted,
        Suppressed,
        Ticked,
        TickedDurably,
        Remembered,
        Forgotten,
        Mending,
        MendingHeldKeys,
        MendingInOrder,
        DurableMending,
        NoMending,
        States,
        Observing,
        NoObserving,
    ):
        there = {f"{area.__name__}::{name}" for name in vars(area) if name.startswith("test_")}
        assert there <= tried


# --- somebody else's broker


PAGE = (ROOT / "docs/testing-a-broker.md").read_text(encoding="utf-8")


def write_example(folder: Path) -> None:
    """The files of the page's example, each named in its first line."""
    blocks = re.findall(r"^(`{3,})\w+\n(.*?)^\1$", PAGE, re.MULTILINE | re.DOTALL)
    files = {
        name: text for _, text in blocks for name in re.findall(r"\A(?:# |<!-- )(\w+\.\w+)", text)
    }
    assert set(files) == {"pigeon.py", "pigeon.md", "test_pigeon.py", "nest.py", "test_nest.py"}
    for name, text in files.items():
        (folder / name).write_text(text)


def test_the_example_of_the_page_runs(tmp_path: Path):
    """A broker from outside, with three files and no configuration of pytest."""
    write_example(tmp_path)
    status, output = run(tmp_path, "-q", "-W", "error", PYTEST_DISABLE_PLUGIN_AUTOLOAD="")
    assert status == 0, output
    [shown] = re.findall(
        r"^```console\n\$ python -m pytest -q\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL
    )
    pattern = ".*?".join(re.escape(part) for part in shown.strip().split("..."))
    assert re.search(pattern, output, re.DOTALL), output
    counted = dict(re.findall(r"^(\w+) +(\d+) passed$", output, re.MULTILINE))
    assert counted.keys() == {"pigeon", "nest"}
    assert all(int(count) > 200 for count in counted.values()), counted


def test_it_is_collected_whatever_the_author_calls_tests(tmp_path: Path):
    write_example(tmp_path)
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\npython_functions = check_*\npython_classes = Verify*\n"
        "addopts = --strict-markers --strict-config\nfilterwarnings = error\n"
    )
    status, output = run(tmp_path, "-q", "-k", "Publishing", "test_pigeon.py")
    assert status == 0, output
    assert re.search(r"^pigeon +\d\d passed$", output, re.MULTILINE)


def test_a_failure_shows_the_values(tmp_path: Path):
    """Assertions are rewritten, in a package that pytest did not collect itself."""
    write_example(tmp_path)
    (tmp_path / "pigeon.py").write_text(
        "from duly.brokers.memory import MemoryDatabase\n\n"
        "class Pigeon(MemoryDatabase):\n"
        "    def publish(self, messages):\n"
        "        return super().publish(messages[::-1])[::-1]\n"
    )
    status, output = run(tmp_path, "-q", "-k", "test_outcomes_come_in_the_order_of_the_messages")
    assert status == 1, output
    assert "['last', 'first'] == ['first', 'last']" in output


# --- pages


def write_page(folder: Path, name: str, change: tuple[str, str], file: str = "it") -> None:
    """The page of the memory brokers with something changed in it, and a file that reads it."""
    old, new = change
    text = (DOCS / "memory.md").read_text()
    assert old in text
    page = folder / f"{file}.md"
    page.write_text(text.replace(old, new))
    (folder / f"test_{file}.py").write_text(
        "from duly.testing.conformance import conformance\n"
        f"from duly.testing.conformance.memory import {name}\n\n"
        f"TestIt = conformance({name}, page={str(page)!r})\n"
    )


def test_a_deviation_that_is_not_needed_any_more(tmp_path: Path):
    listed = '[memory-database.deviations]\nprefix-only = "we have always done it so"\n'
    write_page(tmp_path, "DATABASE", ("\n[memory-log]\n", f"\n{listed}\n[memory-log]\n"))
    status, output = run(tmp_path, "-q", "--tb=short", "test_it.py::TestIt::Settling")
    assert status == 1, output
    assert "lists the deviation 'prefix-only' for memory-database" in output
    assert "take the line out" in output
    assert "1 failed" in output


def test_a_deviation_that_is_not_listed(tmp_path: Path):
    areas = {"prefix-only": "Settling", "lane-lost-together": "Leases", "moves-on-join": "Leases"}
    # A log delays nothing: who has to list that is among the planted mistakes.
    assert areas.keys() | {"due-by-elapsed-time"} == DEVIATIONS.keys()
    for deviation in areas:
        file = deviation.replace("-", "_")
        write_page(tmp_path, "LOG", (f"\n{deviation} =", "\n# nothing ="), file)
    nodes = [f"test_{d.replace('-', '_')}.py::TestIt::{area}" for d, area in areas.items()]
    status, output = run(tmp_path, "-q", "--tb=short", *nodes)
    assert status == 1, output
    for deviation in areas:
        assert f"list '{deviation}' under deviations" in output
    assert "3 failed" in output


def test_a_page_that_says_less_or_more(tmp_path: Path):
    """Which tests there are follows from the page, so a page that is wrong fails by itself."""
    write_page(tmp_path, "QUEUE", ("delays = true", "delays = false"))
    status, output = run(tmp_path, "-q", "--tb=short", "-k", "Page or Delays")
    assert status == 1, output
    assert "delays: the page says False, it says True" in output
    assert "TestIt::NoDelays::test_a_due_time_is_refused[5]" in output


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("# Nothing\n", "0 blocks"),
        ("```toml conformance\n[a]\n```\n" * 2, "2 blocks"),
        ("```toml conformance\n[b]\n```\n", "no table"),
        ("```toml conformance\n[a\n```\n", "no TOML"),
        ('```toml conformance\n[a]\n[a.deviations]\nslow = "it is"\n```\n', "names 'slow'"),
    ],
)
def test_a_page_that_cannot_be_read(tmp_path: Path, text: str, complaint: str):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ConfigurationError, match=complaint):
        expected_on(page, "a")


def test_a_page_that_is_not_there(tmp_path: Path):
    for page in (tmp_path / "gone.md", tmp_path):
        with pytest.raises(ConfigurationError, match=r"cannot be read: .*(gone|Is a directory)"):
            expected_on(page, "a")


def test_a_broker_where_a_subject_is_wanted():
    with pytest.raises(ConfigurationError, match="give a BrokerSubject or a StoreSubject"):
        conformance(MemoryDatabase(), page=DOCS / "memory.md")  # type: ignore[arg-type]


def test_every_deviation_is_in_the_documents():
    for name, promise in DEVIATIONS.items():
        assert f"| `{name}` | {promise.rstrip('.')} |" in PAGE


def test_every_area_is_in_the_documents():
    table = PAGE.split("## What is tested", 1)[1].split("## Reading", 1)[0]
    assert set(re.findall(r"`([A-Z]\w+)`", table)) == {area.__name__ for area in every_area()}


# --- what pytest shows


SKIPPED = """
import pytest
from pathlib import Path
from duly.testing.conformance import BrokerSubject, conformance

def nowhere(site):
    pytest.skip("no server here")

TestNowhere = conformance(
    BrokerSubject(name="pigeon", open=nowhere), page=Path(__file__).with_name("pigeon.md")
)
"""


@pytest.mark.parametrize(("ci", "counts"), [("", False), ("false", False), ("1", True)])
def test_a_run_counts_in_ci(monkeypatch: pytest.MonkeyPatch, ci: str, counts: bool):
    monkeypatch.setenv("CI", ci)
    assert in_ci() is counts


@pytest.mark.parametrize(("ci", "status"), [("", 0), ("true", 1)])
def test_a_skip_fails_in_ci(tmp_path: Path, ci: str, status: int):
    write_example(tmp_path)
    (tmp_path / "test_pigeon.py").write_text(SKIPPED)
    ended, output = run(tmp_path, "-q", "-k", "Publishing", "test_pigeon.py", CI=ci)
    assert ended == status, output
    if status:
        assert "what is not tested is not promised" in output
        assert "no server here" in output
        assert re.search(r"^pigeon +\d+ error$", output, re.MULTILINE)
    else:
        assert re.search(r"^pigeon +\d+ skipped$", output, re.MULTILINE)


def test_other_tests_may_be_skipped_in_ci(tmp_path: Path):
    (tmp_path / "test_other.py").write_text(
        "import pytest\n\n@pytest.mark.skip\ndef test_it():\n    pass\n"
    )
    status, output = run(tmp_path, "-q", CI="true")
    assert status == 0, output
    assert "duly conformance" not in output

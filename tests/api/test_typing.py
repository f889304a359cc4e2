"""mypy (strict) and pyright accept every right use and refuse exactly the wrong ones."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

FILES = Path(__file__).parent.parent / "typing"

Lines = dict[int, str]


def mypy(file: Path) -> Lines:
    """What mypy reports, by line."""
    (file.parent / "mypy.ini").write_text("[mypy]\nstrict = true\n")
    report = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file=mypy.ini", "--output=json", file.name],
        cwd=file.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    found = [json.loads(line) for line in report.stdout.splitlines() if line.startswith("{")]
    assert found or report.returncode == 0, report.stdout + report.stderr
    return {
        each["line"]: each["message"]
        for each in found
        if each["severity"] == "error" and each["file"] == file.name
    }


def pyright(file: Path) -> Lines:
    """What pyright reports, by line."""
    settings = {"include": [file.name], "pythonVersion": "3.11"}
    (file.parent / "pyrightconfig.json").write_text(json.dumps(settings))
    report = subprocess.run(
        [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson"],
        cwd=file.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    answer = json.loads(report.stdout)
    assert answer["summary"]["filesAnalyzed"] == 1
    return {
        each["range"]["start"]["line"] + 1: each["message"]
        for each in answer["generalDiagnostics"]
        if each["severity"] == "error"
    }


def marked(file: Path) -> dict[int, str]:
    """The lines that say they are wrong."""
    lines = enumerate(file.read_text().splitlines(), start=1)
    return {number: line for number, line in lines if re.search(r"  # wrong: ", line)}


@pytest.fixture(params=[mypy, pyright], ids=["mypy", "pyright"])
def checker(request: pytest.FixtureRequest):
    return request.param


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[str], Path]:
    """A file by itself, so that neither checker finds this project's own settings."""
    return lambda name: Path(shutil.copy(FILES / name, tmp_path))


@pytest.mark.slow
def test_what_is_right_is_accepted(checker, copied):
    assert checker(copied("right.py")) == {}


@pytest.mark.slow
def test_what_is_wrong_is_refused_line_by_line(checker, copied):
    file = copied("wrong.py")
    expected, reported = marked(file), checker(file)
    assert len(expected) > 40
    accepted = {number: expected[number] for number in expected.keys() - reported.keys()}
    refused = {number: reported[number] for number in reported.keys() - expected.keys()}
    assert (accepted, refused) == ({}, {})

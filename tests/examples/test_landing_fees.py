"""The example on real data adds up under kills, and would say so if it did not."""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def landing_fees(*options: str) -> str:
    ended = subprocess.run(
        [sys.executable, str(EXAMPLES / "landing_fees.py"), *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_some_thousand_flights_add_up_under_kills():
    said = landing_fees("--limit", "20000", "--kills", "5")
    assert "20,000 flights of 15 carriers" in said
    assert "differs" not in said
    assert said.count(" holds ") == 3
    assert "\n0 workers were killed" not in said


@pytest.mark.slow
def test_all_flights_of_the_year_add_up_under_kills():
    said = landing_fees()
    assert "336,776 flights of 16 carriers" in said
    assert "20 workers were killed" in said
    assert said.count(" holds ") == 3


def test_without_kills_nothing_is_missed_or_counted_twice():
    said = landing_fees("--limit", "3000", "--kills", "0", "--processes", "1")
    assert "0 flights were missed; at risk in 0 kills: 0" in said
    assert "0 flights were counted twice" in said


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("landing_fees")


def test_whatever_does_not_add_up_is_said(
    example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "flights.csv").write_text("".join(example.source_lines(10)), encoding="utf-8")
    count, cents = example.expected(tmp_path / "flights.csv")
    right = example.Found(
        {name: (count[name], cents[name]) for name in count},
        {"at-most-once": 10, "at-least-once": 10},
        redelivered=0,
        repeats_dropped=0,
        at_risk=3,
    )
    assert example.report(tmp_path, right, kills=1)
    flights, billed = right.fees["UA"]
    for wrong in (
        replace(right, fees={**right.fees, "UA": (flights, billed + 1)}),
        replace(right, fees={**right.fees, "UA": (flights + 1, billed)}),
        replace(right, counted={"at-most-once": 11, "at-least-once": 10}),
        replace(right, counted={"at-most-once": 6, "at-least-once": 10}),
        replace(right, counted={"at-most-once": 10, "at-least-once": 9}),
        replace(right, counted={"at-most-once": 10, "at-least-once": 11}),
    ):
        capsys.readouterr()
        assert not example.report(tmp_path, wrong, kills=1)
        assert capsys.readouterr().out.count("BROKEN") == 1

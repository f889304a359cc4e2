"""A short chaos run on every run of the tests, and runs with planted bugs, which it must name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def chaos(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "duly.testing.chaos", "--folder", str(folder), *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )


def test_a_short_run_breaks_nothing(tmp_path: Path):
    """Too short for every fault to hit: it may be unknown what it shows, but never invalid."""
    short = ("--minutes", "0.1", "--faults-s", "4")
    ended = chaos(tmp_path / "chaos", *short)
    said = ended.stdout + ended.stderr
    assert ended.returncode in (0, 2), said
    assert "2 rounds" in said, said
    assert "0 anomalies: " in said
    assert not (tmp_path / "chaos").exists(), "what was good is not kept"


@pytest.mark.slow
def test_what_is_settled_in_the_wrong_order_is_named(tmp_path: Path):
    ended = chaos(
        tmp_path / "chaos",
        *("--round", "1", "--faults-s", "4", "--seed", "4"),
        *("--before", "tests.chaos.planted:settled_in_the_wrong_order"),
    )
    said = ended.stdout + ended.stderr
    assert ended.returncode == 1, said
    for name in ("premature settle", "start before settle", "duplicate effect"):
        assert name in " ".join(said.split()), said
    assert "--seed 4" in said
    assert list((tmp_path / "chaos/round-1/histories").iterdir()), "it is kept"
    again = chaos(tmp_path, "--judge", str(tmp_path / "chaos/round-1"))
    assert again.returncode == 1, again.stdout + again.stderr

"""The pytest plugin, in a pytest of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

APP = '''
"""An application and its tests."""
from typing import Any

import duly

orders = duly.Topic("orders", int, guarantee="exactly-once")
app = duly.App("shop", "memory://")


@app.consumer(orders, name="billing", guarantee="exactly-once")
def bill(order: int, tx: duly.Transaction[Any]) -> None:
    tx.connection.insert("charges", order, order)
'''

TESTS = """
from shop import app, orders


def test_plainly(duly_running, tmp_path):
    with duly_running(app, broker=f"sqlite:///{tmp_path}/x.db", consumers=["billing"]) as t:
        t.publish(orders, 1)


def test_under_faults(duly_faulty, tmp_path):
    with duly_faulty(app, rate=0.5) as t:
        t.publish_many(orders, range(5))
        t.drain()
        with t.connection() as db:
            assert len(db.rows("charges")) == 5


def test_that_fails(duly_faulty):
    with duly_faulty(app, at={1: "unavailable"}) as t:
        t.publish(orders, 1)
        t.drain()
        assert t.faults.hits == []
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "shop.py").write_text(APP)
    (tmp_path / "test_shop.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    return tmp_path


def run_pytest(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """A pytest that knows the plugin, as an installed duly makes it known or by its name."""
    known = any(each.value == "duly.testing.plugin" for each in entry_points(group="pytest11"))
    plugins = ["-p", "no:cacheprovider", *([] if known else ["-p", "duly.testing.plugin"])]
    command = [sys.executable, "-m", "pytest", *plugins, *options]
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "COLUMNS": "200", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


def test_a_test_with_faults_runs_once_a_seed_and_says_how_to_replay_it(folder: Path):
    ended = run_pytest(folder, "--duly-seeds=3")
    assert "3 failed, 4 passed" in ended.stdout, ended.stdout + ended.stderr
    assert "test_that_fails[seed2]" in ended.stdout
    assert "replay with --duly-seed=2" in ended.stdout
    assert "faults that hit (call, its name, fault): [(1, 'claim', 'unavailable')" in ended.stdout
    again = run_pytest(folder, "--duly-seed=17", "-k", "under_faults", "-v")
    assert "test_under_faults[seed17] PASSED" in again.stdout, again.stdout


def test_it_imports_nothing_that_is_not_asked_for():
    heavy = ("duly.testing.harness", "duly.worker", "duly.connect", "duly.brokers", "sqlite3")
    code = "import sys, duly.testing.plugin; print(*sys.modules)"
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()
    assert "duly.testing.plugin" in said
    assert not [name for name in said if name.startswith(heavy)]

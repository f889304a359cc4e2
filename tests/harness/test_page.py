"""docs/testing.md shows examples/test_orders_app.py, and that is run here."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import get_args

from duly.testing.faulty import Death, Kind
from tests.harness.test_plugin import run_pytest

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs/testing.md").read_text(encoding="utf-8")
EXAMPLE = (ROOT / "examples/test_orders_app.py").read_text(encoding="utf-8")


def test_the_example_passes(tmp_path: Path):
    for name in ("orders_app.py", "test_orders_app.py"):
        shutil.copy(ROOT / "examples" / name, tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    ended = run_pytest(tmp_path, "-q")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "14 passed" in ended.stdout
    assert not (tmp_path / "shop.db").exists()


def test_the_page_shows_the_example():
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) > 5
    for block in blocks:
        assert block.strip("\n") in EXAMPLE, block


def test_the_page_has_every_kind_of_fault():
    below = PAGE.split("## When things go wrong", 1)[1]
    rows = [line for line in below.splitlines() if line.startswith("| `")]
    named = re.findall(r"`([^`]+)`", " ".join(row.split("|")[1] for row in rows))
    assert set(named) == {*get_args(Kind), *get_args(Death)}

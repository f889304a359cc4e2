"""Stores with many writers, and without an outbox: what is tested of them can pass and fail."""

from __future__ import annotations

from pathlib import Path

from tests.contract.test_suite import run

PAGE = """
```toml conformance
[ledger]
name = "ledger"
durable = false
one_writer = false
outbox = false
tx_s = 1.0
savepoints = "unbounded"
async_connections = false
pipelines = false
parks = false
effects = true
```
"""
AREAS = ("ManyWriters", "NoOutbox", "StorePage", "ExactlyOnce", "Savepoints", "Transactions")


def run_ledger(folder: Path, how: str, *areas: str) -> tuple[int, str]:
    (folder / "ledger.md").write_text(PAGE)
    (folder / "test_ledger.py").write_text(
        "from pathlib import Path\n"
        "from duly.testing.conformance import conformance\n"
        "from tests.contract.ledger import subject\n\n"
        f"page = Path(__file__).with_name('ledger.md')\n"
        f"TestLedger = conformance(subject({how}), page=page)\n"
    )
    nodes = [f"test_ledger.py::TestLedger::{area}" for area in areas]
    # It admits by inbox whatever it is asked: that is enough to show what is to be shown.
    return run(folder, "-q", "--tb=short", "-rfE", "-k", "not by-cursor", *nodes)


def test_a_store_with_many_writers_passes(tmp_path: Path):
    status, output = run_ledger(tmp_path, "", *AREAS)
    assert status == 0, output


def test_a_store_whose_fence_does_not_hold_is_found(tmp_path: Path):
    status, output = run_ledger(tmp_path, "fence=False", "ManyWriters")
    assert status == 1, output
    assert "::ManyWriters::test_a_second_copy_does_not_run_beside_the_first[by-inbox" in output
    assert "a second copy was admitted while the first was open" in output

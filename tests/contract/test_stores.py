"""What every store keeps, applied to those that are here, beside each broker in memory."""

from __future__ import annotations

from duly.testing.conformance import conformance
from duly.testing.conformance.memory import STORE
from tests.contract.subjects import DOCS, SQLITE_STORE

TestSQLiteStore = conformance(SQLITE_STORE, page=DOCS / "sqlite.md")
TestMemoryStore = conformance(STORE, page=DOCS / "memory.md")

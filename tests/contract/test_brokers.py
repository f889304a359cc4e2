"""What every broker keeps, applied to those that are here."""

from __future__ import annotations

from duly.testing.conformance import conformance
from duly.testing.conformance.memory import DATABASE, LOG, QUEUE
from tests.contract.subjects import DOCS, SQLITE

TestSQLite = conformance(SQLITE, page=DOCS / "sqlite.md")
TestMemoryDatabase = conformance(DATABASE, page=DOCS / "memory.md")
TestMemoryLog = conformance(LOG, page=DOCS / "memory.md")
TestMemoryQueue = conformance(QUEUE, page=DOCS / "memory.md")

"""What every store keeps, applied to those that are here, beside each broker in memory."""

from __future__ import annotations

from duly.testing.conformance import conformance
from duly.testing.conformance.memory import STORE
from tests.contract.postgres_subjects import POSTGRES_STORE, STORES
from tests.contract.subjects import DOCS, NAMESPACE_STORE, SQLITE_STORE, by_name_alone

TestSQLiteStore = conformance(SQLITE_STORE, page=DOCS / "sqlite.md")
TestSQLiteNamespaceStore = by_name_alone(conformance(NAMESPACE_STORE, page=DOCS / "sqlite.md"))
TestMemoryStore = conformance(STORE, page=DOCS / "memory.md")
TestPostgresStore = conformance(POSTGRES_STORE, page=STORES / "postgres.md")

"""What every broker keeps, applied to those that are here."""

from __future__ import annotations

from duly.testing.conformance import conformance
from duly.testing.conformance.memory import DATABASE, LOG, QUEUE
from tests.contract.postgres_subjects import POSTGRES
from tests.contract.rabbitmq_subjects import RABBITMQ
from tests.contract.subjects import DOCS, NAMESPACE, SQLITE, by_name_alone

TestSQLite = conformance(SQLITE, page=DOCS / "sqlite.md")
TestSQLiteNamespace = by_name_alone(conformance(NAMESPACE, page=DOCS / "sqlite.md"))
TestPostgres = conformance(POSTGRES, page=DOCS / "postgres.md")
TestMemoryDatabase = conformance(DATABASE, page=DOCS / "memory.md")
TestMemoryLog = conformance(LOG, page=DOCS / "memory.md")
TestMemoryQueue = conformance(QUEUE, page=DOCS / "memory.md")
TestRabbitMQ = conformance(RABBITMQ, page=DOCS / "rabbitmq.md")

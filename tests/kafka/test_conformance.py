"""What every broker keeps, applied to Kafka."""

from __future__ import annotations

from duly.testing.conformance import conformance
from tests.contract.kafka_subjects import KAFKA
from tests.contract.subjects import DOCS

TestKafka = conformance(KAFKA, page=DOCS / "kafka.md")

"""What every broker keeps, applied to Kafka.

Each test makes topics and joins a group, which is a second. So what is tested elsewhere in every
run, or tells about rare things, is left to ``make long``.
"""

from __future__ import annotations

from typing import Any

import pytest

from duly.testing.conformance import conformance
from tests.contract.kafka_subjects import KAFKA, SPANS
from tests.contract.subjects import DOCS

TestKafka: Any = conformance(KAFKA, page=DOCS / "kafka.md")
# The same by spans of bodies, which is how most workers claim.
TestSpans: Any = conformance(SPANS, page=DOCS / "kafka.md")

for _area in (
    *("Burying", "Crowds", "CrowdsInTransactions", "ExactlyOnce", "Faults"),
    *(
        "FaultsInTransactions",
        "Histories",
        "Leases",
        "Limits",
        "Order",
        "Publishing",
        "Retention",
        "Waiting",
    ),
):
    pytest.mark.long(getattr(TestKafka, _area))
pytest.mark.long(TestSpans)

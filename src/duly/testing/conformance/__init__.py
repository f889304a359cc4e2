"""The conformance suite: what every broker and every store keeps, as tests of your own.

Describe how yours is opened and hand it to `conformance`; pytest collects the rest::

    from duly.testing.conformance import BrokerSubject, conformance

    PIGEON = BrokerSubject(name="pigeon", open=lambda site: Pigeon(site.folder, clock=site.clock))
    TestPigeon = conformance(PIGEON, page="docs/brokers/pigeon.md")

It needs pytest: ``pip install duly[testing]``.
"""

from __future__ import annotations

from duly.testing.conformance.subject import (
    BrokerSubject,
    Clock,
    Effects,
    OwnTransaction,
    Site,
    StoreSubject,
)
from duly.testing.conformance.suite import conformance

__all__ = [
    "BrokerSubject",
    "Clock",
    "Effects",
    "OwnTransaction",
    "Site",
    "StoreSubject",
    "conformance",
]

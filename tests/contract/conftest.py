"""Every test runs on every backend."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.contract.backends import BROKERS, OUTBOXES, PLACES, Backend, Outboxed, Place


@pytest.fixture(params=list(BROKERS))
def backend(request: Any, tmp_path: Path) -> Iterator[Backend]:
    with BROKERS[request.param](tmp_path) as opened:
        yield opened


@pytest.fixture(params=list(PLACES))
def place(request: Any, tmp_path: Path) -> Iterator[Place]:
    with PLACES[request.param](tmp_path) as opened:
        yield opened


@pytest.fixture(params=list(OUTBOXES))
def outboxed(request: Any, tmp_path: Path) -> Iterator[Outboxed]:
    with OUTBOXES[request.param](tmp_path) as opened:
        yield opened

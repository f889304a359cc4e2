"""Fixtures and settings for every test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# No deadline: these tests touch disks and processes, and a slow example is not a wrong one.
# print_blob: a failure prints what replays it, on another machine too.
settings.register_profile("laptop", deadline=None, print_blob=True)
settings.register_profile("ci", deadline=None, print_blob=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") == "true" else "laptop")


@pytest.fixture
def db_path(tmp_path: Path) -> Path:
    """The path of a database file of this test's own; nothing is there yet."""
    return tmp_path / "duly.db"


@pytest.fixture
def db_url(db_path: Path) -> str:
    """The same file as a broker URL."""
    return f"sqlite:///{db_path}"

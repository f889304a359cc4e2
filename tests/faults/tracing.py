"""Processes under strace, which kills them in the middle of a system call or makes one fail."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.faults.scene import ROOT, Scene


def why_not() -> str | None:
    """Why processes cannot be traced here; None: they can."""
    strace = shutil.which("strace")
    if strace is None:
        return "strace is not installed"
    tried = subprocess.run(
        [strace, "-f", "-y", "-e", "trace=openat", "true"], capture_output=True, check=False
    )
    return None if tried.returncode == 0 else f"strace cannot trace: {tried.stderr.decode()[-200:]}"


def require() -> None:
    """Skip where nothing can be traced; in CI that is a failure."""
    reason = why_not()
    if reason is not None:
        assert os.environ.get("CI") != "true", reason
        pytest.skip(reason)


def traced(scene: Scene, options: list[str], role: str, **orders: Any) -> tuple[int, str]:
    """Run a process of the scene under strace; its exit status and what it said."""
    told = scene.told(role=role, **orders)
    program = [sys.executable, "-m", "tests.faults.program", json.dumps(told)]
    ended = subprocess.run(
        ["strace", "-f", "-qq", "-e", "signal=none", *options, *program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return ended.returncode, ended.stdout + ended.stderr


def count(scene: Scene, calls: str, role: str, **orders: Any) -> Mapping[str, int]:
    """How often each of these system calls is made, at most, by one thread."""
    trace = scene.folder / "calls"
    options = ["-o", str(trace), "-s", "1", "-e", f"trace={calls}"]
    status, said = traced(scene, options, role, **orders)
    assert status == 0, said
    return calls_in(trace)


def calls_in(trace: Path) -> Mapping[str, int]:
    """The largest count of each call over all threads of a trace: strace counts by thread."""
    counts = Counter(re.findall(r"^(\d+) +(\w+)\(", trace.read_text(), re.MULTILINE))
    most: dict[str, int] = {}
    for (_, call), times in counts.items():
        most[call] = max(most.get(call, 0), times)
    return most

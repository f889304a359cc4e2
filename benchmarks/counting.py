"""Counts commits and fsyncs, in a run of their own that is not timed.

Commits are counted by SQLite's trace callback on every connection the process opens: each
COMMIT, and each writing statement outside a transaction. fsyncs are what the kernel is asked
for (fsync, fdatasync), seen by strace between the two marks of the measured part.
"""

from __future__ import annotations

import re
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_ENDS = ("COMMIT", "END")
_WRITES = ("INSERT", "UPDATE", "DELETE", "REPLACE", "CREATE", "WITH")

# What is counted while a row runs, by its name: how many there were so far.
METERS: dict[str, Callable[[], int]] = {}


def count_commits() -> None:
    """From now on count the commits of every connection that this process opens."""
    counted = [0]
    METERS["commits"] = lambda: counted[0]
    original = sqlite3.connect

    def connect(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = original(*args, **kwargs)

        def see(statement: str) -> None:
            word = statement[:12].upper().lstrip()
            alone = word.startswith(_WRITES) and not connection.in_transaction
            if alone or word.startswith(_ENDS):
                counted[0] += 1

        connection.set_trace_callback(see)
        return connection

    sqlite3.connect = sqlite3.dbapi2.connect = connect  # type: ignore[assignment]


def can_trace() -> bool:
    """Whether strace is there and allowed."""
    strace = shutil.which("strace")
    if strace is None:
        return False
    probe = [strace, "-f", "--seccomp-bpf", "-e", "trace=fsync", "-o", "/dev/null", "true"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


def traced(command: Sequence[str], log: Path) -> list[str]:
    """The command under strace; `fsyncs` reads the log."""
    calls = "trace=fsync,fdatasync,access,faccessat,faccessat2"
    return ["strace", "-f", "--seccomp-bpf", "-y", "-e", calls, "-o", str(log), *command]


_FSYNC = re.compile(r"^\d+ +f(?:data)?sync\(")


def fsyncs(log: Path, start: str, stop: str) -> int | None:
    """How often the log asks for durability between the marks; None without the marks."""
    inside, count, complete = False, 0, False
    with log.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if f'"{start}"' in line:
                inside = True
            elif f'"{stop}"' in line:
                inside, complete = False, True
            elif inside and _FSYNC.match(line):
                count += 1
    return count if complete else None

"""What the numbers were measured on."""

from __future__ import annotations

import os
import platform
import sqlite3
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def machine(file_system: str) -> list[tuple[str, str]]:
    """The lines that head the results."""
    return [
        ("processor", f"{cpu_model()}, {os.cpu_count()} cores"),
        ("memory", memory()),
        ("system", f"{platform.system()} {platform.release()}, {file_system}"),
        ("Python", f"{platform.python_implementation()} {platform.python_version()}"),
        ("SQLite", sqlite3.sqlite_version),
        *((name, installed(name)) for name in ("duly", "msgspec", "huey", "persist-queue")),
    ]


def cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def memory() -> str:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{pages / 2**30:.0f} GiB"


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def load() -> float:
    """How many processes wanted a core in the last minute: over 1 at the start means noise."""
    return os.getloadavg()[0]

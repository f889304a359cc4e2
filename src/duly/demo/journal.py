"""`Journal`: effects outside any database, written so that kill -9 loses no finished one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self


class Journal:
    """A file of lines that many processes append to, each line by one write()."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def write(self, line: str) -> None:
        """Append a line. It is the kernel's on return, whatever becomes of this process."""
        os.write(self._fd, f"{line}\n".encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        os.close(self._fd)


def last_lines(path: Path, size: int = 256 * 1024) -> set[str]:
    """The lines in the last ``size`` bytes."""
    if not path.exists():
        return set()
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        return set(file.read().decode().split("\n"))


def read_journal(path: Path) -> list[str]:
    """The lines written so far; none where nobody wrote."""
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []

"""A disk that can be filled: one of a few megabytes, or, where nobody may mount one, a limit on
the size of files.
"""

from __future__ import annotations

import contextlib
import resource
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from duly.testing.chaos.surroundings import fill

MEGABYTES = 48
# A database's log is longer than this at nearly any moment, and no history ever is.
LIMIT_BYTES = 128 * 1024


class Disk(Protocol):
    """What can be full. It is so for these processes, or for all."""

    def fill(self, processes: Iterable[int]) -> None:
        """Leave not a byte of it."""
        ...

    def make_room(self, processes: Iterable[int]) -> None:
        """Undo that."""
        ...


class SmallDisk:
    """A disk of a few megabytes."""

    def __init__(self, folder: Path) -> None:
        self._filler = folder / "filler"

    def fill(self, processes: Iterable[int]) -> None:
        """Fill it for everybody."""
        del processes
        fill(self._filler)

    def make_room(self, processes: Iterable[int]) -> None:
        """Empty it again."""
        del processes
        self._filler.unlink(missing_ok=True)


class SizeLimit:
    """Files that may not grow, which is refused as a full disk is. The processes must ignore
    SIGXFSZ.
    """

    def fill(self, processes: Iterable[int]) -> None:
        """Set the limit."""
        self._set(processes, LIMIT_BYTES)

    def make_room(self, processes: Iterable[int]) -> None:
        """Lift it."""
        self._set(processes, resource.RLIM_INFINITY)

    def _set(self, processes: Iterable[int], limit: int) -> None:
        for pid in processes:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


@contextmanager
def disk_at(folder: Path, *, mount: bool = True) -> Iterator[Disk]:
    """A disk at this folder that can be filled, for as long as it lasts."""
    folder.mkdir(parents=True, exist_ok=True)
    if not mount:
        yield SizeLimit()
        return
    options = ["-t", "tmpfs", "-o", f"size={MEGABYTES}m", "tmpfs", str(folder)]
    try:
        asked = subprocess.run(["mount", *options], capture_output=True, check=False)
        mounted = asked.returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        yield SizeLimit()
        return
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)

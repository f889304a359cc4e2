"""What a process is put into before it works: a clock that is wrong; and a disk without room."""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import time
from pathlib import Path


def go_by(clock: Path) -> None:
    """Let this process's wall clock be wrong by what stands in a file, and be stepped with it.

    Every process of a machine that goes by the same file goes by one clock.
    """
    if not clock.exists():
        step(clock, 0)
    with clock.open("rb") as file:
        shared = mmap.mmap(file.fileno(), 8, prot=mmap.PROT_READ)
    now_ns = time.time_ns

    def offset_ns() -> int:
        (seconds,) = struct.unpack("<q", shared)
        return int(seconds) * 1_000_000_000

    time.time_ns = lambda: now_ns() + offset_ns()
    time.time = lambda: (now_ns() + offset_ns()) / 1e9


def step(clock: Path, offset_s: float) -> None:
    """Set the clock of the processes that go by this file."""
    fd = os.open(clock, os.O_RDWR | os.O_CREAT, 0o600)
    os.pwrite(fd, struct.pack("<q", int(offset_s)), 0)
    os.close(fd)


def fill(filler: Path) -> None:
    """Write into a file until its disk has not a byte left."""
    fd = os.open(filler, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        for size in (65536, 4096, 512, 1):
            with contextlib.suppress(OSError):
                while True:
                    os.write(fd, b"\0" * size)
    finally:
        os.close(fd)

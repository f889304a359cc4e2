"""Measures one row once, in a process and a place of its own: a directory, or a database."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import counting
from rows import Row
from workload import START_MARK, STOP_MARK, Sample

RUN = Path(__file__).with_name("run.py")
SOURCE = RUN.parent.parent / "src"
TIMEOUT_S = 300
BACKLOG_TIMEOUT_S = 3600


class RowFailed(Exception):
    """A row did not finish, or what it left behind was wrong."""


class Places(Protocol):
    """Where rows run. ``counted``: what is counted there; ``traced``: some of it by strace."""

    counted: tuple[str, ...]
    traced: bool

    def fresh(self) -> AbstractContextManager[str]:
        """A place of a row's own, by name."""
        ...


class Directories:
    """A directory of a row's own on a real disk, for files of SQLite."""

    counted: tuple[str, ...] = ("commits", "fsyncs")
    traced = True

    def __init__(self, within: Path) -> None:
        self._within = within

    @contextmanager
    def fresh(self) -> Iterator[str]:
        """As `Places.fresh`."""
        with tempfile.TemporaryDirectory(dir=self._within, prefix="row-") as name:
            yield name


def on_real_disk(directory: Path) -> str:
    """The file system of the directory. Raises `RowFailed` for one that keeps nothing."""
    best, kind = "", ""
    with Path("/proc/mounts").open(encoding="utf-8") as mounts:
        for line in mounts:
            _, place, type_ = line.split()[:3]
            path = str(directory.resolve())
            inside = path == place or path.startswith(place.rstrip("/") + "/")
            if inside and len(place) >= len(best):
                best, kind = place, type_
    if kind in {"tmpfs", "ramfs"}:
        raise RowFailed(f"{directory} is on {kind}, which syncs nothing: give --dir on a disk")
    return kind


def in_a_fresh_process(
    row: Row, messages: int, on: str, places: Places, *, count: bool = False
) -> Sample:
    """Run the row elsewhere. With ``count`` it is not timed but counted, into its figures."""
    with tempfile.TemporaryDirectory() as name, places.fresh() as place:
        command = [row.python, str(RUN), "--on", on, "--one", row.name]
        command += ["--messages", str(messages), "--place", place]
        log = Path(name) / "strace.log"
        if count:
            command.append("--count")
            if places.traced and counting.can_trace():
                command = counting.traced(command, log)
        limit_s = BACKLOG_TIMEOUT_S if row.backlog else TIMEOUT_S
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=limit_s,
                check=False,
                env={**os.environ, "PYTHONPATH": str(SOURCE)} if row.apart else None,
            )
        except subprocess.TimeoutExpired:
            raise RowFailed(f"{row.name}: not done after {limit_s} s") from None
        if done.returncode != 0:
            raise RowFailed(f"{row.name}: {done.stderr.strip()[-2000:]}")
        sample = Sample(**json.loads(done.stdout.splitlines()[-1]))
        if count and log.exists():
            synced = counting.fsyncs(log, START_MARK, STOP_MARK)
            if synced is not None:
                sample.figures["fsyncs"] = synced
        return sample


def here(row: Row, place: Any, messages: int) -> None:
    """What the fresh process does: run the row and print the sample."""
    sample = row.run(place, messages)
    print(json.dumps(asdict(sample)))

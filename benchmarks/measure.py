"""Measures one row once, in a process and a directory of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import counting
from rows import Row
from workload import START_MARK, STOP_MARK, Sample

RUN = Path(__file__).with_name("run.py")
TIMEOUT_S = 300


class RowFailed(Exception):
    """A row did not finish, or what it left behind was wrong."""


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


def in_a_fresh_process(row: Row, messages: int, directory: Path, *, count: bool = False) -> Sample:
    """Run the row elsewhere. With ``count`` it is not timed but counted, fsyncs in figures."""
    with tempfile.TemporaryDirectory(dir=directory, prefix="row-") as name:
        place = Path(name)
        command = [sys.executable, str(RUN), "--one", row.name]
        command += ["--messages", str(messages), "--dir", name]
        log = place / "strace.log"
        if count:
            command.append("--count")
            if counting.can_trace():
                command = counting.traced(command, log)
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise RowFailed(f"{row.name}: not done after {TIMEOUT_S} s") from None
        if done.returncode != 0:
            raise RowFailed(f"{row.name}: {done.stderr.strip()[-2000:]}")
        sample = Sample(**json.loads(done.stdout.splitlines()[-1]))
        if count and log.exists():
            synced = counting.fsyncs(log, START_MARK, STOP_MARK)
            if synced is not None:
                sample.figures["fsyncs"] = synced
        return sample


def here(row: Row, messages: int, directory: Path, *, count: bool) -> None:
    """What the fresh process does: run the row and print the sample."""
    if count:
        counting.count_commits()
    sample = row.run(directory, messages)
    print(json.dumps(asdict(sample)))

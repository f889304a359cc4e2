"""The writes and syncs of a process, as strace saw them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CALLS = "openat,write,pwrite64,pwritev,pwritev2,ftruncate,fallocate,fsync,fdatasync,unlink,rename"
# What SQLite keeps; its shared memory is no file after a power loss.
NAMES = ("duly.db", "duly.db-wal", "duly.db-journal")


@dataclass
class Inode:
    """One file, under whatever name; made anew it is another one."""

    number: int
    name: str


@dataclass
class Write:
    """Bytes written, or with ``cut`` the file's new length."""

    inode: int
    began: int
    ended: int
    offset: int
    data: bytes
    cut: bool = False


@dataclass
class Sync:
    """Everything written to this file before it began is on the disk when it has ended.

    ``inode`` None: the directory, which holds the names.
    """

    inode: int | None
    began: int
    ended: int


@dataclass
class Name:
    """A name given to a file, or taken away."""

    name: str
    inode: int | None
    began: int
    ended: int


@dataclass
class Recording:
    """Everything that happened to the files, with the lines of the journal in between.

    Moments are line numbers of the trace.
    """

    writes: list[Write] = field(default_factory=list)
    syncs: list[Sync] = field(default_factory=list)
    names: list[Name] = field(default_factory=list)
    notes: list[tuple[int, str, int]] = field(default_factory=list)
    end: int = 0

    def noted(self, what: str, moment: int) -> set[int]:
        """The numbers that the process had told the world about until then."""
        return {n for ended, noted, n in self.notes if noted == what and ended <= moment}


def record(folder: Path, orders: dict[str, Any], root: Path) -> Recording:
    """Run a process of the test's program in this folder under strace."""
    folder.mkdir()
    trace = folder.with_suffix(".trace")
    told = {"folder": str(folder), "log": str(folder / "log"), **orders}
    ended = subprocess.run(
        [
            *("strace", "-f", "-qq", "-y", "-xx", "-s", "10000000"),
            *("-e", f"trace={CALLS}", "-e", "signal=none", "-o", str(trace)),
            *(sys.executable, "-m", "tests.faults.program", json.dumps(told)),
        ],
        cwd=root,
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr.decode()
    return Reader(folder).read(trace)


_WHOLE = re.compile(r"(\d+) +(\w+)\((.*)\) += (-?\d+)")
_BEGUN = re.compile(r"(\d+) +(\w+)\((.*) <unfinished \.\.\.>")
_ENDED = re.compile(r"(\d+) +<\.\.\. (\w+) resumed>.*\) += (-?\d+)")
_FD = re.compile(r"\d+<([^>]*)>")
_STRING = re.compile(r'"([^"]*)"')


@dataclass(frozen=True)
class Call:
    """A call that succeeded."""

    name: str
    arguments: str
    began: int
    ended: int

    @property
    def path(self) -> str:
        """The file it is about: that of its descriptor, or its name."""
        if self.name in ("openat", "unlink", "rename"):
            found = _STRING.search(self.arguments)
        else:
            found = _FD.search(self.arguments)
        return "" if found is None else unhex(found.group(1)).decode(errors="replace")

    @property
    def data(self) -> bytes:
        """The bytes it was given."""
        found = _STRING.search(self.arguments)
        assert found is not None
        return unhex(found.group(1))


def unhex(text: str) -> bytes:
    """Bytes as ``strace -xx`` writes them."""
    return bytes.fromhex(text.replace("\\x", "")) if text.startswith("\\x") else text.encode()


def calls(trace: Path) -> Iterator[Call]:
    """The calls of a trace that succeeded, in the order in which they ended."""
    begun: dict[str, tuple[str, str, int]] = {}
    with trace.open() as lines:
        for number, line in enumerate(lines):
            if whole := _WHOLE.match(line):
                _, name, arguments, result = whole.groups()
                if int(result) >= 0:
                    yield Call(name, arguments, number, number)
            elif start := _BEGUN.match(line):
                thread, name, arguments = start.groups()
                begun[thread] = name, arguments, number
            elif end := _ENDED.match(line):
                thread, name, result = end.groups()
                _, arguments, began = begun.pop(thread)
                if int(result) >= 0:
                    yield Call(name, arguments, began, number)


class Reader:
    """Follows names and files through a trace."""

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)
        self._recording = Recording()
        self._there: dict[str, int] = {}
        self._count = 0

    def read(self, trace: Path) -> Recording:
        for call in calls(trace):
            self._take(call)
            self._recording.end = call.ended
        return self._recording

    def _take(self, call: Call) -> None:
        path = call.path
        if path == self._folder and call.name in ("fsync", "fdatasync"):
            self._recording.syncs.append(Sync(None, call.began, call.ended))
            return
        folder, _, name = path.rpartition("/")
        if folder != self._folder:
            return
        if name == "journal" and call.name == "write":
            what, n, _ = call.data.decode().split()
            self._recording.notes.append((call.ended, what, int(n)))
        if name in NAMES:
            self._take_file(call, name)

    def _take_file(self, call: Call, name: str) -> None:
        recording, began, ended = self._recording, call.began, call.ended
        if call.name == "openat":
            if name not in self._there:
                assert "O_CREAT" in call.arguments, call
                self._there[name] = self._count
                self._count += 1
                recording.names.append(Name(name, self._there[name], began, ended))
            return
        inode = self._there[name]
        if call.name == "unlink":
            del self._there[name]
            recording.names.append(Name(name, None, began, ended))
        elif call.name in ("fsync", "fdatasync"):
            recording.syncs.append(Sync(inode, began, ended))
        elif call.name == "pwrite64":
            offset = int(call.arguments.rpartition(", ")[2])
            recording.writes.append(Write(inode, began, ended, offset, call.data))
        elif call.name == "ftruncate":
            length = int(call.arguments.rpartition(", ")[2])
            recording.writes.append(Write(inode, began, ended, length, b"", cut=True))
        else:
            raise AssertionError(f"a call that images are not built from: {call.name}")

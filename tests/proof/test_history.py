"""The recorder loses no finished record, and what it wrote can be read from many files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from duly.testing.history import (
    Claim,
    Commit,
    DamagedHistory,
    Event,
    Fault,
    Final,
    Publish,
    Read,
    Recorder,
    Row,
    read_history,
)
from tests.proof.story import message


def test_what_was_recorded_is_read(tmp_path: Path) -> None:
    written: list[Event] = [
        Publish(1.0, "p", "invoke", message("a", key="k")),
        Claim(2.0, "w", "ok", "c", "token", message("a"), attempt=2, repeated=True),
        Commit(3.0, "w", "info", "tx1"),
        Read(4.0, "r", Final(rows=(Row("one", message("a"), "run1"),))),
    ]
    with Recorder(tmp_path, "w") as recorder:
        for event in written:
            recorder.record(event)
        assert read_history([recorder.path]) == written


def test_files_of_many_processes_are_one_history(tmp_path: Path) -> None:
    with Recorder(tmp_path, "w") as one, Recorder(tmp_path, "w") as two:
        for at in range(10):
            (one if at % 2 else two).record(Fault(float(at), "w", "crash"))
    assert [event.at for event in read_history(tmp_path.iterdir())] == list(range(10))


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    with Recorder(tmp_path, "w") as recorder:
        recorder.record(Fault(1.0, "w", "crash"))
        recorder.record(Fault(2.0, "w", "crash"))
    whole = recorder.path.read_bytes()
    for length in range(len(whole.splitlines(keepends=True)[0]), len(whole) - 1):
        recorder.path.write_bytes(whole[:length])
        assert [event.at for event in read_history([recorder.path])] == [1.0]
    recorder.path.write_bytes(whole[:-1])
    assert len(read_history([recorder.path])) == 2, "only its line end is missing"


def test_a_damaged_line_is_not_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "w.jsonl"
    file.write_bytes(b'{"event":"fault","at":1.0,"who"\n{"event":"heal","at":2.0,"who":"w"}\n')
    with pytest.raises(DamagedHistory, match=r"w\.jsonl:1"):
        read_history([file])


def test_kill_9_loses_no_finished_record(tmp_path: Path) -> None:
    program = (
        "import sys, itertools\n"
        "from pathlib import Path\n"
        "from duly.testing.history import Recorder, Fault\n"
        "recorder = Recorder(Path(sys.argv[1]), 'w')\n"
        "for n in itertools.count():\n"
        "    recorder.record(Fault(float(n), 'w', 'crash'))\n"
        "    print(n, flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= 200:
                break
        os.kill(process.pid, signal.SIGKILL)
        said = [int(line) for line in process.stdout.read().splitlines() if line]
    last = max([200, *said[:-1]])
    assert len(read_history(tmp_path.iterdir())) > last

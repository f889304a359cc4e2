"""What becomes of worker processes, whatever happens to them or to their supervisor."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from duly.supervisor import CUT_OFF, DRAINED, REFUSED
from tests.supervisor.conftest import Start
from tests.waiting import alive, eventually


def test_a_signal_drains_every_worker(supervise: Start):
    running = supervise(processes=3)
    workers = running.await_pids("started", 3)
    running.send(signal.SIGTERM)
    status, _, err = running.ended()
    assert status == DRAINED, err
    assert sorted(running.pids("ended")) == sorted(workers)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_the_other_signals_that_stop(supervise: Start, number: int):
    running = supervise()
    running.await_pids("started", 1)
    running.send(number)
    assert running.ended()[0] == DRAINED
    assert len(running.pids("ended")) == 1


def test_a_killed_worker_is_started_again(supervise: Start):
    running = supervise(processes=2)
    first = running.await_pids("started", 2)
    os.kill(first[0], signal.SIGKILL)
    running.await_pids("started", 3)
    assert alive(first[1])
    running.send(signal.SIGTERM)
    status, _, err = running.ended()
    assert status == DRAINED
    assert f"pid {first[0]}) was killed by SIGKILL" in err


def test_a_worker_that_keeps_dying_is_started_ever_more_slowly(supervise: Start):
    running = supervise("dies-at-once", first_backoff_s=0.01, longest_backoff_s=0.08)
    running.await_pids("started", 6)
    running.send(signal.SIGTERM)
    _, _, err = running.ended()
    waits = [float(wait) for wait in re.findall(r"another starts in ([\d.]+) s", err)]
    assert waits[:5] == [0.01, 0.02, 0.04, 0.08, 0.08]


def test_a_worker_that_dies_at_work_is_not_waited_for_long(supervise: Start):
    running = supervise(first_backoff_s=0.01, longest_at_work_s=0.02)
    for round_ in range(1, 5):
        pid = running.await_pids("ready", round_)[-1]
        os.kill(pid, signal.SIGKILL)
    running.await_pids("started", 5)
    running.send(signal.SIGTERM)
    _, _, err = running.ended()
    waits = [float(wait) for wait in re.findall(r"another starts in ([\d.]+) s", err)]
    assert waits == [0.01, 0.02, 0.02, 0.02]


def test_having_worked_well_for_a_while_forgives_earlier_deaths(supervise: Start):
    running = supervise(first_backoff_s=0.01, healthy_s=0.0)
    for round_ in range(1, 4):
        pid = running.await_pids("ready", round_)[-1]
        os.kill(pid, signal.SIGKILL)
    running.await_pids("started", 4)
    running.send(signal.SIGTERM)
    _, _, err = running.ended()
    assert set(re.findall(r"another starts in ([\d.]+) s", err)) == {"0.01"}


def test_a_stopped_worker_is_killed_and_replaced(supervise: Start):
    running = supervise(silence_s=2.0)
    (pid,) = running.await_pids("ready", 1)
    os.kill(pid, signal.SIGSTOP)
    running.await_pids("started", 2)
    assert not alive(pid)
    running.send(signal.SIGTERM)
    status, _, err = running.ended()
    assert status == DRAINED
    assert f"pid {pid}) is silent" in err


def test_a_worker_that_never_gets_ready_is_killed(supervise: Start):
    running = supervise("never-ready", start_s=3.0)
    first, _ = running.await_pids("started", 2)[:2]
    assert not alive(first)


def test_a_worker_that_is_still_starting_is_no_work_cut_off(supervise: Start):
    running = supervise("never-ready")
    running.await_pids("importing", 1)
    running.send(signal.SIGTERM)
    assert running.ended()[0] == DRAINED


def test_a_worker_that_hangs_as_it_starts_is_not_waited_for(supervise: Start):
    running = supervise("hangs-at-start", processes=2, drain_s=600.0, starting_drain_s=0.2)
    workers = running.await_pids("importing", 2)
    running.send(signal.SIGTERM)
    status, _, err = running.ended()
    assert status == DRAINED, "nothing was cut off"
    assert err.count("did not drain") == 2
    assert not any(alive(pid) for pid in workers)


def test_one_that_works_is_waited_for_beside_it(supervise: Start):
    running = supervise("slow-drain", "odd-hangs", processes=2, drain_s=600.0, starting_drain_s=0.2)
    running.await_pids("importing", 1)
    (works,) = running.await_pids("ready", 1)
    running.send(signal.SIGTERM)
    assert running.ended()[0] == DRAINED
    assert running.pids("ended") == [works]


def test_a_stopped_supervisor_does_not_take_its_workers_for_hung(supervise: Start):
    running = supervise(silence_s=2.0)
    (pid,) = running.await_pids("ready", 1)
    running.send(signal.SIGSTOP)
    # Long enough to take the worker for silent; but its beats lie in the socket.
    with pytest.raises(AssertionError):
        eventually(lambda: not alive(pid), "gone", timeout_s=3.0)
    running.send(signal.SIGCONT)
    running.send(signal.SIGTERM)
    status, _, err = running.ended()
    assert status == DRAINED
    assert "silent" not in err
    assert running.pids("started") == [pid]


def test_what_does_not_drain_in_time_is_killed(supervise: Start):
    running = supervise("hangs-in-drain", processes=2, drain_s=0.5)
    workers = running.await_pids("ready", 2)
    running.send(signal.SIGTERM)
    status, _, err = running.ended()
    assert status == CUT_OFF
    assert not any(alive(pid) for pid in workers)
    assert err.count("did not drain") == 2


def test_a_second_signal_stops_at_once(supervise: Start):
    running = supervise("hangs-in-drain", processes=2, drain_s=600.0)
    workers = running.await_pids("ready", 2)
    running.send(signal.SIGINT)
    running.await_pids("draining", 2)
    running.send_again(signal.SIGINT)
    status, _, _ = running.ended()
    assert status == 128 + signal.SIGINT
    assert not any(alive(pid) for pid in workers)


def test_the_same_signal_to_process_and_group_is_one_wish(supervise: Start):
    running = supervise("slow-drain", drain_s=600.0)
    running.await_pids("ready", 1)
    running.send(signal.SIGTERM)
    running.send(signal.SIGTERM)
    status, _, err = running.ended()
    assert status == DRAINED, err


def test_a_stopped_worker_is_woken_to_drain(supervise: Start):
    running = supervise(silence_s=600.0)
    (pid,) = running.await_pids("ready", 1)
    os.kill(pid, signal.SIGSTOP)
    running.send(signal.SIGTERM)
    assert running.ended()[0] == DRAINED
    assert running.pids("ended") == [pid]


def test_workers_drain_when_their_supervisor_is_killed(supervise: Start):
    running = supervise(processes=2)
    workers = running.await_pids("ready", 2)
    running.send(signal.SIGKILL)
    running.await_pids("ended", 2)
    eventually(lambda: not any(alive(pid) for pid in workers), "no orphans", running.describe)
    assert sorted(running.pids("orphaned")) == sorted(workers)


def test_a_worker_that_is_still_starting_ends_with_its_supervisor(supervise: Start):
    running = supervise("never-ready")
    (pid,) = running.await_pids("started", 1)
    running.send(signal.SIGKILL)
    eventually(lambda: not alive(pid), "no orphans", running.describe)


@pytest.mark.parametrize("end", ["killed", "drained", "stopped at once"])
def test_what_a_handler_started_ends_with_its_worker(supervise: Start, end: str):
    running = supervise("has-child", "hangs-in-drain", drain_s=0.5 if end == "drained" else 600)
    (pid,) = running.await_pids("started", 1)
    (child,) = running.await_pids("child", 1)
    if end == "killed":
        os.kill(pid, signal.SIGKILL)
    else:
        running.send(signal.SIGTERM)
        if end == "stopped at once":
            running.await_pids("draining", 1)
            running.send_again(signal.SIGTERM)
    eventually(lambda: not alive(child), "the handler's child is gone", running.describe)


@pytest.mark.parametrize("behaviour", ["refuses", "exits-2"])
def test_a_refusal_is_said_once_and_nothing_is_started_again(supervise: Start, behaviour: str):
    running = supervise(behaviour, processes=3)
    status, out, _ = running.ended()
    assert status == REFUSED
    assert len(running.pids("started")) <= 3
    if behaviour == "refuses":
        assert out == "this broker cannot keep it.\nRemedy: another.\n"
    else:
        assert "exited with status 2 before it was ready" in out


def test_what_workers_write_arrives_in_whole_lines(supervise: Start):
    running = supervise("writes", processes=2, show=True)
    running.await_pids("ready", 2)
    running.send(signal.SIGTERM)
    _, out, _ = running.ended()
    assert out == "half a line, and its end\n" * 2


def test_ctrl_c_on_a_terminal_reaches_the_supervisor_only(supervise: Start):
    running = supervise()
    (pid,) = running.await_pids("started", 1)
    assert os.getpgid(pid) == pid != os.getpgid(running.process.pid)


def test_a_worker_that_hangs_while_nobody_supervises_is_ended_by_the_kernel(supervise: Start):
    running = supervise()
    (pid,) = running.await_pids("ready", 1)
    caught = next(
        int(line.split()[1], 16)
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("SigCgt")
    )
    # SIGALRM is not caught, and a timer for it is running: its default action ends the process.
    assert not caught & (1 << (signal.SIGALRM - 1))
    os.kill(pid, signal.SIGALRM)
    running.await_pids("started", 2)
    assert not alive(pid)


def test_a_worker_that_cannot_be_started_does_not_end_the_others(supervise: Start, tmp_path: Path):
    program = tmp_path / "run"
    program.write_text('#!/bin/sh\nexec "$@"\n')
    program.chmod(0o755)
    running = supervise(processes=2, run_by=[str(program)], longest_backoff_s=0.1)
    first, second = running.await_pids("ready", 2)
    program.rename(tmp_path / "gone")
    os.kill(first, signal.SIGKILL)
    eventually(lambda: not alive(first), "one is dead", running.describe)
    # Long enough for it to have been tried in vain.
    with pytest.raises(AssertionError):
        eventually(lambda: running.process.poll() is not None, "ended", timeout_s=1.0)
    assert alive(second)
    (tmp_path / "gone").rename(program)
    running.await_pids("ready", 3)
    running.send(signal.SIGTERM)
    status, _, err = running.ended()
    assert status == DRAINED
    assert "worker 1 cannot be started" in err or "worker 2 cannot be started" in err

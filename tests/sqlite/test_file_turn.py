"""The turn to write: fair beside a busy holder, bounded in time, freed by death."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from duly.errors import BrokerUnavailable
from duly.sql.sqlite import Turn
from tests.sqlite.programs import count, run, running
from tests.waiting import eventually

BUSY = """
    import sys, time
    from pathlib import Path
    from duly.sql.sqlite import Turn

    turn, log = Turn(Path(sys.argv[1])), open(sys.argv[2], "ab", buffering=0)
    print("busy")
    while True:
        turn.acquire(10)
        log.write(b".")
        end = time.monotonic() + 0.005
        while time.monotonic() < end:
            pass
        turn.release()
"""

HOLD = """
    import sys
    from pathlib import Path
    from duly.sql.sqlite import Turn

    turn = Turn(Path(sys.argv[1]))
    turn.acquire(10)
    print("held")
    sys.stdin.readline()
    turn.release()
    print("released")
    sys.stdin.readline()
"""


def test_threads_of_one_process_exclude_each_other(tmp_path: Path):
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        turn = Turn(tmp_path)
        for _ in range(50):
            turn.acquire(10)
            inside += 1
            most = max(most, inside)
            inside -= 1
            turn.release()
        turn.close()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def others_turn_after(counted: Path, had: int) -> None:
    eventually(lambda: count(counted) > had, "the busy process has its turn")


def test_a_waiter_waits_one_or_two_turns_of_a_busy_process(tmp_path: Path):
    counted = tmp_path / "turns"
    turn = Turn(tmp_path)
    waited: list[int] = []
    with running(BUSY, tmp_path, counted) as busy:
        busy.expect("busy")
        for _ in range(60):
            before = count(counted)
            turn.acquire(10)
            waited.append(count(counted) - before)
            had = count(counted)
            turn.release()
            others_turn_after(counted, had)
    turn.close()
    # But where this thread was kept from a core between its look and its place in the queue.
    assert sorted(waited)[-10] <= 2, waited


def test_three_waiters_beside_a_busy_process_all_get_their_turns(tmp_path: Path):
    counted = tmp_path / "turns"
    waited: list[int] = []

    def work() -> None:
        turn = Turn(tmp_path)
        for _ in range(20):
            before = count(counted)
            turn.acquire(10)
            waited.append(count(counted) - before)
            turn.release()
        turn.close()

    with running(BUSY, tmp_path, counted) as busy:
        busy.expect("busy")
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(waited) == 60
    # Each of the three may wait for the busy one between the others' turns; and now and then one
    # is kept from a core between its look and its place in the queue.
    assert sorted(waited)[-10] <= 8, sorted(waited)


def test_the_turn_of_a_killed_process_is_free_at_once(tmp_path: Path):
    with running(HOLD, tmp_path) as holder:
        holder.expect("held")
        turn = Turn(tmp_path)
        with pytest.raises(BrokerUnavailable):
            turn.acquire(0.05)
        holder.kill()
        turn.acquire(10)
        turn.close()


def test_a_turn_that_does_not_come_names_the_holder_and_says_what_to_do(tmp_path: Path):
    with running(HOLD, tmp_path) as holder:
        holder.expect("held")
        turn = Turn(tmp_path)
        began = time.monotonic()
        with pytest.raises(BrokerUnavailable) as error:
            turn.acquire(0.1)
        assert time.monotonic() - began < 5
        assert f"process {holder.pid}" in str(error.value)
        assert "Nothing was changed" in str(error.value)
        assert "end it" in str(error.value)
        turn.close()


def test_a_turn_that_comes_after_its_waiter_gave_up_is_passed_on(tmp_path: Path):
    with running(HOLD, tmp_path) as holder:
        holder.expect("held")
        patient, late = Turn(tmp_path), Turn(tmp_path)
        with pytest.raises(BrokerUnavailable):
            late.acquire(0.05)
        holder.tell("")
        holder.expect("released")
        patient.acquire(10)
        patient.release()
        late.acquire(10)
        late.release()
        patient.acquire(10)
        patient.close()
        late.close()


def test_giving_up_and_asking_again_keeps_the_place_in_line(tmp_path: Path):
    with running(HOLD, tmp_path) as holder:
        holder.expect("held")
        turn = Turn(tmp_path)
        for _ in range(3):
            with pytest.raises(BrokerUnavailable):
                turn.acquire(0.02)
        holder.tell("")
        turn.acquire(10)
        turn.close()


def test_closing_while_waiting_leaves_nothing_held(tmp_path: Path):
    with running(HOLD, tmp_path) as holder:
        holder.expect("held")
        turn = Turn(tmp_path)
        with pytest.raises(BrokerUnavailable):
            turn.acquire(0.02)
        turn.close()
        holder.tell("")
        holder.expect("released")
        other = Turn(tmp_path)
        other.acquire(10)
        other.close()


def test_a_forked_child_is_told_so_and_does_not_keep_its_dead_parents_turn(tmp_path: Path):
    forker = """
        import os, sys
        from pathlib import Path
        from duly.errors import ConfigurationError
        from duly.sql.sqlite import Turn

        turn = Turn(Path(sys.argv[1]))
        turn.acquire(10)
        if os.fork() == 0:
            try:
                turn.acquire(1)
            except ConfigurationError as error:
                os.write(1, f"{'fork()' in str(error)}\\n".encode())
            sys.stdin.readline()
            os._exit(0)
        os.write(1, b"parent\\n")  # print() could mix the lines of the two
        os.kill(os.getpid(), 9)
    """
    with running(forker, tmp_path) as forked:
        assert {forked.line(), forked.line()} == {"parent", "True"}
        turn = Turn(tmp_path)
        turn.acquire(10)  # the child lives on and has a share of the open files
        turn.close()
        forked.tell("")


def test_the_uncontended_turn_costs_microseconds(tmp_path: Path):
    [took_us] = run(
        """
        import sys, time
        from pathlib import Path
        from duly.sql.sqlite import Turn

        turn, best = Turn(Path(sys.argv[1])), 1e9
        for _ in range(20):
            began = time.process_time()
            for _ in range(200):
                turn.acquire(1)
                turn.release()
            best = min(best, time.process_time() - began)
        print(best / 200 * 1e6)
        """,
        tmp_path,
    )
    assert float(took_us) < 20

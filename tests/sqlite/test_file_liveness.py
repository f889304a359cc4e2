"""Who is alive, and time that no clock step moves."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from duly.sql.sqlite import WorkerLock, boot_id, boot_ms, is_alive
from duly.sql.sqlite.liveness import clean
from tests.sqlite.programs import running

WORK = """
    import sys
    from pathlib import Path
    from duly.sql.sqlite import WorkerLock

    lock = WorkerLock.create(Path(sys.argv[1]))
    print(lock.id)
    sys.stdin.readline()
"""


def test_a_worker_is_alive_until_it_is_killed(tmp_path: Path):
    with running(WORK, tmp_path) as worker:
        id = worker.line()
        assert is_alive(tmp_path, id)
        assert is_alive(tmp_path, id), "looking must not change it"
        worker.kill()
        assert not is_alive(tmp_path, id)


def test_a_stopped_worker_is_alive(tmp_path: Path):
    import signal

    with running(WORK, tmp_path) as worker:
        id = worker.line()
        worker.signal(signal.SIGSTOP)
        assert is_alive(tmp_path, id)


def test_this_process_is_alive_to_itself_until_it_closes(tmp_path: Path):
    lock = WorkerLock.create(tmp_path)
    assert is_alive(tmp_path, lock.id)
    lock.close()
    assert not is_alive(tmp_path, lock.id)
    assert not list((tmp_path / "workers").iterdir())


def test_every_start_has_an_identity_of_its_own(tmp_path: Path):
    locks = [WorkerLock.create(tmp_path) for _ in range(20)]
    assert len({lock.id for lock in locks}) == 20
    for lock in locks:
        lock.close()


def test_who_was_never_there_is_dead(tmp_path: Path):
    WorkerLock.create(tmp_path).close()
    assert not is_alive(tmp_path, "nobody")


def test_files_of_the_dead_are_removed_and_those_of_the_living_are_not(tmp_path: Path):
    with running(WORK, tmp_path) as living:
        kept = living.line()
        with running(WORK, tmp_path) as dead:
            gone = dead.line()
            dead.kill()
        mine = WorkerLock.create(tmp_path)
        names = {path.name for path in (tmp_path / "workers").iterdir()}
        assert names == {kept, mine.id}
        assert gone not in names
        mine.close()


def test_cleaning_beside_starting_workers_removes_no_living_one(tmp_path: Path):
    WorkerLock.create(tmp_path).close()
    stop = threading.Event()

    def clean_on() -> None:
        while not stop.is_set():
            clean(tmp_path)

    cleaner = threading.Thread(target=clean_on)
    cleaner.start()
    try:
        for _ in range(300):
            lock = WorkerLock.create(tmp_path)
            assert is_alive(tmp_path, lock.id)
            lock.close()
    finally:
        stop.set()
        cleaner.join()


def test_a_forked_child_does_not_keep_its_dead_parent_alive(tmp_path: Path):
    forker = """
        import os, sys
        from pathlib import Path
        from duly.sql.sqlite import WorkerLock

        lock = WorkerLock.create(Path(sys.argv[1]))
        if os.fork() == 0:
            os.write(1, b"child\\n")
            sys.stdin.readline()
            os._exit(0)
        os.write(1, f"{lock.id}\\n".encode())  # print() could mix the lines of the two
        sys.stdin.readline()
    """
    with running(forker, tmp_path) as parent:
        said = {parent.line(), parent.line()}
        [id] = said - {"child"}
        assert is_alive(tmp_path, id)
        parent.kill()
        assert not is_alive(tmp_path, id)


def test_time_since_boot_grows_and_the_boot_has_a_name():
    began = boot_ms()
    assert boot_ms() >= began > 0
    assert boot_id() == boot_id() != ""
    assert os.getpid() > 0

"""Who is alive: each worker process holds a lock on a file of its own, and a clock for leases.

A dead process is known at once, because the kernel frees its lock; a pid could have been given
to another. Leases run on time since boot, which no clock step moves and which goes on while
the machine sleeps; after a reboot `boot_id` differs and every lease of before is over.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from pathlib import Path

_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def boot_ms() -> int:
    """Milliseconds since boot. Comparable between processes while `boot_id` is the same."""
    return time.clock_gettime_ns(_CLOCK) // 1_000_000


def boot_ns() -> int:
    """The same in nanoseconds."""
    return time.clock_gettime_ns(_CLOCK)


def boot_id() -> str:
    """A name for this run of the machine."""
    return _BOOT_ID


def _read_boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        # Without it the time of boot serves, to ten seconds so that clock drift is no reboot.
        return f"booted-{int((time.time() - time.clock_gettime(_CLOCK)) / 10)}"


_BOOT_ID = _read_boot_id()


class WorkerLock:
    """This process start's identity for one database file; alive while it is open.

    A forked child shares nothing of it: its parent's identity ends with the parent.
    """

    def __init__(self, id: str, fd: int, path: Path) -> None:
        self.id = id
        self._fd = fd
        self._path = path
        self._pid = os.getpid()
        _held[fd] = self

    @classmethod
    def create(cls, folder: Path) -> WorkerLock:
        """A new identity under ``folder``; removes the files of dead workers on the way."""
        workers = _workers(folder)
        workers.mkdir(mode=0o700, exist_ok=True)
        clean(folder)
        while True:
            id = f"{os.getpid()}-{secrets.token_hex(8)}"
            path = workers / id
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX)
            if os.fstat(fd).st_nlink:
                return cls(id, fd, path)
            os.close(fd)  # another process cleaned it away before the lock was on it

    def close(self) -> None:
        """This worker is no more."""
        if self._fd >= 0 and os.getpid() == self._pid:
            self._path.unlink(missing_ok=True)
            del _held[self._fd]
            os.close(self._fd)
            self._fd = -1


def is_alive(folder: Path, id: str) -> bool:
    """Whether the process start that this identity names still runs."""
    try:
        fd = os.open(_workers(folder) / id, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        # Shared, so that two who look at the same time do not take each other for the worker.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def living(folder: Path) -> list[str]:
    """The identities of the process starts that still run."""
    workers = _workers(folder)
    there = sorted(path.name for path in workers.iterdir()) if workers.is_dir() else []
    return [id for id in there if is_alive(folder, id)]


def clean(folder: Path) -> None:
    """Remove the files of dead workers."""
    for path in _workers(folder).iterdir():
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Under its lock, so that a worker that is just starting sees that its file is gone.
            path.unlink(missing_ok=True)
        except BlockingIOError:
            pass
        finally:
            os.close(fd)


def _workers(folder: Path) -> Path:
    return folder / "workers"


_held: dict[int, WorkerLock] = {}


def _forget_after_fork() -> None:
    # A child that kept the open file would keep its dead parent alive in everyone's eyes.
    for fd, lock in list(_held.items()):
        os.close(fd)
        lock._fd = -1
    _held.clear()


os.register_at_fork(after_in_child=_forget_after_fork)

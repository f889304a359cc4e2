"""A worker that is told by its command line how to behave, for tests of the supervisor.

    python worker.py JOURNAL BEHAVIOUR...

It writes one line to JOURNAL at each turn: ``started PID``, ``ready PID``, ``draining PID``,
``ended PID``, ``orphaned PID``. What it starts as a child of its own writes ``child PID``.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from duly.supervisor import SLOT_VARIABLE, Lifeline

JOURNAL = Path(sys.argv[1])
BEHAVIOUR = set(sys.argv[2:])


def note(what: str) -> None:
    line = f"{what} {os.getpid()}\n".encode()
    fd = os.open(JOURNAL, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, line)
    os.close(fd)


def main() -> int:
    # A pipe that the interpreter itself writes to: a handler in Python might run only after the
    # read below has begun to wait, and then not before it ends.
    ended, end = os.pipe()
    os.set_blocking(end, False)
    signal.set_wakeup_fd(end)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    lifeline = Lifeline.from_environment()
    assert lifeline is not None
    note("started")

    def orphaned() -> None:
        note("orphaned")
        if "never-ready" in BEHAVIOUR:
            os._exit(1)
        os.write(end, b".")

    lifeline.start(orphaned)
    if "refuses" in BEHAVIOUR:
        lifeline.refuse("this broker cannot keep it.\nRemedy: another.")
        return 2
    if "exits-2" in BEHAVIOUR:
        return 2
    if "dies-at-once" in BEHAVIOUR:
        return 1
    hang_at_start()
    if "has-child" in BEHAVIOUR:
        program = "import os, sys; print('child', os.getpid(), flush=True); sys.stdin.read()"
        with JOURNAL.open("a") as out:
            subprocess.Popen([sys.executable, "-c", program], stdout=out, stdin=hold_open())
    if "writes" in BEHAVIOUR:
        os.write(1, b"half a line, ")
        os.write(1, b"and its end\n")
    lifeline.ready(lambda: {"billing": {"handled": 7}})
    note("ready")
    os.read(ended, 1)
    note("draining")
    if "hangs-in-drain" in BEHAVIOUR:
        threading.Event().wait()
    if "slow-drain" in BEHAVIOUR:
        threading.Event().wait(1.0)
    note("ended")
    return 0


def hang_at_start() -> None:
    """Get no further, where that is wanted."""
    if "never-ready" in BEHAVIOUR:
        # Still importing: nothing has been told yet what a signal means.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        note("importing")
        threading.Event().wait()
    odd = "odd-hangs" in BEHAVIOUR and int(os.environ[SLOT_VARIABLE]) % 2
    if "hangs-at-start" in BEHAVIOUR or odd:
        note("importing")
        while True:  # whatever it is told
            threading.Event().wait()


def hold_open() -> int:
    """A pipe whose writing end stays open here, so that a reader never sees its end."""
    read, write = os.pipe()
    # Inherited on purpose: the child keeps it open for itself, whatever becomes of this process.
    os.set_inheritable(write, True)
    return read


if __name__ == "__main__":
    sys.exit(main())

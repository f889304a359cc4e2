"""The demonstration's worker processes: ``python -m duly.demo.crew PROCESSES`` supervises them.

The supervisor is the one of ``duly run``; only its patience differs. There a process that keeps
dying young is started again ever later, here somebody kills them on purpose.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from duly import logs
from duly.demo.evidence import DATABASE
from duly.demo.shop import FOLDER_VARIABLE
from duly.errors import DulyError
from duly.supervisor import Patience, Supervisor

PATIENCE = Patience(drain_s=20.0, first_backoff_s=0.05, longest_backoff_s=0.2)
LOG = "workers.log"
APP = "duly.demo.shop:app"


def url(folder: Path) -> str:
    """The shop's broker in this folder."""
    return f"sqlite:///{quote(str(folder / DATABASE))}"


class CrewFailed(DulyError):
    """The worker processes could not be started, or ended by themselves."""


class Crew:
    """The supervisor's process, as seen by the one that publishes and kills."""

    def __init__(self, folder: Path, process: subprocess.Popen[bytes]) -> None:
        self._folder = folder
        self._process = process

    def check(self) -> None:
        """Raise `CrewFailed` when nobody is working any more."""
        if self._process.poll() is not None:
            said = (self._folder / LOG).read_text(encoding="utf-8", errors="replace")
            last = "\n".join(said.splitlines()[-15:])
            raise CrewFailed(f"the workers are gone (status {self._process.returncode}):\n{last}")

    def stop(self) -> None:
        """Drain the workers and wait for their end."""
        self._process.terminate()
        self._process.wait(PATIENCE.drain_s + 10.0)

    def end(self) -> None:
        """Leave nothing running, however far things have got."""
        until = time.monotonic() + 10.0
        while self._process.poll() is None:
            # The first signal drains, the second stops at once.
            if time.monotonic() < until:
                self._process.terminate()
            else:
                self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.2)


@contextlib.contextmanager
def crew(folder: Path, processes: int) -> Iterator[Crew]:
    """Workers of the shop in ``folder`` while this lasts; none is left afterwards."""
    with (folder / LOG).open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "duly.demo.crew", str(processes)],
            # Its end tells the crew that this process is dead, whatever killed it.
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env={
                **os.environ,
                "DULY_BROKER": url(folder),
                FOLDER_VARIABLE: str(folder),
            },
            # Ctrl-C is for the parent, which then ends the crew in its own order.
            process_group=0,
        )
    found = Crew(folder, process)
    try:
        yield found
    finally:
        found.end()
        if process.stdin is not None:
            process.stdin.close()


def command(processes: int) -> Sequence[str]:
    """What starts one worker: exactly the process that ``duly run`` would start.

    Told by its command line and not imported, as the command line stands above this package.
    """
    orders = {
        "app": APP,
        "consumers": None,
        "drain_s": PATIENCE.drain_s / 2,
        "log_format": "human",
        "processes": processes,
    }
    return [sys.executable, "-m", "duly.cli.worker", json.dumps(orders)]


def supervise(processes: int) -> int:
    """Run the workers until SIGTERM, or until the parent is gone."""
    logs.configure("human")
    threading.Thread(target=_stop_with_parent, name="duly-demo-parent", daemon=True).start()
    return Supervisor(command(processes), processes, PATIENCE).run()


def _stop_with_parent() -> None:
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    status = supervise(int(sys.argv[1]))
    sys.stderr.flush()
    os._exit(status)

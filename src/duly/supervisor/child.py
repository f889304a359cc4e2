"""One worker process, as its supervisor sees it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from duly.supervisor.lifeline import FD_VARIABLE, SLOT_VARIABLE

READ_BYTES = 65536
# A worker that writes no line end for so long is no worker of ours.
MAX_LINE_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Report:
    """What one worker process has done since it started: consumer, and counts by name."""

    slot: int
    pid: int
    counts: Mapping[str, Mapping[str, int]]


class Child:
    """A worker process and the supervisor's end of its lifeline.

    ``heard_at`` is when it was last heard of, ``ready_at`` when it began to work (None: it is
    still starting), ``refusal`` why it cannot start at all.
    """

    def __init__(self, slot: int, command: Sequence[str], now: float, *, capture: bool) -> None:
        self.slot = slot
        self.started_at = self.heard_at = now
        self.ready_at: float | None = None
        self.refusal: str | None = None
        self.killed = False
        self.counts: Mapping[str, Mapping[str, int]] = {}
        self._buffer = b""
        self._written = b""
        self.lifeline, theirs = socket.socketpair()
        self.lifeline.setblocking(False)
        with theirs, contextlib.ExitStack() as on_failure:
            on_failure.callback(self.lifeline.close)
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if capture else None,
                stderr=subprocess.STDOUT if capture else None,
                pass_fds=(theirs.fileno(),),
                env={
                    **os.environ,
                    FD_VARIABLE: str(theirs.fileno()),
                    SLOT_VARIABLE: str(slot),
                },
                # A group of its own: Ctrl-C reaches the supervisor only, which then drains;
                # and what handlers have started can be ended together with their worker.
                process_group=0,
            )
            on_failure.pop_all()
        if self.process.stdout is not None:
            os.set_blocking(self.process.stdout.fileno(), False)

    @property
    def pid(self) -> int:
        """The process id."""
        return self.process.pid

    @property
    def output(self) -> IO[bytes] | None:
        """What it writes, where that is captured."""
        return self.process.stdout

    def hear(self, now: float) -> bool:
        """Take in what the worker said; False when it will say nothing more."""
        try:
            data = self.lifeline.recv(READ_BYTES)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._take_in(data, now)
        return bool(data) and len(self._buffer) <= MAX_LINE_BYTES

    def _take_in(self, data: bytes, now: float) -> None:
        self.heard_at = now
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            self._understand(line, now)

    def _understand(self, line: bytes, now: float) -> None:
        with contextlib.suppress(ValueError):
            said: Any = json.loads(line)
            if not isinstance(said, dict):
                return
            if said.get("ready"):
                self.ready_at = now
            if isinstance(text := said.get("refused"), str):
                self.refusal = text
            if isinstance(counts := said.get("counts"), dict):
                self.counts = counts

    def read_output(self, show: Callable[[bytes], None]) -> bool:
        """Pass on the lines the worker wrote; False when it will write nothing more."""
        if self.output is None:
            return False
        try:
            data = os.read(self.output.fileno(), READ_BYTES)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._show_lines(data, show)
        return bool(data)

    def _show_lines(self, data: bytes, show: Callable[[bytes], None]) -> None:
        # Whole lines only: two workers' halves would make one that nobody wrote.
        written = self._written + data
        end = written.rfind(b"\n") + 1
        if not data or len(written) - end > MAX_LINE_BYTES:
            end = len(written)
        self._written = written[end:]
        if end:
            show(written[:end])

    def last_words(self, now: float, show: Callable[[bytes], None]) -> None:
        """Take in all that the dead worker said and wrote."""
        with contextlib.suppress(OSError):
            while data := self.lifeline.recv(READ_BYTES):
                self._take_in(data, now)
        if self.output is not None:
            with contextlib.suppress(OSError):
                while data := os.read(self.output.fileno(), READ_BYTES):
                    self._show_lines(data, show)
            self._show_lines(b"", show)

    def drain(self) -> None:
        """Ask the worker to finish what runs, give back the rest, and end."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)
            # A stopped process would not hear of it.
            os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """End the worker at once, with all that its handlers have started."""
        self.killed = True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def reap(self) -> int | None:
        """How the process ended (negative: by which signal), None while it runs.

        What its handlers had started ends with it: their message is delivered again, and a
        second run beside the first helps nobody.
        """
        ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return None
        # Before the process is reaped: until then no other can have its number.
        self.kill()
        return self.process.wait()

    def close(self) -> None:
        """Close this end of everything; the process has ended."""
        self.lifeline.close()
        if self.output is not None:
            self.output.close()


def how_it_ended(status: int) -> str:
    """A process's end for people: ``exited with status 1``, ``was killed by SIGKILL``."""
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"

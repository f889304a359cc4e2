"""Recording what one process with many lanes and threads does."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from duly.broker import Delivery
from duly.logs import CURRENT, handling_now
from duly.store import Transaction
from duly.testing.history import About, Claim, End, Event, How, Recorder, Start, about
from duly.testing.recording import Recording, claimed, how_cancelled, message_by_message
from duly.testing.seam import Call

Perform = Callable[[Any], Any]
# Of at most some 400 bytes each.
RECORDS_A_FILE = 250
_SETTLES = ("settle", "settle in transaction")


class Recorded:
    """An `Around` for all threads of a process, and the runs of its handlers.

    A lane's calls come from one thread, so that each thread has a `Recording` of its own; what
    the threads write goes to one file.
    """

    def __init__(self, folder: Path, who: str) -> None:
        self.who = who
        self._file = _File(folder, who)
        self._threads = threading.local()
        self._numbers = itertools.count(1)
        self._transactions: dict[int, str] = {}
        # By claim. Whoever runs a handler need not be able to ask the broker again.
        self._messages: dict[str, About] = {}
        self._busy = Busy(folder.parent, who)

    def put(self, make: Callable[..., Event], *args: Any, **more: Any) -> None:
        """Record an event of this process, now."""
        self._file.record(make(Recorder.clock(), self.who, *args, **more))

    def _record(self, event: Event) -> None:
        if isinstance(event, Claim) and event.message is not None:
            self._messages[event.token] = event.message
        self._file.record(event)

    def __call__(self, call: Call, perform: Perform) -> Any:
        recording: Recording | None = getattr(self._threads, "recording", None)
        if recording is None:
            recording = Recording(self._record, Recorder.clock, self.who)
            self._threads.recording = recording
        if call.name in _SETTLES:
            given = call.given
            shown = replace(call, given=message_by_message(given))
            return recording(shown, lambda _: perform(given))
        answer = recording(call, perform)
        if call.name == "begin":
            self._transactions[id(answer.connection)] = call.tx
        return answer

    @contextmanager
    def run(self, tx: Transaction[Any] | None = None) -> Iterator[Sequence[Run]]:
        """The run of a handler, from its first line to its last: one for each message."""
        name, runs = self._begun()
        transaction = "" if tx is None else self._transactions[id(tx.connection)]
        for each in runs:
            self.put(
                Start,
                name,
                self._claim_of(each.delivery),
                each.about,
                each.name,
                each.attempt,
                transaction,
            )
        how: How = "raised"
        self._busy.begin()
        try:
            yield runs
            how = "returned"
        except asyncio.CancelledError:
            how = how_cancelled()
            raise
        finally:
            self._busy.end()
            for each in runs:
                self.put(End, each.name, how)

    def _begun(self) -> tuple[str, list[Run]]:
        handling = CURRENT.get()
        assert handling is not None, "a handler runs in a lane"
        name, given = handling_now(handling)
        deliveries: Sequence[Delivery] = (given,) if isinstance(given, Delivery) else given
        return name, [
            Run(
                f"{self.who}.{next(self._numbers)}",
                each,
                self._messages.get(self._claim_of(each)) or about(each.message),
            )
            for each in deliveries
        ]

    def _claim_of(self, delivery: Delivery) -> str:
        return claimed(delivery.receipt, self.who)


class Busy:
    """Whether a process is in the middle of a handler, for others to see."""

    def __init__(self, folder: Path, who: str) -> None:
        self._fd = os.open(_busy(folder, who), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._mutex = threading.Lock()
        self._count = 0

    def begin(self) -> None:
        """A handler begins."""
        self._add(1)

    def end(self) -> None:
        """It ends."""
        self._add(-1)

    def _add(self, count: int) -> None:
        with self._mutex:
            self._count += count
            os.pwrite(self._fd, b"1" if self._count else b"0", 0)


def is_busy(folder: Path, who: str) -> bool:
    """Whether that process is."""
    path = _busy(folder, who)
    return path.exists() and path.read_bytes() == b"1"


def _busy(folder: Path, who: str) -> Path:
    return folder / f"busy-{who}"


class _File:
    """A history in many small files, so that a limit on the size of files cuts none off."""

    def __init__(self, folder: Path, who: str) -> None:
        self._folder = folder
        self._who = who
        self._mutex = threading.Lock()
        self._recorder = Recorder(folder, who)
        self._count = 0

    def record(self, event: Event) -> None:
        """Append one record."""
        with self._mutex:
            self._count += 1
            if self._count % RECORDS_A_FILE == 0:
                self._recorder.close()
                self._recorder = Recorder(self._folder, self._who)
            self._recorder.record(event)


class Run(msgspec.Struct, frozen=True):
    """One message's run; its name is unlike any other run's."""

    name: str
    delivery: Delivery
    about: About

    @property
    def attempt(self) -> int:
        """Which attempt it is."""
        return self.delivery.attempt

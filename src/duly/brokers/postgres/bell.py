"""`Bell`: wakes lanes that wait, those of this process at once and those of others by NOTIFY."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

from duly.errors import DulyError
from duly.sql.postgres import Database
from duly.sql.steps import Ask, Steps

# One NOTIFY stands for all that was published since the last. In the publisher's own transaction
# it would cost a lock that all committing writers share.
_EVERY_S = 0.01


class Bell:
    """What waits for news, and the thread that passes them on.

    ``chores`` is called on that thread now and then, after news went out.
    """

    def __init__(self, database: Database, channel: str, chores: Callable[[], None]) -> None:
        self._database = database
        self._channel = channel
        self._chores = chores
        self._news = threading.Condition()
        self._count = 0
        self._wanted = threading.Event()
        self._closing = threading.Event()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    def seen(self) -> int:
        """To be taken before looking, and handed to `wait`."""
        return self._count

    def wait(self, seen: int, timeout_s: float) -> None:
        """Wait for news since then."""
        with self._news:
            self._news.wait_for(lambda: self._count != seen, timeout_s)

    def stir(self) -> None:
        """There is news for lanes of this process."""
        with self._news:
            self._count += 1
            self._news.notify_all()

    def ring(self) -> None:
        """There is news for everybody."""
        self.stir()
        if self._thread is None:
            self._start()
        self._wanted.set()

    def call(self, payload: str = "") -> None:
        """Notify now. Raises `BrokerError`."""

        def steps() -> Steps[None]:
            yield Ask("notify", (self._channel, payload))

        self._database.read(steps)

    def close(self) -> None:
        """End the thread, having passed on what was to be."""
        self._closing.set()
        self._wanted.set()
        if self._thread is not None:
            self._thread.join()

    def _start(self) -> None:
        with self._starting:
            if self._thread is None and not self._closing.is_set():
                self._thread = threading.Thread(target=self._run, name="duly-bell", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        closing = False
        while not closing:
            self._wanted.wait()
            self._wanted.clear()
            closing = self._closing.is_set()
            # Who does not hear of it finds it by looking, a little later.
            with contextlib.suppress(DulyError):
                self.call()
                self._chores()
            self._closing.wait(_EVERY_S)

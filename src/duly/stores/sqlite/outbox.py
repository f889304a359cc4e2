"""The outbox of a SQLite store, as a relay works it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence

from duly.message import now_ms
from duly.sql import outbox
from duly.sql.outbox import Holder
from duly.sql.sqlite import DatabaseFile, boot_id, boot_ms, is_alive
from duly.store import Backlog, GivenUp, Outgoing, Refusal

# Every commit to the file wakes a relay that waits, and most put nothing into the outbox: after
# each look in vain the next waits twice as long, up to this, so that looking costs no worker
# more than a hundredth of its time.
_FIRST_PAUSE_S = 0.001
_LONGEST_PAUSE_S = 0.02


class SQLiteOutbox:
    """See `duly.store.Outbox`. A relay whose process is dead is replaced at once.

    ``wall_ms`` gives milliseconds since 1970 UTC, ``boot_time_ms`` since boot: backoff goes by
    the one, the relay's lease by the other.
    """

    def __init__(
        self,
        file: DatabaseFile,
        *,
        wall_ms: Callable[[], int] = now_ms,
        boot_time_ms: Callable[[], int] = boot_ms,
    ) -> None:
        self._file = file
        self._wall_ms = wall_ms
        self._boot_ms = boot_time_ms
        self._pause_s = 0.0

    def hold(self, relay: str, lease_s: float) -> bool:
        """As `Outbox.hold`."""
        found = self._file.read(outbox.holder)
        if found is not None and found.relay != relay and self._is_working(found):
            return False
        until = self._boot_ms() + int(lease_s * 1000)
        new = Holder(relay, self._file.worker.id, boot_id(), until)
        instead_of = None if found is None else found.relay
        return self._file.write(lambda: outbox.hold(new, instead_of), durable=False)

    def _is_working(self, holder: Holder) -> bool:
        if holder.boot_id != boot_id() or holder.until_boot_ms <= self._boot_ms():
            return False
        return holder.worker == self._file.worker.id or is_alive(self._file.folder, holder.worker)

    def let_go(self, relay: str) -> None:
        """As `Outbox.let_go`."""
        self._file.write(lambda: outbox.let_go(relay), durable=False)

    def unsent(self, limit: int, max_bytes: int, wait_s: float) -> Sequence[Outgoing]:
        """As `Outbox.unsent`. Waits in real time."""
        deadline = time.monotonic() + wait_s
        while True:
            seen = self._file.changes()
            at_ms = self._wall_ms()
            found = self._file.read(functools.partial(outbox.unsent, limit, max_bytes, at_ms))
            left_s = deadline - time.monotonic()
            if found:
                self._pause_s = 0.0
            if found or left_s <= 0:
                return found
            due_ms = self._file.read(functools.partial(outbox.next_due, at_ms))
            if due_ms is not None:
                left_s = min(left_s, max(0.001, (due_ms - self._wall_ms()) / 1000))
            if self._file.wait(seen, left_s) != seen and self._pause_s:
                time.sleep(min(self._pause_s, max(0.0, deadline - time.monotonic())))
            self._pause_s = min(max(self._pause_s * 2, _FIRST_PAUSE_S), _LONGEST_PAUSE_S)

    def left(self, positions: Sequence[int]) -> Sequence[Outgoing]:
        """As `Outbox.left`."""
        return self._file.read(lambda: outbox.left(positions))

    def sent(self, positions: Sequence[int]) -> None:
        """As `Outbox.sent`."""
        self._file.write(lambda: outbox.confirmed(positions))

    def refused(self, refusals: Sequence[Refusal]) -> None:
        """As `Outbox.refused`."""
        at_ms = self._wall_ms()
        self._file.write(lambda: outbox.refused(refusals, at_ms))

    def given_up(self, limit: int = 100) -> Sequence[GivenUp]:
        """As `Outbox.given_up`."""
        return self._file.read(lambda: outbox.given_up(limit))

    def try_again(self, positions: Sequence[int]) -> None:
        """As `Outbox.try_again`."""
        self._file.write(lambda: outbox.try_again(positions))

    def backlog(self) -> Backlog:
        """As `Outbox.backlog`."""
        return self._file.read(outbox.backlog)

"""The outbox of a PostgreSQL store, as a relay works it.

What is sent is deleted, and the oldest of what is there is sent next: a transaction that commits
late is found whenever it commits, whatever was sent before it. Positions are given out where a
transaction puts its messages, so that of two transactions that follow one another the first
comes first.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from duly.message import now_ms
from duly.sql import outbox
from duly.sql.postgres import Database
from duly.sql.steps import Ask, Steps
from duly.store import Backlog, GivenUp, Outgoing, Refusal

# How often a relay looks whether another process has put something in. NOTIFY in the publisher's
# transaction would serialize all commits of the server.
_LOOK_S = 0.05


class PostgresOutbox:
    """See `duly.store.Outbox`.

    ``filled`` is set when a transaction of this process has put something in. ``wall_ms`` gives
    milliseconds since 1970 UTC, for backoff. The relay's lease goes by the database's clock, or
    by ``lease_ms``.
    """

    def __init__(
        self,
        database: Database,
        filled: threading.Event,
        *,
        wall_ms: Callable[[], int] = now_ms,
        lease_ms: Callable[[], int] | None = None,
    ) -> None:
        self._database = database
        self._filled = filled
        self._wall_ms = wall_ms
        self._lease_ms = lease_ms

    def hold(self, relay: str, lease_s: float) -> bool:
        """As `Outbox.hold`."""
        now_ms = None if self._lease_ms is None else self._lease_ms()
        return self._database.write(lambda: _hold(relay, int(lease_s * 1000), now_ms))

    def let_go(self, relay: str) -> None:
        """As `Outbox.let_go`."""
        self._database.write(lambda: outbox.let_go(relay))

    def unsent(self, limit: int, max_bytes: int, wait_s: float) -> Sequence[Outgoing]:
        """As `Outbox.unsent`. Waits in real time."""
        deadline = time.monotonic() + wait_s
        while True:
            self._filled.clear()
            found = self._database.read(lambda: outbox.unsent(limit, max_bytes, self._wall_ms()))
            left_s = deadline - time.monotonic()
            if found or left_s <= 0:
                return found
            self._filled.wait(min(left_s, _LOOK_S))

    def left(self, positions: Sequence[int]) -> Sequence[Outgoing]:
        """As `Outbox.left`."""
        return self._database.read(lambda: outbox.left(positions))

    def sent(self, positions: Sequence[int]) -> None:
        """As `Outbox.sent`."""
        self._database.write(lambda: outbox.confirmed(positions))

    def refused(self, refusals: Sequence[Refusal]) -> None:
        """As `Outbox.refused`."""
        at_ms = self._wall_ms()
        self._database.write(lambda: outbox.refused(refusals, at_ms))

    def given_up(self, limit: int = 100) -> Sequence[GivenUp]:
        """As `Outbox.given_up`."""
        return self._database.read(lambda: outbox.given_up(limit))

    def try_again(self, positions: Sequence[int]) -> None:
        """As `Outbox.try_again`."""
        self._database.write(lambda: outbox.try_again(positions))

    def backlog(self) -> Backlog:
        """As `Outbox.backlog`."""
        return self._database.read(outbox.backlog)


def _hold(relay: str, lease_ms: int, now_ms: int | None) -> Steps[bool]:
    rows = yield Ask("outbox_hold", (relay, lease_ms, now_ms))
    return bool(rows)

"""When to tick: whenever a lane has nothing left that it knows of, and now and then besides."""

from __future__ import annotations

import threading

from duly.sql import ticks
from duly.sql.postgres import Database

# After so many publishes a publisher ticks: where no worker has run for weeks, the first that
# comes does not have to go through all of them at once.
_PUBLISHES = 2_000


class Ticker:
    """Ticks for the lanes and publishers of one process."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._system = database.facts.system
        self._mutex = threading.Lock()
        self._published = 0

    def check(self) -> None:
        """Raise `BrokerUnusable` where the log is from another cluster."""
        self._database.read(lambda: ticks.check_cluster(self._system, self._database.shown))

    def published(self) -> None:
        """Something was published."""
        self._published += 1

    def chores(self) -> None:
        """Tick where much was published since. Raises `BrokerError`."""
        if self._published >= _PUBLISHES:
            self.tick()

    def tick(self) -> bool:
        """Give positions to what has none; whether there was anything. Raises `BrokerError`.

        A tick need not survive the server: whatever builds on it is committed behind it, and
        without that it is done again.
        """
        with self._mutex:
            self._published = 0
            if not self._database.read(ticks.arrived):
                return False
            return self._database.write(lambda: ticks.tick(self._system), durable=False) > 0

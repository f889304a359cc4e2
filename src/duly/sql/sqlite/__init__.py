"""SQLite files as duly uses them: a fair turn, group commit, wake-up, liveness, a guard.

Broker and store are built on these; beside them this is the only place that knows the driver.
"""

from duly.sql.sqlite.file import DatabaseFile, Stats
from duly.sql.sqlite.liveness import WorkerLock, boot_id, boot_ms, is_alive
from duly.sql.sqlite.turn import Turn

__all__ = ["DatabaseFile", "Stats", "Turn", "WorkerLock", "boot_id", "boot_ms", "is_alive"]

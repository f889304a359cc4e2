"""The store in a SQLite file: the broker's own file, or another one with inbox and outbox."""

from duly.stores.sqlite.session import SqliteSession
from duly.stores.sqlite.store import SqliteStore

__all__ = ["SqliteSession", "SqliteStore"]

"""The store in a SQLite file: the broker's own file, or another one with inbox and outbox."""

from duly.stores.sqlite.session import SQLiteSession
from duly.stores.sqlite.store import SQLiteStore

__all__ = ["SQLiteSession", "SQLiteStore"]

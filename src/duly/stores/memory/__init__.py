"""The store in memory, for tests, simulation and small single-process applications."""

from duly.stores.memory.admission import Cursor
from duly.stores.memory.session import MemorySession
from duly.stores.memory.store import MemoryStore
from duly.stores.memory.tables import DuplicateKey, MemoryTables

__all__ = ["Cursor", "DuplicateKey", "MemorySession", "MemoryStore", "MemoryTables"]

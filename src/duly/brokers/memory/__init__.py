"""Brokers in memory, one for each way of admission: same database, ordered log, queue.

For tests, simulation and small single-process applications: nothing survives the process.
"""

from duly.brokers.memory.database import MemoryDatabase
from duly.brokers.memory.log import MemoryLog
from duly.brokers.memory.queue import MemoryQueue

__all__ = ["MemoryDatabase", "MemoryLog", "MemoryQueue"]

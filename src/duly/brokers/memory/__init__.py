"""Brokers in memory, one for each way of admission: same database, ordered log, queue.

For tests, simulation and small single-process applications: nothing survives the process.
"""

from duly.brokers.memory.database import MemoryDatabase

__all__ = ["MemoryDatabase"]

"""The embedded broker: a log in one SQLite file, for the processes of one machine."""

from duly.brokers.sqlite.broker import SQLiteBroker
from duly.brokers.sqlite.clock import Clock

__all__ = ["Clock", "SQLiteBroker"]

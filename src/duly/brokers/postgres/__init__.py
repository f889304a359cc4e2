"""The PostgreSQL broker: one schema of one database, shared by workers on any number of hosts."""

from duly.brokers.postgres.broker import PostgresBroker
from duly.brokers.postgres.clock import Clock

__all__ = ["Clock", "PostgresBroker"]

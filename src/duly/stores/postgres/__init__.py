"""The store in PostgreSQL: effects beside inbox, cursors and outbox, on connections of psycopg."""

from duly.stores.postgres.log import BrokerLog
from duly.stores.postgres.session import PostgresSession
from duly.stores.postgres.store import ISOLATIONS, PostgresStore

__all__ = ["ISOLATIONS", "BrokerLog", "PostgresSession", "PostgresStore"]

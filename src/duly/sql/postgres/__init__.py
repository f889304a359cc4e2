"""PostgreSQL as duly uses it: connections, transactions that end in one of three ways, a guard.

Broker and store are built on these; beside them this is the only place that knows the driver,
psycopg 3 (``duly[postgres]``).
"""

from duly.sql.postgres.database import Database
from duly.sql.postgres.lines import Line, LoopLine, OwnLine

__all__ = ["Database", "Line", "LoopLine", "OwnLine"]

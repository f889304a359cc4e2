"""`Autocommit`: sessions on which each statement is a transaction by itself.

Begin, statement and commit are three turns of a connection; such a statement is one, and just as
durable. What `duly.sql.postgres.transactions.begin` sets for each transaction is set here once,
for a session that nobody else uses: behind a pooler, or from an application's own pool, a session
is somebody else's next. Whether this code may write is asked by the statement, at its mark.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import psycopg
from psycopg.pq import TransactionStatus

from duly.errors import CommitUnknown
from duly.sql.postgres.connections import OwnSource
from duly.sql.postgres.errors import ended_session, first_line
from duly.sql.postgres.statements import StatementRunner, named_statements
from duly.sql.postgres.transactions import session_settings
from duly.sql.steps import Steps, run

R = TypeVar("R")

# Where a statement that may be a transaction by itself asks whether this code may write. A chaos
# run knows by it, on the way to the server, that the answer is that of a commit.
_MARK = "/* alone */"
_ASKED = ", 1 / {}::int /* and commits */"


class Autocommit:
    """Runs steps whose first statement makes the whole change.

    ``fits`` is SQL that is true where this code may write; see `transactions.is_left_behind`.
    """

    def __init__(
        self, source: OwnSource, schema: str, shown: str, *, statement_s: float, fits: str
    ) -> None:
        self._source = source.twin(session_settings(statement_s))
        self._schema = schema
        self._shown = shown
        self._statements = {
            name: text.replace(_MARK, _ASKED.format(fits))
            for name, text in named_statements(schema).items()
        }

    def run(self, steps: Steps[R]) -> R:
        """Run the steps, each stored when it has been answered.

        Raises the driver's error, and `BrokerError`, where nothing was changed; `CommitUnknown`
        where the answer was lost, or what followed the change failed.
        """
        connection = self._source.take()
        runner = _Runner(connection, self._schema, self._statements)
        in_doubt = True
        try:
            result = run(runner, steps)
            in_doubt = False
            return result
        except psycopg.Error as error:
            in_doubt = connection.info.transaction_status != TransactionStatus.IDLE
            if in_doubt or runner.has_changed or ended_session(error):
                raise CommitUnknown(
                    f"{self._shown}: a statement that commits by itself was sent and its answer "
                    f"lost ({first_line(error)})."
                ) from error
            raise
        finally:
            self._source.give_back(connection, in_doubt=in_doubt)

    def close(self) -> None:
        """Close the sessions."""
        self._source.close()


class _Runner(StatementRunner):
    """``has_changed``: a statement for many rows has been answered, and so committed."""

    __slots__ = ("has_changed",)

    def __init__(
        self, connection: psycopg.Connection[Any], schema: str, statements: Mapping[str, str]
    ) -> None:
        super().__init__(connection, schema, statements)
        self.has_changed = False

    def many(self, name: str, rows: Sequence[Sequence[Any]], shared: Sequence[Any] = ()) -> int:
        """As `StatementRunner.many`."""
        changed = super().many(name, rows, shared)
        self.has_changed = True
        return changed

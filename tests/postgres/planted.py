"""Bugs that only a store on PostgreSQL can have, each planted into the source that is shipped.

Those of ``SIMULATED`` are caught by the name of the property that they break; those of ``TESTED``
need a real link or lock, and are caught by the test that is named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from duly.testing.simulation.scenario import Scenario
from tests.proof.mutations import LISTED, Edit, Mutation, one

EXACT: Any = "exactly-once"

_SESSION = "stores/postgres/session.py"
_TRANSACTIONS = "sql/postgres/transactions.py"
_COMMIT = 'Say("commit" if mark is None else f"{_CHECK.format(mark)}; commit")'
_STATEMENTS = "sql/postgres_store.sql"

SIMULATED: Mapping[str, Mutation] = {
    "inbox row outside the transaction": one(
        "lost effect",
        Scenario(kind="postgres-inbox", guarantee=EXACT),
        _SESSION,
        "return self._run(inbox.admit(scope, self._flows, deliveries, now_ms, self._mark))",
        "steps = lambda: inbox.admit(scope, self._flows, deliveries, now_ms, self._mark)\n"
        "                return self._home._database.write(steps)",
    ),
    "inbox row last and not unique": one(
        "duplicate effect",
        Scenario(kind="postgres-inbox", guarantee=EXACT),
        _STATEMENTS,
        "    mark bigint not null,\n    primary key (flow_no, id)\n",
        "    mark bigint not null,\n    primary key (flow_no, id, mark)\n",
    ),
    "swallowed SQL error then commit": Mutation(
        "silent rollback",
        Scenario(kind="postgres-inbox", guarantee=EXACT, manners=("ok", "ok", "lose once")),
        (
            Edit(
                _TRANSACTIONS,
                "    _check(connection.info.transaction_status, shown)\n",
                "",
            ),
            Edit(
                _TRANSACTIONS,
                f"answer = yield {_COMMIT}",
                'answer = yield Say("commit")',
            ),
            Edit(_TRANSACTIONS, 'if answer != "COMMIT":', "if not answer:"),
            # The statements before the commit would find out as well.
            Edit(
                _SESSION,
                "            return self._run(self._home.put(messages))\n",
                """\
            from duly.broker import Published

            try:
                return self._run(self._home.put(messages))
            except TransactionLost:
                return [Published(message.id) for message in messages]
""",
            ),
        ),
    ),
    "COMMIT retried on a new connection": one(
        "blind retry",
        Scenario(kind="postgres-inbox", guarantee=EXACT),
        *(
            getattr(LISTED["COMMIT retried on a new connection"].edits[0], name)
            for name in ("file", "old", "new")
        ),
    ),
    "cursor that is not compared": Mutation(
        "duplicate effect",
        Scenario(
            kind="postgres-cursor", guarantee=EXACT, workers=3, messages=8, preempt=0.3, batch=1
        ),
        (
            Edit(
                _STATEMENTS,
                "where consumer = $3 and log = $4 and next_offset = $5 and epoch = $6 returning 1;",
                "where consumer = $3 and log = $4 and ($5::bigint, $6::bigint) is not null\n"
                "returning 1;",
            ),
            Edit(
                _STATEMENTS,
                "where consumer = $1 and log = $2 for update;",
                "where consumer = $1 and log = $2;",
            ),
        ),
    ),
    "publish and mark in two steps without confirmation": one(
        "missing output",
        Scenario(kind="postgres-inbox", guarantee=EXACT),
        *(
            getattr(LISTED["publish and mark in two steps without confirmation"].edits[0], name)
            for name in ("file", "old", "new")
        ),
    ),
}


@dataclass(frozen=True)
class Tested:
    """A planted bug, the property it breaks, and the test that fails with it."""

    breaks: str
    by: str
    edits: tuple[Edit, ...]


def tested(by: str, *edits: tuple[str, str, str], breaks: str) -> Tested:
    """A bug of these edits: file, what stands there, what instead."""
    return Tested(breaks, by, tuple(Edit(*edit) for edit in edits))


_AGAIN = """\
            except CommitUnknown as failed:
                raise _Again(BrokerUnavailable(str(failed))) from None
            except TransactionFailed as failed:
"""
_UNSENT = """\
            found = self._database.read(lambda: outbox.unsent(limit, max_bytes, self._wall_ms()))
"""
_BEYOND = """\
            last = getattr(self._database, "last", 0)
            found = [each for each in found if each.position > last]
            self._database.last = max([last, *(each.position for each in found)])
"""

TESTED: Mapping[str, Tested] = {
    "COMMIT retried on a new connection, by the driver": tested(
        "postgres/test_database.py::test_a_lost_answer_to_commit_is_unknown_and_not_tried_again",
        (
            "sql/postgres/database.py",
            "            except TransactionFailed as failed:\n",
            _AGAIN,
        ),
        (
            "sql/postgres/database.py",
            "from duly.errors import ",
            "from duly.errors import CommitUnknown\nfrom duly.errors import ",
        ),
        breaks="blind retry",
    ),
    "COMMIT answered by ROLLBACK taken for success": tested(
        "postgres/test_database.py::test_an_aborted_transaction_is_found_by_its_answer_too",
        (_TRANSACTIONS, 'if answer != "COMMIT":', "if not answer:"),
        breaks="silent rollback",
    ),
    "another transaction committed in place of the one begun": tested(
        "postgres/test_database.py::test_a_transaction_that_was_ended_by_sql_does_not_pass_as_success",
        (_TRANSACTIONS, _COMMIT, 'Say("commit")'),
        breaks="silent rollback",
    ),
    "a deadlock charged to the handler": tested(
        "postgres/test_worker.py::test_a_deadlock_is_done_again_uncharged",
        (_SESSION, "            if is_conflict(cause):\n", "            if not cause:\n"),
        breaks="poison loop",
    ),
    "a lost connection charged to the handler": tested(
        "postgres/test_worker.py::test_a_session_that_was_ended_is_done_again_uncharged",
        (_SESSION, "if self._line.connection.closed:", "if False:"),
        breaks="poison loop",
    ),
    "bare position > last cursor of the outbox": tested(
        "postgres/test_store.py::test_a_late_commit_is_not_skipped",
        ("stores/postgres/outbox.py", _UNSENT, _UNSENT + _BEYOND),
        breaks="missing output",
    ),
    "several relays at once": tested(
        "postgres/test_store.py::test_several_relays_send_nothing_twice",
        (
            _STATEMENTS,
            "where held.relay = excluded.relay or held.until_ms <= excluded.until_ms - $2\n",
            "",
        ),
        breaks="duplicate",
    ),
    "a flow numbered inside the transaction": tested(
        "postgres/test_store.py::test_different_messages_of_a_new_flow_do_not_wait",
        (
            _SESSION,
            "                self._home.number(inbox.flows_of(scope.consumer, deliveries))\n",
            "",
        ),
        breaks="stuck",
    ),
    "savepoints without end": tested(
        "postgres/test_worker.py::test_a_transaction_has_at_most_fifty_savepoints",
        ("stores/postgres/store.py", "savepoints=_SAVEPOINTS,", "savepoints=None,"),
        breaks="latency only",
    ),
}

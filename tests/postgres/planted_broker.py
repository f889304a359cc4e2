"""Bugs that a broker on PostgreSQL can have, each planted into the source that is shipped.

Those of ``SIMULATED`` are caught by the name of the property that they break. Those of ``TESTED``
need sessions that stand side by side, a real link or a server that dies: each is caught by the
test that is named, and ``breaks`` says which property an application would lose by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from duly.testing.simulation.scenario import Scenario
from tests.postgres.planted import Tested, tested
from tests.proof.mutations import Edit, Mutation, one

ALO: Any = "at-least-once"
EXACT: Any = "exactly-once"

_LOG = "sql/postgres.sql"
_TICKS = "sql/ticks.py"
_BROKER = "brokers/postgres/broker.py"
_LANE = "brokers/postgres/lane.py"
_SESSION = "stores/postgres/session.py"

_LATE = "    where xid = any (array(select pg_snapshot_xip(snapshot) from last))\n"
_FRESH = (
    "    delete from duly.arrivals where xid >= (select pg_snapshot_xmax(snapshot) from last)\n"
)
_IN_PLACES = "    window before as (partition by s.stream order by s.place)\n    returning 1\n"
_LOCK = '    yield Ask("lock_ticks")\n    [(runs,)]'
_WHOLE = (
    "where c.token = $1::bigint and c.first = $2::bigint and c.last = $3::bigint\n"
    "and ($4::bigint is null or c.mark = $4::bigint)\n"
    "returning c.subscription_no, exists (\n"
    "    select 1 from duly.parked p where p.subscription_no = c.subscription_no"
    " and p.due_ms is null\n"
    ");\n"
)
_SETTLE = (
    "        settle = self._settle_steps(settlements)\n        with self._settling:\n"
    "            refused = self._database.write(settle)\n        self._tell(settlements)\n"
)

_AHEAD = "        if not self._was_full or self._solitude.is_closed or self._is_time_to_look():\n"

SIMULATED: Mapping[str, Mutation] = {
    "settlement before the effects": Mutation(
        "lost effect",
        Scenario(kind="postgres", guarantee=EXACT),
        (
            # A fence that locks nothing, or the settlement would wait for its own transaction.
            Edit(
                _LOG,
                "update duly.claims set mark = $1 where token = $2::bigint returning first, last;",
                "select first, last from duly.claims\nwhere token = $2::bigint and $1::bigint > 0;",
            ),
            Edit(
                _SESSION,
                "self._run(self._log().settle(settlements, now_ms, self._mark, self._turns))",
                "self._home._database.write(\n"
                "                    lambda: self._log().settle(settlements, now_ms, None, set())\n"
                "                )",
            ),
        ),
    ),
    "savepoint that is not rolled back": one(
        "duplicate effect",
        Scenario(kind="postgres", guarantee=EXACT, manners=("fail once", "ok", "ok")),
        _SESSION,
        'self._say(f"rollback to {self._savepoint}; release {self._savepoint}")',
        'self._say(f"release {self._savepoint}")',
    ),
    "identities that are not kept": one(
        "duplicate effect",
        Scenario(kind="postgres", guarantee=EXACT),
        _LOG,
        "    primary key (topic_no, source, id)\n",
        "    primary key (topic_no, source, id, place)\n",
    ),
    "a late commit that is not looked for": Mutation(
        "lost effect",
        Scenario(kind="postgres", guarantee=EXACT, within=True, messages=6, preempt=0.2),
        (Edit(_LOG, _LATE, "    where false\n"),),
    ),
    "dead letter deleted before it is inserted": Mutation(
        "lost",
        Scenario(kind="postgres", guarantee=ALO, manners=("reject",)),
        (
            Edit(_LANE, _AHEAD, "        if True:\n"),  # every settlement by itself
            Edit(
                _LANE,
                _SETTLE,
                """\
        from duly.guarantees import Dead
        from duly.sql.steps import Many

        dead = [s for s in settlements if isinstance(s, Dead)]
        rest = [Done(s.receipt) if isinstance(s, Dead) else s for s in settlements]
        settle = self._settle_steps(rest)
        number, now_ms = self._number, self._clock.wall_ms()

        def insert():
            rows = [(number, d.receipt[1], d.error, 1, now_ms, 0) for d in dead]
            yield Many("bury", rows)

        with self._settling:
            refused = self._database.write(settle)
        if dead:
            self._database.write(insert)
        self._tell(settlements)
""",
            ),
        ),
    ),
    "parked message promoted in two steps": Mutation(
        "unexplained duplicate",
        Scenario(kind="postgres", guarantee=ALO, workers=2, manners=("fail once",)),
        (
            Edit(
                "sql/claims.py",
                "    done = [c.position for c in chosen.messages] + chosen.lost\n",
                "    done = chosen.lost\n",
            ),
            Edit(
                _LANE,
                "        self._was_full = claimed.full\n",
                """\
        from duly.sql.steps import Many

        def unpark():
            taken = [row[0] for part in claimed.parts for row in part.rows]
            yield Many("unpark", [(self._number, position) for position in taken])

        self._database.write(unpark)
        self._was_full = claimed.full
""",
            ),
        ),
    ),
}

TESTED: Mapping[str, Tested] = {
    "a tick that skips what was still open": tested(
        "postgres/test_broker_ticks.py::test_a_late_commit_is_not_skipped",
        (_LOG, _LATE, "    where false\n"),
        breaks="lost write",
    ),
    "positions from the sequence, and a bare cursor": tested(
        "postgres/test_broker_ticks.py::test_a_late_commit_is_not_skipped",
        (_LOG, _LATE, "    where false\n"),
        (
            _LOG,
            _FRESH,
            (
                "    delete from duly.arrivals\n"
                "    where place >= (select coalesce(max(r.place + r.count), 0) from duly.runs r)\n"
            ),
        ),
        breaks="lost write",
    ),
    "ticks that do not wait for each other": tested(
        "postgres/test_broker_ticks.py::test_ticks_wait_for_each_other_and_then_look_anew",
        (_TICKS, _LOCK, "    [(runs,)]"),
        breaks="lost write",
    ),
    "a snapshot later than the look, so that the next tick starts too late": tested(
        "postgres/test_broker_turns.py::test_what_commits_between_the_statements_of_a_tick_is_found",
        (
            _LOG,
            (
                "    select tick_no + 1, pg_current_snapshot(), $1::bigint from last\n"
                "    where exists (select 1 from settled)\n"
            ),
            "    select tick_no + 1, pg_current_snapshot(), $1::bigint from last where false\n",
        ),
        (
            _LOG,
            "-- name: forget_ticks\n",
            (
                "-- name: leave_snapshot\n"
                "insert into duly.ticks (tick_no, snapshot, system_identifier)\n"
                "select max(tick_no) + 1, pg_current_snapshot(), $1::bigint from duly.ticks;\n\n"
                "-- name: forget_ticks\n"
            ),
        ),
        (
            _TICKS,
            "    if runs:\n",
            '    if runs:\n        yield Ask("leave_snapshot", (system_identifier,))\n',
        ),
        breaks="lost write",
    ),
    "a tick that goes by places from the last to the first": tested(
        "postgres/test_broker_ticks.py::test_any_interleaving_loses_nothing_and_keeps_keys_in_order[0]",
        (_LOG, _IN_PLACES, _IN_PLACES.replace("order by s.place", "order by s.place desc")),
        breaks="inversion",
    ),
    "no fence in the effects transaction": tested(
        "contract/test_stores.py::TestPostgresStore::ExactlyOnce"
        "::test_a_superseded_claim_does_not_commit[by-claim]",
        (
            _SESSION,
            "held = self._run(self._log().fence(receipts, self._mark))",
            "held = len(receipts)",
        ),
        (
            "brokers/postgres/joint.py",
            "ends = log.settle(settlements, self._now_ms(), mark)",
            "ends = log.settle(settlements, self._now_ms())",
        ),
        breaks="zombie commit",
    ),
    "receipts that no token fences": tested(
        "postgres/test_broker_faults.py::test_a_worker_that_stands_still_keeps_its_claims_for_its_lease",
        (
            _LOG,
            _WHOLE,
            (
                "where $1::bigint > 0 and c.first = $2::bigint and c.last = $3::bigint\n"
                "and ($4::bigint is null or $4::bigint > 0)\n"
                "returning c.subscription_no, exists (\n"
                "    select 1 from duly.parked p where p.subscription_no = c.subscription_no"
                " and p.due_ms is null\n"
                ");\n"
            ),
        ),
        breaks="zombie commit",
    ),
    "order by transaction id": tested(
        "postgres/test_broker_ticks.py::test_keys_keep_the_order_of_transactions_not_of_their_ids",
        (
            _LOG,
            _LATE + "    returning stream, place, count, largest, latest_due_ms\n",
            _LATE + "    returning xid, stream, place, count, largest, latest_due_ms\n",
        ),
        (
            _LOG,
            _FRESH + "    returning stream, place, count, largest, latest_due_ms\n",
            _FRESH + "    returning xid, stream, place, count, largest, latest_due_ms\n",
        ),
        (_LOG, _IN_PLACES, _IN_PLACES.replace("s.place)", "s.xid, s.place)")),
        breaks="inversion",
    ),
    "the row's own xmin in place of the transaction's id": tested(
        "postgres/test_broker_ticks.py::test_savepoints_are_part_of_their_transaction",
        (_LOG, _LATE, _LATE.replace("xid =", "xmin::text::xid8 =")),
        (_LOG, _FRESH, _FRESH.replace("xid >=", "xmin::text::xid8 >=")),
        breaks="lost write",
    ),
    "another cluster's snapshots taken for this one's": tested(
        "postgres/test_broker_ticks.py::test_a_tick_finds_nothing_where_the_ids_are_another_clusters",
        (_LOG, "where system_identifier = $1::bigint\n", "where $1::bigint is not null\n"),
        breaks="lost write",
    ),
    "a restored log that is worked unasked": tested(
        "postgres/test_broker_faults.py::test_a_log_restored_elsewhere_is_refused_until_somebody_adopts_it",
        (_TICKS, "    if known != system_identifier:\n", "    if known is None:\n"),
        breaks="lost write",
    ),
    "a lost answer to COMMIT taken for failure, and published again": tested(
        "postgres/test_broker_faults.py::test_a_publish_whose_commit_was_not_answered_is_unknown",
        (
            "sql/outcomes.py",
            "return [_unknown(message, error) for message in messages]",
            "return [_failed(message, error) for message in messages]",
        ),
        breaks="aborted read",
    ),
    "a settlement of unknown outcome reported as made": tested(
        "postgres/test_broker_faults.py::test_a_settlement_whose_commit_was_not_answered_is_neither",
        (
            _LANE,
            _SETTLE,
            _SETTLE.replace(
                "            refused = self._database.write(settle)\n",
                "            try:\n"
                "                refused = self._database.write(settle)\n"
                "            except CommitUnknown:\n"
                "                refused = []\n",
            ),
        ),
        breaks="redelivery after a confirmed settle",
    ),
    "publishing that does not wait for the disk": tested(
        "postgres/test_broker_faults.py::test_a_server_that_is_killed_loses_nothing",
        (
            "sql/postgres/transactions.py",
            '_set("synchronous_commit", _AT_LEAST_ON, for_session=True)',
            '_set("synchronous_commit", "\'off\'", for_session=True)',
        ),
        breaks="lost write",
    ),
    "leases and due times by the host's clock": tested(
        "postgres/test_broker_turns.py::test_a_host_whose_clock_is_wrong_takes_nothing_from_others",
        (
            "brokers/postgres/clock.py",
            '_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)',
            "_CLOCK = time.CLOCK_REALTIME",
        ),
        (
            "brokers/postgres/clock.py",
            "return time.clock_gettime_ns(_CLOCK) / 1e6",
            "return time.time() * 1000",
        ),
        (
            "brokers/postgres/clock.py",
            "return server_ms - (before_ms + _local_ms()) / 2, time.monotonic()",
            "return 0.0, time.monotonic()",
        ),
        breaks="unexplained duplicate",
    ),
    "a worker taken for dead as soon as its session is gone": tested(
        "postgres/test_broker_turns.py::test_a_session_that_comes_back_in_time_is_no_death",
        ("brokers/postgres/listener.py", ">= GRACE_S:", ">= 0.0:"),
        breaks="unexplained duplicate",
    ),
    "a session whose death nobody looks for": tested(
        "postgres/test_broker_faults.py::test_a_killed_worker_is_known_by_its_session",
        (
            "brokers/postgres/listener.py",
            "                dead.add(worker)\n",
            "                pass\n",
        ),
        breaks="stuck",
    ),
    "claims that are not made in turn": tested(
        "postgres/test_broker_turns.py::test_claims_of_a_subscription_are_made_in_turn",
        (
            "sql/locks.py",
            (
                "    for number in sorted(lane.subscription_no for lane in lanes):\n"
                '        yield Ask("lock_subscription", (number,))\n'
            ),
            "    del lanes\n",
        ),
        breaks="unexplained duplicate",
    ),
    "a wake-up that is not passed on": tested(
        "postgres/test_broker_waking.py::test_what_wakes_it_is_the_news_and_not_a_look",
        (
            "brokers/postgres/bell.py",
            "        self._wanted.set()\n\n    def call",
            "\n    def call",
        ),
        breaks="latency only",
    ),
    "NOTIFY in the publisher's own transaction": tested(
        "postgres/test_broker_waking.py::test_notices_are_few_and_not_the_publishers",
        (
            _BROKER,
            "        return arrivals.publish(self._topics, messages, self._clock.wall_ms())\n",
            (
                "        from duly.sql.steps import Ask\n\n"
                "        now_ms = self._clock.wall_ms()\n"
                "        outcomes = yield from arrivals.publish(self._topics, messages, now_ms)\n"
                '        yield Ask("notify", (self._channel, ""))\n'
                "        return outcomes\n"
            ),
        ),
        breaks="latency only",
    ),
}

"""Bugs as others have made them, each planted into the source that is shipped.

A mutation replaces snippets of files, each of which has to be there exactly once: where the
source has moved on, the test says so, and the mutation moves with it. ``breaks`` is the name of
the property by which it has to be caught.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duly
from duly.testing.simulation.scenario import Scenario

SOURCE = Path(duly.__file__).parent

AMO: Any = "at-most-once"
ALO: Any = "at-least-once"
EXACT: Any = "exactly-once"


@dataclass(frozen=True)
class Edit:
    """One snippet of one file, and what stands there instead."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Mutation:
    """A planted bug; ``scenario`` is one in which it shows."""

    breaks: str
    scenario: Scenario
    edits: tuple[Edit, ...]


def mutated(mutation: Mutation, folder: Path) -> Path:
    """A copy of the shipped package in this folder, with the edits of this mutation."""
    shutil.copytree(SOURCE, folder / "duly")
    for edit in mutation.edits:
        path = folder / "duly" / edit.file
        text = path.read_text()
        there = text.count(edit.old)
        assert there == 1, f"{edit.file}: {there} times, where it should stand once:\n{edit.old}"
        path.write_text(text.replace(edit.old, edit.new))
    return folder


def one(breaks: str, scenario: Scenario, file: str, old: str, new: str) -> Mutation:
    """A mutation of a single snippet."""
    return Mutation(breaks, scenario, (Edit(file, old, new),))


_HELD = "if item is None or item.state is not State.CLAIMED or item.token != receipt.token:"

# In the order of the specification; what is not listed there stands below.
_WHOLE_CLAIM = """\
where token = ?1 and last = ?3 and (?4 is null or mark = ?4) and claim_id = coalesce(
    (select claim_id from duly_claims where claim_id = ?1 and first = ?2),
    (select claim_id from duly_claims where token = ?1 and claim_id <> token and first = ?2)
);
delete from duly_claims
where token = ?1 and last = ?3 and (?4 is null or mark = ?4) and claim_id = coalesce(
"""

LISTED: Mapping[str, Mutation] = {
    "settle before the handler": one(
        "premature settle",
        Scenario(guarantee=ALO),
        "worker/lane.py",
        "Guarantee.AT_LEAST_ONCE: rounds.at_least_once,",
        "Guarantee.AT_LEAST_ONCE: rounds.at_most_once,",
    ),
    "settle by id alone": one(
        "zombie commit",
        Scenario(guarantee=EXACT, workers=2, preempt=0.2),
        "brokers/memory/group.py",
        _HELD,
        "if item is None or item.token not in self._claims:",
    ),
    "settle by id and state": one(
        "zombie commit",
        Scenario(guarantee=EXACT, workers=2, preempt=0.2),
        "brokers/memory/group.py",
        _HELD,
        "if item is None or item.state is not State.CLAIMED:",
    ),
    # A worker's first death charges nobody: two claims carry the same number.
    "fence by attempt number": Mutation(
        "zombie commit",
        Scenario(guarantee=EXACT, workers=2, preempt=0.2),
        (
            Edit(
                "brokers/memory/group.py",
                "receipt = Claimed(self.name, item.position, claim.token)",
                "receipt = Claimed(self.name, item.position, attempt)",
            ),
            Edit(
                "brokers/memory/group.py",
                "item.token != receipt.token:",
                "receipt.token != item.charged + (not self._claims[item.token].alone):",
            ),
        ),
    ),
    "at-most-once that runs after a refused settle": one(
        "start before settle",
        Scenario(guarantee=AMO, workers=2),
        "worker/beforehand.py",
        "    if refused:\n        started =",
        "    if False:\n        started =",
    ),
    "inbox row outside the transaction": one(
        "lost effect",
        Scenario(kind="queue", guarantee=EXACT),
        "stores/memory/admission.py",
        "        self._fresh[event] = (delivery, now)\n",
        "        self._fresh[event] = (delivery, now)\n        self._inbox[event] = now\n",
    ),
    "inbox row last and not unique": one(
        "duplicate effect",
        Scenario(kind="sqlite-inbox", guarantee=EXACT),
        "sql/sqlite_store.sql",
        "    primary key (flow_no, id)\n",
        "    primary key (flow_no, id, mark)\n",
    ),
    "no fence in the effects transaction": Mutation(
        "zombie commit",
        Scenario(kind="sqlite", guarantee=EXACT, workers=2),
        (
            Edit(
                "stores/sqlite/session.py",
                "held = self._run(log.fence(receipts, self._mark))",
                "held = receipts",
            ),
            Edit(
                "stores/sqlite/session.py",
                "log.settle(settlements, now_ms, self._mark)",
                "log.settle(settlements, now_ms)",
            ),
        ),
    ),
    "COMMIT retried on a new connection": one(
        "blind retry",
        Scenario(guarantee=EXACT),
        "worker/rounds.py",
        "        session.commit()\n",
        """\
        from duly.errors import CommitUnknown

        try:
            session.commit()
        except CommitUnknown:
            session.rollback()
            session = lane.begin()
            tx = Transaction(session.connection, lane.around.source)
            yield from call_within(lane, fresh_of(work, admitted), tx, session)
            published = flush(tx, session, lane.around.declare)
            session.commit()
""",
    ),
    "swallowed SQL error then commit": Mutation(
        "silent rollback",
        Scenario(kind="sqlite-inbox", guarantee=EXACT, manners=("ok", "ok", "lose once")),
        (
            Edit(
                "sql/sqlite/guard.py",
                "        connection = self.connection\n        if not connection.in_transaction:\n"
                "            raise TransactionLost(_LOST)\n",
                "        connection = self.connection\n",
            ),
            Edit(
                "sql/sqlite/guard.py",
                "        if not self.connection.in_transaction:\n"
                "            raise TransactionLost(_LOST)\n        self._take_over()\n"
                "        try:\n            if self._mark",
                "        self._take_over()\n        try:\n            if self._mark",
            ),
            Edit("sql/sqlite/guard.py", "if found != [(self._mark,)]:", "if found is None:"),
        ),
    ),
    # Everything up to the last id is taken as read, as by a cursor of ids that commit late.
    "bare id > last cursor": one(
        "lost",
        Scenario(kind="log", batch=1),
        "brokers/memory/share.py",
        "self._next = entry.offset + 1",
        "self._next = self.partition.end",
    ),
    # The two steps are those of the relay: publish, then mark as sent.
    "publish and mark in two steps without confirmation": one(
        "missing output",
        Scenario(kind="queue", guarantee=EXACT),
        "relay.py",
        "                case Published() | RepeatDropped():\n                    sent",
        "                case Published() | RepeatDropped() | PublishUnknown():\n"
        "                    sent",
    ),
    "CancelledError taken for failure": one(
        "premature settle",
        Scenario(messages=6, manners=("slow", "ok"), asynchronous=True, concurrency=4),
        "worker/calling.py",
        "            if self.abandoned and task.cancelling():\n                raise\n",
        "",
    ),
    # The position of a log, as the store keeps it.
    "position off by one": one(
        "lost effect",
        Scenario(kind="sqlite-cursor", guarantee=EXACT, batch=1),
        "sql/cursor.py",
        "moved[position.log] = Cursor(position.offset + 1, position.epoch)",
        "moved[position.log] = Cursor(position.offset + 2, position.epoch)",
    ),
    "committing the highest position while a lower one is in flight": one(
        "lost effect",
        Scenario(kind="log", guarantee=EXACT, batch=1, manners=("cancel once", "ok")),
        "brokers/memory/loggroup.py",
        "return self.ordered or self.guarantee is not Guarantee.AT_LEAST_ONCE",
        "return self.ordered",
    ),
    "inbox retention shorter than redelivery": one(
        "dedup horizon",
        Scenario(kind="queue", guarantee=EXACT, horizon=True, workers=2, preempt=0.2),
        "stores/memory/admission.py",
        "if delivery.repeated and age_ms >",
        "if delivery.repeated and age_ms > 1e9 +",
    ),
    "lease renewed while the handler hangs for ever": one(
        "stuck",
        Scenario(manners=("hang once",)),
        "worker/keeper.py",
        "if started is None or now - started <= limit_s:",
        "if started is None or now:",
    ),
    "dead letter deleted before it is inserted": one(
        "lost",
        Scenario(kind="sqlite", manners=("reject",)),
        "brokers/sqlite/lane.py",
        "        settle = self._settle_steps(settlements)\n"
        "        return self._file.write(settle, durable=self._is_to_last(settlements))\n",
        """\
        from duly.guarantees import Dead, Done
        from duly.sql.steps import Many

        dead = [s for s in settlements if isinstance(s, Dead)]
        rest = [Done(s.receipt) if isinstance(s, Dead) else s for s in settlements]

        number, now_ms = self._lanes[0].subscription_no, self._clock.wall_ms()

        def insert():
            yield Many("bury", [(number, d.receipt[1], d.error, 1, now_ms) for d in dead])

        refused = self._file.write(self._settle_steps(rest))
        self._file.write(insert)
        return refused
""",
    ),
    "delayed message promoted in two steps": Mutation(
        "unexplained duplicate",
        Scenario(kind="sqlite", workers=2, manners=("fail once",)),
        (
            Edit(
                "sql/claims.py",
                "    done = [c.position for c in chosen.messages] + chosen.lost\n",
                "    done = chosen.lost\n",
            ),
            Edit(
                "brokers/sqlite/lane.py",
                "bool(claimed.parts) or claimed.again or claimed.accused\n",
                """\
bool(claimed.parts) or claimed.again or claimed.accused
        from duly.sql.steps import Many

        def unpark():
            taken = [row[0] for part in claimed.parts for row in part.rows]
            number = self._lanes[0].subscription_no
            yield Many("unpark", [(number, position) for position in taken])

        self._file.write(unpark)
""",
            ),
        ),
    ),
    "duplicates ignored instead of settled": one(
        "stuck",
        Scenario(kind="queue", guarantee=EXACT, messages=2),
        "worker/admission.py",
        "        *(Done(delivery.receipt) for delivery in admitted.repeated),\n",
        "",
    ),
}

# What the simulation has found in duly itself, as it was before, and what else has to be seen.
OTHERS: Mapping[str, Mutation] = {
    "a relay that goes by no note": one(
        "duplicate",
        Scenario(kind="log", guarantee=EXACT),
        "relay.py",
        "        if note is not None:\n",
        "        if note is None:\n            note = _note([])\n        if not note:\n",
    ),
    # Another may have published it since, and something else after it.
    "a relay that looks before it resumes": one(
        "duplicate",
        Scenario(kind="log", guarantee=EXACT),
        "relay.py",
        "                self._make_sure(self._entrance)\n                return 0.0\n",
        "                self._make_sure(self._entrance)\n",
    ),
    "at-most-once that runs after a settle of unknown outcome": one(
        "start before settle",
        Scenario(guarantee=AMO),
        "worker/beforehand.py",
        "    except errors.BrokerUnavailable:\n        lane.keep(work)",
        "    except errors.CommitUnknown:\n        refused = set()\n"
        "    except errors.BrokerUnavailable:\n        lane.keep(work)",
    ),
    "CancelledError taken for success": one(
        "lost",
        Scenario(manners=("cancel once",)),
        "worker/calling.py",
        "            calls.done = handling.index\n            raise HandlerCancelled from error\n",
        "            calls.done = handling.index\n",
    ),
    # By claim nothing but the stamp of the fence tells that the transaction is another one.
    "stamp that the settlement does not look for": Mutation(
        "silent rollback",
        Scenario(kind="sqlite", guarantee=EXACT, manners=("ok", "ok", "lose once")),
        (
            Edit(
                "sql/sqlite/guard.py",
                "        connection = self.connection\n        if not connection.in_transaction:\n"
                "            raise TransactionLost(_LOST)\n",
                "        connection = self.connection\n",
            ),
            Edit("sql/sqlite.sql", _WHOLE_CLAIM, _WHOLE_CLAIM.replace("mark = ?4", "?4 = ?4")),
            Edit("sql/settling.py", "if mark is not None and any(", "if False and any("),
        ),
    ),
    "commit that leaves the outputs out": one(
        "missing output",
        Scenario(kind="queue", guarantee=EXACT),
        "stores/memory/session.py",
        "                self._home.send(self._messages)\n",
        "",
    ),
    "commit reported though it was refused": one(
        "silent rollback",
        Scenario(guarantee=EXACT, workers=2),
        "stores/memory/session.py",
        "            except IdentityConflict as error:\n",
        "            except DulyError:\n                return\n"
        "            except IdentityConflict as error:\n",
    ),
    "cursor that never moves": one(
        "duplicate effect",
        Scenario(kind="log", guarantee=EXACT),
        "stores/memory/admission.py",
        "for log, cursor in self._moved.items():",
        "for log, cursor in ():",
    ),
    "order lost between the tasks of one loop": one(
        "inversion",
        Scenario(
            ordered=True,
            messages=8,
            batch=3,
            manners=("slow", "slow", "fail once"),
            asynchronous=True,
            concurrency=4,
        ),
        "worker/concurrent.py",
        "                    blocking(blocked, delivery, settlement)\n",
        "                    pass\n",
    ),
    "dead that the inbox forgets": one(
        "effect of a dead letter",
        Scenario(
            kind="sqlite-inbox", guarantee=EXACT, workers=2, manners=("reject once",), preempt=0.2
        ),
        "sql/inbox.py",
        "marked.append((-delivery.replays - 1, *key, mark))",
        "forgotten.append((*key, mark))",
    ),
    "dead that a failed transaction leaves unrecorded": one(
        "effect of a dead letter",
        Scenario(
            kind="queue", guarantee=EXACT, workers=3, batch=1, manners=("lose once",), preempt=0.2
        ),
        "worker/admission.py",
        "if lane.admission is Admission.BY_CLAIM or not of_the_store:",
        "if ended:",
    ),
    # What is parked behind a cursor.
    "retry that the cursor passes and nobody keeps": one(
        "lost effect",
        Scenario(kind="sqlite-cursor", guarantee=EXACT, manners=("fail once", "ok")),
        "sql/cursor.py",
        "    if parked:\n        yield from parking.park",
        "    if dead:\n        yield from parking.park",
    ),
    "retry of a lost transaction that the log is told is done": one(
        "lost effect",
        Scenario(kind="log", guarantee=EXACT, batch=1, manners=("lose once", "ok")),
        "worker/admission.py",
        "isinstance(ended, Dead) or (parks and isinstance(ended, Retry))",
        "isinstance(ended, Dead)",
    ),
    "parked message settled without its token": Mutation(
        "duplicate effect",
        Scenario(
            kind="log", guarantee=EXACT, workers=3, manners=("fail once", "slow"), preempt=0.3
        ),
        (
            Edit(
                "stores/memory/parking.py",
                "if lost := [each for each in self._fenced if self._rows.held(each) is None]:",
                "if lost := [each for each in self._fenced if each.number < 0]:",
            ),
            Edit(
                "stores/memory/parking.py",
                "del self._rows.rows[receipt.number]",
                "self._rows.rows.pop(receipt.number, None)",
            ),
        ),
    ),
    "parked message that need not be there to end": one(
        "duplicate effect",
        Scenario(
            kind="sqlite-cursor",
            guarantee=EXACT,
            workers=3,
            batch=1,
            manners=("fail once", "slow"),
            preempt=0.3,
        ),
        "sql/parking.py",
        "if changed < len(rows):",
        "if changed < 0:",
    ),
    "key that goes on behind what admission knows to be dead": one(
        "head of line",
        Scenario(
            kind="log",
            guarantee=EXACT,
            ordered=True,
            hold=True,
            messages=6,
            workers=2,
            manners=("reject", "ok", "ok"),
        ),
        "stores/memory/admission.py",
        "(dead if given_up else repeated).append(delivery)",
        "repeated.append(delivery)",
    ),
    "key that goes on behind what is too old": one(
        "head of line",
        Scenario(
            kind="log-inbox",
            guarantee=EXACT,
            ordered=True,
            hold=True,
            messages=8,
            workers=3,
            manners=("slow",),
            horizon=True,
            preempt=0.2,
        ),
        "worker/admission.py",
        'blocking(lane.order, delivery, Dead(delivery.receipt, ""))',
        "pass",
    ),
    "claim held for longer than the inbox remembers": one(
        "duplicate effect",
        Scenario(kind="queue", guarantee=EXACT, workers=3, messages=4, horizon=True, preempt=0.2),
        "worker/admission.py",
        "if lane.admission is Admission.BY_INBOX and age_s > kept_s:",
        "if lane.admission is Admission.BY_INBOX and age_s > 1e9:",
    ),
}

MUTATIONS: Mapping[str, Mutation] = {**LISTED, **OTHERS}

"""Ticks: how messages on PostgreSQL get their positions, and why none is skipped.

The trouble. Publishers must not wait for each other, so a message is stored at a *place* from a
sequence, and its transaction commits whenever it does: place 7 may become visible after place 9
was delivered. A cursor that goes by ``place > last`` loses it. A cursor that stays below every
open transaction (``xmin``) loses nothing and stands still behind the first one that is left open.

The way out is PgQ's, with snapshots. A snapshot says of every transaction whether it was over
when it was taken. Of two, A and then B, *what is visible in B and was not in A* is settled: each
transaction in it has committed, no other will ever join it, and what commits later is in the
difference of B and some later C. A long transaction holds up itself and nobody else.

A **tick** finds that difference and gives it positions, in the order of places, behind all that
have one. From there on there is a log without gaps, and cursors and claims go by position:

1. Take the lock of the ticks. Ticks are one after the other, over all hosts.
2. In the *next* statement find what is settled. Under READ COMMITTED it has a new snapshot, B,
   taken after the tick before was committed. In one statement with the lock B might be older
   than A, and ticks would go backwards.
3. What was not visible in A: the transactions from A's ``xmax`` on, and those that A lists as in
   progress (``pg_snapshot_xip``). Both are looked up by index. A scan from A's ``xmin`` would
   find the same, and go through everything since the oldest open transaction, each time.
4. Give it positions, keep B for the next tick, commit.

Publishers write no row a message for this: `arrivals` has a row for each publish and stream,
which the tick deletes, and `runs` gets one for it, which says at which place the messages of
these positions lie. So a row is found once, however often and from whichever snapshot it is
looked for: the snapshots only say where there is no need to look. That is what keeps a tick
quick while dead rows pile up under somebody's held snapshot.

Order. If a transaction had committed before another took a place, then its place is lower, and no
snapshot shows the other one without it: it stands in the same tick at a lower place, or in an
earlier tick. So messages of a key come in the order in which their transactions followed each
other. Going by transaction id instead would invert them: an id is taken at a transaction's first
write, and it may publish long after. Of two that overlap either may be first.

- *Savepoints.* ``pg_current_xact_id()`` is the id of the whole transaction, and snapshots list
  those. The system column ``xmin`` would be that of the savepoint.
- *Two-phase commits.* A prepared transaction is listed as in progress until COMMIT PREPARED.
- *Only the primary.* A standby makes transactions visible in another order. It cannot tick: a
  tick writes.
- *Another cluster.* After a restore by ``pg_restore`` or a logical migration transaction ids
  begin anew, the stored snapshot would call new ones old, and they would never be seen. Each
  tick goes by the system identifier under which its snapshot was taken and finds none where
  that is another: `check_cluster` refuses, until somebody says that the restored database is to
  go on (`adopt`, which looks at every arrival, whatever its transaction id).
"""

from __future__ import annotations

from duly.errors import BrokerUnusable
from duly.sql.steps import Ask, Steps


def tick(system_identifier: int) -> Steps[int]:
    """Give positions to what was committed since the last tick; returns how many runs it made.

    To be run in a transaction of its own, READ COMMITTED: what the transaction itself has
    published would be counted as settled, and what it publishes afterwards never be seen.
    """
    yield Ask("lock_ticks")
    [(runs,)] = yield Ask("tick", (system_identifier,))
    if runs:
        yield Ask("forget_ticks")
    return int(runs)


def arrived() -> Steps[bool]:
    """Whether a tick would find anything; only reads."""
    [(there,)] = yield Ask("arrived")
    return bool(there)


def check_cluster(system_identifier: int, shown: str) -> Steps[None]:
    """Raise `BrokerUnusable` where the log's snapshots are those of another cluster."""
    [(known,)] = yield Ask("last_tick")
    if known != system_identifier:
        raise BrokerUnusable(
            f"{shown}: this log was made by another PostgreSQL cluster (system identifier "
            f"{known}, this one has {system_identifier}): a dump was restored here, or the data "
            "migrated. Make sure that the old one is not worked any more, or every message is "
            "handled in both places; then say that this one goes on: duly adopt URL"
        )


def adopt() -> Steps[None]:
    """Go on with a log that was restored from another cluster, losing nothing that it holds."""
    yield Ask("lock_ticks")
    yield Ask("adopt")

"""The brokers and stores that are simulated, each under a clock that passes when it is told to."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from duly.broker import Broker, Subscription
from duly.brokers.memory import MemoryDatabase, MemoryLog, MemoryQueue
from duly.errors import BrokerUnavailable
from duly.guarantees import Admission, Guarantee
from duly.inspection import DeadLetter, SubscriptionState
from duly.store import Backlog, Outbox, Parked, Store, outbox_of, with_parked
from duly.stores.memory import MemoryStore
from duly.testing.checker import Terms
from duly.testing.history import About, Dead, Row, about
from duly.testing.simulation.scenario import Scenario

LEASE_S = 6.0
ATTEMPTS = 3
LONGEST_BACKOFF_S = 4.0
HORIZON_S = 12.0
MAX_RUN_S = 15.0
TABLES = ("one", "two")
# The simulation's time begins here, so that wall time and monotonic time can be one number.
BEGIN_S = 1_700_000_000.0


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self, begin_s: float = BEGIN_S) -> None:
        self.now = begin_s

    def __call__(self) -> float:
        return self.now

    def wall_ms(self) -> int:
        """The same in milliseconds."""
        return int(self.now * 1000)


# What is simulated here is processes that die; for disks there are the images of lost power.
_SHM = Path("/dev/shm")
_IN_MEMORY = _SHM if _SHM.is_dir() and os.access(_SHM, os.W_OK) else None

Insert = Callable[[Any, str, str, About], None]
"""Writes a row: connection, table, run, message."""


@dataclass(slots=True)
class At:
    """Whom to tell that a call has come to a point within."""

    point: Callable[[str], None] = lambda _: None


@dataclass(slots=True)
class Place:
    """Where a simulation takes place.

    ``lose`` lets the database roll a transaction back by itself. ``bury`` tells the broker at
    once that a lane's process died, where it can know. ``locks``: an open transaction keeps
    everybody else out of the file. ``outbox`` is there where the broker is another database,
    ``parked`` where it is a log. ``at``: where the place itself says that it is in the middle of
    a call. ``idle_s``: how long whoever has found nothing waits before looking again, where a look
    is dear.
    """

    broker: Broker
    store: Store
    admission: Admission
    insert: Insert
    lose: Callable[[Any], None]
    rows: Callable[[], list[Row]]
    states: Callable[[], Sequence[SubscriptionState]]
    dead: Callable[[], list[Dead]]
    bury: Callable[[Subscription], None]
    locks: bool = False
    outbox: Outbox | None = None
    parked: Parked | None = None
    at: At = field(default_factory=At)
    idle_s: float = 0.0

    def parks(self, scenario: Scenario) -> bool:
        """Whether what a consumer has to try again waits in the store."""
        return (
            self.parked is not None
            and scenario.guarantee == "exactly-once"
            and not scenario.ordered
        )

    def all_states(self) -> Sequence[SubscriptionState]:
        """What is left to do, at the broker and in the store."""
        return (
            self.states()
            if self.parked is None
            else with_parked(self.states(), self.parked.waiting())
        )

    def leaks(self) -> list[str]:
        """What is left open."""
        try:
            self.store.begin(None).rollback()
        except BrokerUnavailable as error:
            return [f"a transaction is still open: {error}"]
        if self.outbox is not None and self.outbox.backlog() != Backlog(0, 0, None):
            return [f"the outbox still holds {self.outbox.backlog()}"]
        return []


@contextmanager
def place(scenario: Scenario, clock: Clock) -> Iterator[Place]:
    """The place of a scenario, for as long as it lasts."""
    match scenario.kind:
        case "database":
            database = MemoryDatabase(clock=clock, wall_ms=clock.wall_ms)
            yield _in_memory(
                database,
                MemoryStore(database, clock=clock, wall_ms=clock.wall_ms, begin_s=0.0),
                Admission.BY_CLAIM,
            )
        case "log":
            log = MemoryLog(clock=clock, wall_ms=clock.wall_ms)
            yield _in_memory(log, _apart(clock), Admission.BY_CURSOR)
        case "log-inbox":
            log = MemoryLog(clock=clock, wall_ms=clock.wall_ms)
            yield _in_memory(log, _apart(clock), Admission.BY_INBOX)
        case "queue":
            queue = MemoryQueue(clock=clock, wall_ms=clock.wall_ms)
            yield _in_memory(queue, _apart(clock), Admission.BY_INBOX)
        case "sqlite" | "sqlite-inbox" | "sqlite-cursor":
            from duly.testing.simulation.sqlite import sqlite_place

            with ExitStack() as stack:
                folder = Path(
                    stack.enter_context(TemporaryDirectory(prefix="duly-", dir=_IN_MEMORY))
                )
                yield stack.enter_context(sqlite_place(folder, clock, scenario.kind))
        case "postgres" | "postgres-inbox" | "postgres-cursor":
            from duly.testing.simulation.postgres import postgres_place

            with postgres_place(clock, scenario.kind) as there:
                yield there


def _apart(clock: Clock) -> MemoryStore:
    return MemoryStore(clock=clock, wall_ms=clock.wall_ms, begin_s=0.0)


def _in_memory(
    broker: MemoryDatabase | MemoryLog | MemoryQueue, store: MemoryStore, admission: Admission
) -> Place:
    return Place(
        broker,
        store,
        admission,
        insert=_insert,
        lose=lambda connection: connection.rollback(),
        rows=lambda: [
            Row(table, About(*value), run)
            for table in TABLES
            for run, value in store.rows(table).items()
            if isinstance(run, str)
        ],
        states=broker.subscriptions,
        dead=lambda: [*dead_of(broker), *_dead_in(store)],
        bury=broker.crash,
        outbox=outbox_of(store),
        parked=store.parked if admission is Admission.BY_CURSOR else None,
    )


def _insert(connection: Any, table: str, run: str, message: About) -> None:
    connection.insert(
        table, run, (message.topic, message.source, message.id, message.key, message.content)
    )


class Buries(Protocol):
    """A broker that tells what it gave up on."""

    def dead_letters(
        self, subscription: str | None = None, limit: int = 100
    ) -> Sequence[DeadLetter]:
        """As `Inspection.dead_letters`."""
        ...


def dead_of(broker: Buries) -> list[Dead]:
    """A broker's dead letters, as a history has them."""
    return [
        Dead(letter.subscription, about(letter.message), letter.attempts, letter.error)
        for letter in broker.dead_letters(limit=10_000)
    ]


def _dead_in(store: MemoryStore) -> list[Dead]:
    return [
        Dead(dead.subscription, about(dead.message), dead.attempts, dead.error)
        for dead in store.dead_letters("c")
    ]


def terms_of(scenario: Scenario, place: Place) -> Terms:
    """What is promised here, and what the broker's nature excepts."""
    can = place.broker.capabilities
    guarantee = Guarantee(scenario.guarantee)
    exactly = guarantee is Guarantee.EXACTLY_ONCE
    return Terms(
        guarantee,
        admission=place.admission if exactly else None,
        # Settled before it runs, a message no longer holds up the next of its key: another
        # worker may start that one meanwhile. One worker alone keeps the order.
        order_by_key=scenario.ordered and guarantee is not Guarantee.AT_MOST_ONCE,
        hold_key_on_dead=scenario.hold,
        attempts=ATTEMPTS,
        inbox_retention_s=HORIZON_S if scenario.horizon else 7 * 86400.0,
        drops_repeats=can.identity_retention and exactly,
        relays_once=can.relays_once and exactly,
        keeps_send_order=can.confirms_settlement,
        # A log commits a prefix: what is done behind a gap comes again with a new owner, and
        # the log itself counts no starts.
        confirms_settlement=can.confirms_settlement and not can.is_log,
        keeps_attempts=not can.is_log,
        holds_partition=can.retries_in_place
        and not place.parks(scenario)
        and scenario.key_lanes == 1,
        may_duplicate=not can.confirms_settlement,
        tables=TABLES if exactly else (),
        has_output=exactly,
        batch_handler=scenario.batch_handler,
        # A microsecond less, for a timer is due when its time is nearly there.
        max_run_s=MAX_RUN_S - 1e-5,
    )

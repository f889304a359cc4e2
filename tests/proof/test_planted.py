"""Bugs planted into broker, store or worker, each caught by the name of what it breaks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from duly.brokers.memory.group import Group
from duly.brokers.memory.lane import Claims
from duly.brokers.memory.loggroup import LogGroup
from duly.brokers.memory.share import Share
from duly.errors import BrokerUnavailable, CommitUnknown
from duly.guarantees import Done, Guarantee
from duly.stores.memory.admission import ByCursor, ByInbox
from duly.stores.memory.session import MemorySession
from duly.testing.simulation.campaign import crashes, one_of, random_schedules
from duly.testing.simulation.run import Outcome
from duly.testing.simulation.scenario import Scenario
from duly.worker import lane as lane_module
from duly.worker.calling import Caller
from duly.worker.lane import Lane

Patch = pytest.MonkeyPatch


def settle_before_the_handler(patch: Patch) -> None:
    patch.setitem(
        lane_module.ROUNDS,
        Guarantee.AT_LEAST_ONCE,
        lane_module.ROUNDS[Guarantee.AT_MOST_ONCE],
    )


def settle_by_id_alone(patch: Patch) -> None:
    def held(self: Group, receipt: Any) -> Any:
        item = self._items.get(receipt.position)
        return item if item is not None and item.token in self._claims else None

    patch.setattr(Group, "held", held)


def no_fence_in_the_transaction(patch: Patch) -> None:
    def forget(self: Claims, receipts: Any) -> None: ...

    def settle_what_is_held(self: Group, settlements: Any, now: float) -> Any:
        return settle(self, [s for s in settlements if self.held(s.receipt)], now)

    settle = Group.settle
    patch.setattr(Claims, "check_held", forget)
    patch.setattr(Group, "settle", settle_what_is_held)


def inbox_row_outside_the_transaction(patch: Patch) -> None:
    admit = ByInbox.admit

    def admit_and_remember(self: ByInbox, deliveries: Any) -> Any:
        admitted = admit(self, deliveries)
        self._inbox.update({event: known for event, (_, known) in self._fresh.items()})
        return admitted

    patch.setattr(ByInbox, "admit", admit_and_remember)


def runs_after_a_refused_settle(patch: Patch) -> None:
    settle_before = Lane.settle_before

    def start_all(self: Lane, work: Any) -> Any:
        settle_before(self, work)
        return work

    patch.setattr(Lane, "settle_before", start_all)


def runs_after_an_unknown_settle(patch: Patch) -> None:
    settle_before = Lane.settle_before

    def start_all(self: Lane, work: Any) -> Any:
        try:
            return settle_before(self, work)
        except CommitUnknown:
            return work

    patch.setattr(Lane, "settle_before", start_all)


def duplicates_ignored_instead_of_settled(patch: Patch) -> None:
    settle = Lane.settle_after_commit

    def only_what_ran(self: Lane, settlements: Any) -> Any:
        ran = {delivery.receipt for delivery, _ in self.in_round}
        kept = [s for s in settlements if s.receipt in ran and not repeated(self, s)]
        yield from settle(self, kept)

    def repeated(self: Lane, settlement: Any) -> bool:
        return any(
            d.receipt == settlement.receipt and d.repeated for d, _ in self.in_round
        ) and isinstance(settlement, Done)

    patch.setattr(Lane, "settle_after_commit", only_what_ran)


def cancelled_taken_for_success(patch: Patch) -> None:
    call_in_turn = Caller._call_in_turn

    def swallow(self: Caller, calls: Any, handling: Any) -> None:
        try:
            call_in_turn(self, calls, handling)
        except asyncio.CancelledError:
            calls.done += 1

    patch.setattr(Caller, "_call_in_turn", swallow)


def position_off_by_one(patch: Patch) -> None:
    def ahead(self: Share, offset: int) -> None:
        done(self, offset)
        if offset + 1 == self.committed and self.partition.at(self.committed) is not None:
            self.committed += 1
            self._next = max(self._next, self.committed)

    done = Share.done
    patch.setattr(Share, "done", ahead)


def cursor_passes_what_is_in_flight(patch: Patch) -> None:
    patch.setattr(LogGroup, "_in_turns", property(lambda self: self.ordered))


def commit_cuts_off_the_outputs(patch: Patch) -> None:
    commit = MemorySession.commit

    def lose_outputs(self: MemorySession) -> None:
        self._messages.clear()
        commit(self)

    patch.setattr(MemorySession, "commit", lose_outputs)


def commit_reported_though_rolled_back(patch: Patch) -> None:
    commit = MemorySession.commit

    def swallow(self: MemorySession) -> None:
        try:
            commit(self)
        except (BrokerUnavailable, CommitUnknown):
            raise
        except Exception:
            self.rollback()

    patch.setattr(MemorySession, "commit", swallow)


def cursor_never_moves(patch: Patch) -> None:
    patch.setattr(ByCursor, "apply", lambda self: None)


AMO: Any = "at-most-once"
ALO: Any = "at-least-once"
EXACT: Any = "exactly-once"

PLANTED: list[tuple[Callable[[Patch], None], str, Scenario]] = [
    (settle_before_the_handler, "premature settle", Scenario(guarantee=ALO)),
    (settle_by_id_alone, "zombie commit", Scenario(guarantee=EXACT, workers=2, preempt=0.2)),
    (no_fence_in_the_transaction, "zombie commit", Scenario(guarantee=EXACT, workers=2)),
    (inbox_row_outside_the_transaction, "lost effect", Scenario(kind="queue", guarantee=EXACT)),
    (runs_after_a_refused_settle, "start before settle", Scenario(guarantee=AMO, workers=2)),
    (runs_after_an_unknown_settle, "start before settle", Scenario(guarantee=AMO)),
    (
        duplicates_ignored_instead_of_settled,
        "stuck",
        Scenario(kind="queue", guarantee=EXACT, messages=2),
    ),
    (cancelled_taken_for_success, "lost", Scenario(manners=("cancel once",))),
    (position_off_by_one, "lost", Scenario(kind="log")),
    (
        cursor_passes_what_is_in_flight,
        "lost effect",
        Scenario(kind="log", guarantee=EXACT, batch=1, manners=("cancel once", "ok")),
    ),
    (commit_cuts_off_the_outputs, "missing output", Scenario(guarantee=EXACT)),
    (
        commit_reported_though_rolled_back,
        "silent rollback",
        Scenario(guarantee=EXACT, workers=2),
    ),
    (cursor_never_moves, "duplicate effect", Scenario(kind="log", guarantee=EXACT)),
]


def schedules(scenario: Scenario) -> Iterator[Outcome]:
    """First every single crash, then random ones."""
    yield from crashes(scenario, pairs=False)
    for seed in range(1_500):
        yield one_of(scenario, seed)


@pytest.mark.parametrize(
    ("plant", "name", "scenario"), PLANTED, ids=[plant.__name__ for plant, _, _ in PLANTED]
)
def test_it_is_caught_by_name(
    monkeypatch: Patch, plant: Callable[[Patch], None], name: str, scenario: Scenario
) -> None:
    clean = [o for o, _ in zip(schedules(scenario), range(60), strict=False)]
    assert not any(o.judgement.anomalies for o in clean), "nothing is found before it is planted"
    plant(monkeypatch)
    found: set[str] = set()
    for outcome in schedules(scenario):
        found |= outcome.judgement.names()
        if name in found:
            return
    pytest.fail(f"{name!r} was not found, but {sorted(found)}")


def test_random_schedules_catch_one_too(monkeypatch: Patch) -> None:
    settle_before_the_handler(monkeypatch)
    found = set[str]()
    for outcome in random_schedules(0, 300):
        found |= outcome.judgement.names()
    assert {"premature settle", "lost"} <= found

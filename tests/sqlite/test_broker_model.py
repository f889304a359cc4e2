"""The broker beside a plain Python model of a queue, under random operations."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from duly.broker import Delivery
from duly.brokers.sqlite import SQLiteBroker
from duly.guarantees import Dead, Done, Release, Retry
from duly.message import Topic
from tests.sqlite.brokers import Hands, execute, messages, options

LEASE_S = 30
CLAIM = (Done, Retry, Dead, Release)


@dataclass
class Entry:
    """What the model knows of one message of one subscription."""

    body: str
    state: str = "waiting"  # waiting, claimed, done, dead
    due_ms: int = 0  # by the wall clock, as published
    retry_ms: int = 0  # by the time since boot, as asked for
    attempt: int = 1
    suspect: bool = False
    accused: bool = False
    repeated: bool = False
    token: Any = None
    until_ms: int = 0
    asked_for_one: bool = False
    given_out_alone: bool = False
    left_alone: bool = False


class Queue(RuleBasedStateMachine):
    """Two lanes of one subscription; leases are lost by moving the clock."""

    broker: SQLiteBroker
    hands: Hands
    numbers: Iterator[int]

    @initialize()
    def start(self) -> None:
        name = f"q{next(self.numbers)}"
        self.topic = Topic(name, bytes, guarantee="at-least-once")
        self.name = name
        self.broker.declare([self.topic])
        self.entries: dict[str, Entry] = {}
        self.receipts: dict[Any, str] = {}
        self.lanes = [self._lane(), self._lane()]
        self.published = itertools.count()

    def _lane(self) -> Any:
        return self.broker.subscribe([self.topic], self.name, options(lease_s=LEASE_S))

    @rule(count=st.integers(1, 12), delay_s=st.sampled_from([0, 0, 0, 5]))
    def publish(self, count: int, delay_s: int) -> None:
        bodies = [str(next(self.published)) for _ in range(count)]
        due_ms = self.hands.wall + delay_s * 1000 if delay_s else None
        self.broker.publish(messages(self.topic, bodies, due_ms=due_ms))
        for body in bodies:
            self.entries[body] = Entry(body, due_ms=due_ms or 0)

    @rule(lane=st.integers(0, 1), limit=st.sampled_from([1, 2, 5, 100]))
    def claim(self, lane: int, limit: int) -> None:
        self._lose_leases()
        got = self.lanes[lane].claim(limit, 1 << 30, 0)
        waiting = [e for e in self.entries.values() if self._is_due(e)]
        held = [e for e in self.entries.values() if e.state == "claimed"]
        # While one is accused the lanes may have to wait until the worker has nothing else.
        accused = any(e.accused and e.state in ("waiting", "claimed") for e in waiting + held)
        assert bool(got) == bool(waiting) or (accused and not got)
        assert not any(self._entry(d).accused for d in got) or not held
        assert len(got) <= limit
        for delivery in got:
            self._check(delivery, got)
            entry = self.entries[delivery.message.body.decode()]
            entry.state, entry.token = "claimed", delivery.receipt
            entry.due_ms = entry.retry_ms = 0
            entry.until_ms = self.hands.boot + LEASE_S * 1000
            entry.asked_for_one = limit == 1
            entry.given_out_alone, entry.left_alone = delivery.alone, False
            self.receipts[delivery.receipt] = entry.body

    def _check(self, delivery: Delivery, beside: Sequence[Delivery]) -> None:
        entry = self.entries[delivery.message.body.decode()]
        assert self._is_due(entry), f"{entry} was given out"
        assert delivery.attempt == entry.attempt
        assert delivery.repeated == entry.repeated
        assert delivery.alone == entry.suspect
        assert not delivery.alone or len(beside) == 1
        assert delivery.receipt not in self.receipts

    def _entry(self, delivery: Delivery) -> Entry:
        return self.entries[delivery.message.body.decode()]

    def _is_due(self, entry: Entry) -> bool:
        is_due = entry.due_ms <= self.hands.wall and entry.retry_ms <= self.hands.boot
        return entry.state == "waiting" and is_due

    def _lose_leases(self) -> None:
        """What the claimer finds lost, as it does when it looks before claiming."""
        claimed = [e for e in self.entries.values() if e.state == "claimed"]
        lost = [e for e in claimed if e.until_ms <= self.hands.boot]
        for entry in lost:
            by_itself = entry.given_out_alone or entry.asked_for_one
            charged = by_itself and len(claimed) == 1
            entry.attempt += charged
            accused = entry.given_out_alone and (entry.accused or not charged)
            entry.accused = accused or entry.left_alone
            entry.state, entry.suspect, entry.repeated = "waiting", True, True
        if lost:  # the others stood still with it
            for entry in claimed:
                if entry.state == "claimed":
                    entry.left_alone |= entry.given_out_alone
                    entry.given_out_alone = entry.asked_for_one = entry.accused = False

    @precondition(lambda self: self.receipts)
    @rule(data=st.data(), whole=st.booleans())
    def settle(self, data: st.DataObject, whole: bool) -> None:
        lane = self.lanes[data.draw(st.integers(0, 1))]
        known = sorted(self.receipts)
        if whole:
            token = data.draw(st.sampled_from(sorted({t for t, _ in known})))
            chosen: list[tuple[Any, Any]] = [(r, Done) for r in known if r[0] == token]
        else:
            kinds = st.sampled_from(CLAIM)
            some = st.lists(st.sampled_from(known), min_size=1, max_size=12, unique=True)
            chosen = [(r, data.draw(kinds)) for r in data.draw(some)]
        refused = lane.settle([self._settlement(kind, r) for r, kind in chosen])
        expected = [r for r, _ in chosen if self._holder(r) is None]
        assert sorted(refused) == sorted(expected)
        for receipt, kind in chosen:
            entry = self._holder(receipt)
            if entry is not None:
                self._end(entry, kind)

    @staticmethod
    def _settlement(kind: Any, receipt: Any) -> Any:
        if kind is Retry:
            return Retry(receipt, 2.0, "boo")
        return Dead(receipt, "no") if kind is Dead else kind(receipt)

    def _holder(self, receipt: Any) -> Entry | None:
        """The entry that is still claimed under this receipt, as the file has it."""
        entry = self.entries[self.receipts[receipt]]
        return entry if entry.state == "claimed" and entry.token == receipt else None

    def _end(self, entry: Entry, kind: Any) -> None:
        entry.token = None
        if kind is Done or kind is Dead:
            entry.state = "done" if kind is Done else "dead"
        else:
            entry.state = "waiting"
        if kind is Retry:
            entry.attempt += 1
            entry.suspect, entry.accused, entry.repeated = False, False, True
            entry.due_ms, entry.retry_ms = 0, self.hands.boot + 2000

    @precondition(lambda self: self.receipts)
    @rule(data=st.data())
    def extend(self, data: st.DataObject) -> None:
        chosen = data.draw(
            st.lists(st.sampled_from(sorted(self.receipts)), min_size=1, max_size=8, unique=True)
        )
        lost = self.lanes[0].extend(chosen, LEASE_S)
        assert sorted(lost) == sorted(r for r in chosen if self._holder(r) is None)
        for receipt in chosen:
            if (entry := self._holder(receipt)) is not None:
                entry.until_ms = self.hands.boot + LEASE_S * 1000

    @rule(seconds=st.sampled_from([1, 3, 10]))
    def advance(self, seconds: int) -> None:
        self.hands.advance(seconds)

    @precondition(lambda self: any(e.state == "claimed" for e in self.entries.values()))
    @rule(lane=st.integers(0, 1), limit=st.sampled_from([1, 2, 5, 100]))
    def lose_leases_and_claim(self, lane: int, limit: int) -> None:
        self.hands.advance(LEASE_S + 1)
        self.claim(lane, limit)

    @rule(hour=st.sampled_from([-1, 1]))
    def step_the_wall_clock(self, hour: int) -> None:
        self.hands.wall += hour * 3_600_000

    @precondition(lambda self: self.receipts)
    @rule(lane=st.integers(0, 1))
    def close_and_open_a_lane(self, lane: int) -> None:
        number = self.lanes[lane]._lanes[0].lane
        rows = execute(
            self.broker, "select token, first, last from duly_claims where lane = ?", number
        )
        self.lanes[lane].close()
        self.lanes[lane] = self._lane()
        held = {(token, p) for token, first, last in rows for p in range(first, last + 1)}
        for receipt in held:
            entry = self._holder(receipt)
            assert entry is not None
            entry.state, entry.token, entry.repeated = "waiting", None, True

    @precondition(lambda self: self.receipts)
    @rule()
    def sweep(self) -> None:
        self.broker._sweeper._sweep()

    @invariant()
    def the_file_agrees(self) -> None:
        if not hasattr(self, "entries"):
            return
        [state] = [s for s in self.broker.subscriptions() if s.name == self.name]
        states = [entry.state for entry in self.entries.values()]
        assert state.in_flight == states.count("claimed")
        assert state.dead == states.count("dead")
        assert state.backlog + state.parked == states.count("waiting")

    def teardown(self) -> None:
        if not hasattr(self, "entries"):
            return
        for lane in self.lanes:
            lane.close()
        self.hands.advance(3600)
        self.hands.wall = max([self.hands.wall, *(e.due_ms for e in self.entries.values())])
        lane = self._lane()
        while got := lane.claim(7, 1 << 30, 0):
            for delivery in got:
                body = delivery.message.body.decode()
                assert self.entries[body].state in ("waiting", "claimed")
                self.entries[body].state = "done"
            assert lane.settle([Done(d.receipt) for d in got]) == []
        assert {entry.state for entry in self.entries.values()} <= {"done", "dead"}
        [state] = [s for s in self.broker.subscriptions() if s.name == self.name]
        assert state.is_drained
        lane.close()


def test_the_broker_is_a_queue(tmp_path: Path):
    hands = Hands()
    broker = SQLiteBroker(tmp_path / "duly.db", clock=hands.clock())
    namespace = {"broker": broker, "hands": hands, "numbers": itertools.count()}
    machine: Any = type("OneQueue", (Queue,), namespace)
    machine.TestCase.settings = settings(
        max_examples=150, stateful_step_count=60, suppress_health_check=[HealthCheck.too_slow]
    )
    machine.TestCase().runTest()
    broker.close()


if __name__ == "__main__":
    pytest.main([__file__])

"""Order by key: no inversion, no overlap, no skip; and what a dead letter does to its key."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from duly.broker import Delivery
from duly.brokers.sqlite import SQLiteBroker
from duly.guarantees import Dead, Done, Release, Retry
from duly.message import Topic
from tests.sqlite.brokers import (
    KEYED,
    Hands,
    bodies,
    claim,
    done,
    drain,
    execute,
    leftovers,
    messages,
    opened,
    options,
    publish,
    receipts,
)

ONE = Topic("one-stream", bytes, guarantee="at-least-once", partitions=1)


def ordered(broker: SQLiteBroker, topic: Topic[Any] = ONE, **given: Any) -> Any:
    return broker.subscribe([topic], "s", options(order_by_key=True, **given))


def test_one_claim_at_a_time_for_each_stream(db_path: Path):
    broker = opened(db_path, KEYED)
    for i in range(40):
        publish(broker, KEYED, [i], key=f"k{i % 8}")
    one, two = ordered(broker, KEYED), ordered(broker, KEYED)
    first = claim(one, 5)
    second = claim(two, 50)
    assert {d.receipt[1] >> 40 for d in first} != {d.receipt[1] >> 40 for d in second}
    assert claim(one) == []
    one.settle(done(first[:4]))
    assert claim(two) == []
    one.settle(done(first[4:]))
    assert claim(two, 5) != []


def test_a_key_waits_for_its_retry_and_others_do_not(db_path: Path):
    hands = Hands()
    broker = opened(db_path, ONE, hands=hands)
    for i, key in enumerate("aabab"):
        publish(broker, ONE, [f"{key}{i}"], key=key)
    lane = ordered(broker)
    got = claim(lane, 2)
    lane.settle([Retry(got[0].receipt, 5, "boo"), Release(got[1].receipt)])
    publish(broker, ONE, ["a5"], key="a")
    publish(broker, ONE, ["none"])
    assert drain(lane) == ["b2", "b4", "none"]
    hands.advance(6)
    again = claim(lane)
    # The whole key comes, in order, as it is done with waiting.
    assert bodies(again) == ["a0", "a1", "a3", "a5"]
    assert [d.attempt for d in again] == [2, 1, 1, 1]
    lane.settle(done(again))
    assert leftovers(broker) == {"duly_claims": 0, "duly_parked": 0}


def test_a_key_goes_on_when_the_message_before_is_done(db_path: Path):
    broker = opened(db_path, ONE)
    publish(broker, ONE, ["a0", "a1"], key="a")
    lane = ordered(broker)
    [first] = claim(lane, 1)
    lane.settle([Retry(first.receipt, 0, "boo")])
    [first] = claim(lane, 1)
    assert bodies([first]) == ["a0"]
    lane.settle(done([first]))
    assert drain(lane) == ["a1"]


def test_a_delayed_message_holds_its_key(db_path: Path):
    hands = Hands()
    broker = opened(db_path, ONE, hands=hands)
    publish(broker, ONE, ["a0"], key="a", due_ms=hands.wall + 5000)
    publish(broker, ONE, ["a1"], key="a")
    publish(broker, ONE, ["a2"], key="a", due_ms=hands.wall + 9000)
    publish(broker, ONE, ["b0"], key="b")
    lane = ordered(broker)
    assert drain(lane) == ["b0"]
    hands.advance(5.5)
    assert drain(lane) == ["a0", "a1"]
    hands.advance(5)
    assert drain(lane) == ["a2"]


def test_after_a_dead_letter_its_key_goes_on(db_path: Path):
    broker = opened(db_path, ONE)
    publish(broker, ONE, ["a0", "a1"], key="a")
    lane = ordered(broker)
    [first] = claim(lane, 1)
    lane.settle([Dead(first.receipt, "no")])
    assert drain(lane) == ["a1"]


def test_after_a_dead_letter_its_key_is_held_where_asked(db_path: Path):
    broker = opened(db_path, ONE)
    publish(broker, ONE, ["a0", "a1", "a2"], key="a")
    publish(broker, ONE, ["b0"], key="b")
    lane = ordered(broker, hold_key_on_dead=True)
    got = claim(lane, 2)
    lane.settle([Dead(got[0].receipt, "no"), Release(got[1].receipt)])
    publish(broker, ONE, ["a3"], key="a")
    assert drain(lane) == ["b0"]
    assert drain(ordered(broker, hold_key_on_dead=True)) == []
    execute(broker, "delete from duly_dead")  # as discarding it does
    assert drain(ordered(broker, hold_key_on_dead=True)) == ["a1", "a2", "a3"]


def test_a_consumer_that_no_longer_asks_for_order_gets_what_waited(db_path: Path):
    hands = Hands()
    broker = opened(db_path, ONE, hands=hands)
    publish(broker, ONE, ["a0", "a1"], key="a")
    lane = ordered(broker)
    [first] = claim(lane, 1)
    lane.settle([Retry(first.receipt, 3600, "boo")])
    assert claim(lane) == []
    lane.close()
    assert drain(broker.subscribe([ONE], "s", options())) == ["a1"]


def test_a_long_blocked_key_costs_the_others_little(db_path: Path):
    hands = Hands()
    broker = opened(db_path, ONE, hands=hands)
    publish(broker, ONE, ["a"], key="a")
    lane = ordered(broker)
    lane.settle([Retry(r, 3600, "boo") for r in receipts(claim(lane))])
    publish(broker, ONE, range(300), key="a")
    publish(broker, ONE, ["b"], key="b")
    assert drain(lane) == ["b"]
    hands.advance(3601)
    assert drain(lane, 100) == ["a", *map(str, range(300))]


# --- random lives ---------------------------------------------------------------------------------


class World:
    """Publishers, lanes that fail in every way, and one checker for each property."""

    def __init__(self, broker: SQLiteBroker, hands: Hands, seed: int, *, hold: bool) -> None:
        self.broker, self.hands, self.hold = broker, hands, hold
        self.chance = random.Random(seed)
        self.topic = Topic(f"t{seed}-{hold}", bytes, guarantee="at-least-once", partitions=2)
        broker.declare([self.topic])
        self.numbers = itertools.count()
        self.by_key: dict[str | None, list[str]] = {}
        self.key_of: dict[str, str | None] = {}
        self.ended: dict[str, str] = {}
        self.live: list[list[Delivery]] = []
        self.lanes = [self._lane() for _ in range(3)]

    def _lane(self) -> Any:
        return self.broker.subscribe(
            [self.topic],
            self.topic.name,
            options(order_by_key=True, hold_key_on_dead=self.hold, lease_s=30),
        )

    def publish(self) -> None:
        for _ in range(self.chance.randint(1, 8)):
            key = self.chance.choice(["a", "b", "c", "d", None])
            body = str(next(self.numbers))
            late = self.chance.random() < 0.1
            due_ms = self.hands.wall + 3000 if late else None
            self.broker.publish(messages(self.topic, [body], key=key, due_ms=due_ms))
            self.by_key.setdefault(key, []).append(body)
            self.key_of[body] = key

    def claim(self) -> None:
        lane = self.chance.choice(self.lanes)
        got = list(lane.claim(self.chance.choice([1, 3, 20]), 1 << 30, 0))
        if got:
            self.check_claim(got)
            self.live.append(got)

    def check_claim(self, got: Sequence[Delivery]) -> None:
        claimed_elsewhere = {self.key_of[b] for other in self.live for b in bodies(other)}
        seen: set[str] = set()
        for body in bodies(got):
            key = self.key_of[body]
            assert body not in self.ended, "a settled message came again"
            if key is not None:
                assert key not in claimed_elsewhere, f"overlap of key {key}"
                self.check_nothing_before(body, key, seen)
            seen.add(body)

    def check_nothing_before(self, body: str, key: str, seen: set[str]) -> None:
        for earlier in self.by_key[key]:
            if earlier == body:
                return
            assert earlier in seen or earlier in self.ended, f"{body} came before {earlier}"
            if self.hold:
                assert self.ended.get(earlier) != "dead", f"{body} came past a dead {earlier}"

    def work(self) -> None:
        """Run some of a claim as a lane would: once a key failed, its later ones are released."""
        if not self.live:
            return
        got = self.live.pop(self.chance.randrange(len(self.live)))
        stop = self.chance.randint(0, len(got))
        failed: set[str | None] = set()
        ends: list[Any] = []
        for delivery in got[:stop]:
            key, body = delivery.message.key, delivery.message.body.decode()
            roll = self.chance.random()
            if key is not None and key in failed:
                ends.append(Release(delivery.receipt))
            elif roll < 0.7:
                ends.append(Done(delivery.receipt))
                self.ended[body] = "done"
            elif roll < 0.8:
                ends.append(Dead(delivery.receipt, "no"))
                self.ended[body] = "dead"
                failed |= {key} if self.hold else set()
            else:
                delay_s = self.chance.choice([0, 0, 2])
                ends.append(Retry(delivery.receipt, delay_s, "boo"))
                failed.add(key)
        if self.chance.random() < 0.3:
            rest = got[stop:]
            stop = len(got)
            ends += [Release(d.receipt) for d in rest]
        for some in self._in_calls(ends):
            assert self.chance.choice(self.lanes).settle(some) == []
        if got[stop:]:
            self.live.append(got[stop:])
            if failed or self.chance.random() < 0.5:
                self.lose_all()

    def _in_calls(self, ends: list[Any]) -> list[list[Any]]:
        if self.chance.random() < 0.5:
            return [ends]
        return [[end] for end in ends]

    def lose_all(self) -> None:
        self.hands.advance(31)
        self.live.clear()

    def restart_lane(self) -> None:
        i = self.chance.randrange(3)
        gone = self.lanes[i]._lanes[0].lane
        rows = execute(self.broker, "select token from duly_claims where lane = ?", gone)
        tokens = {token for (token,) in rows}
        self.lanes[i].close()
        self.live = [got for got in self.live if got[0].receipt[0] not in tokens]
        self.lanes[i] = self._lane()

    def live_on(self, steps: int) -> None:
        acts = [self.publish, self.claim, self.claim, self.work, self.work, self.lose_all]
        acts += [self.restart_lane, lambda: self.hands.advance(1)]
        for _ in range(steps):
            act = self.chance.choices(acts, weights=[3, 3, 3, 4, 4, 0.3, 0.3, 1])[0]
            act()

    def finish(self) -> None:
        """Without faults all that may be handled is handled."""
        self.lose_all()
        empty = 0
        for _ in range(1000):
            self.hands.advance(5)
            got = self.lanes[0].claim(50, 1 << 30, 0)
            # Nothing may come for as long as the worker was kept for one message before.
            empty = 0 if got else empty + 1
            if empty > 100:
                break
            self.check_claim(got)
            assert self.lanes[0].settle(done(got)) == []
            self.ended |= dict.fromkeys(bodies(got), "done")
        assert self.key_of.keys() - self.ended.keys() == self.held()

    def held(self) -> set[str]:
        if not self.hold:
            return set()
        held: set[str] = set()
        for key, mine in self.by_key.items():
            dead = [i for i, body in enumerate(mine) if self.ended.get(body) == "dead"]
            if dead and key is not None:
                held |= {body for body in mine[dead[0] :] if body not in self.ended}
        return held


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("seed", range(25))
def test_keys_keep_their_order_through_everything(db_path: Path, seed: int, hold: bool):
    hands = Hands()
    broker = SQLiteBroker(db_path, clock=hands.clock())
    world = World(broker, hands, seed, hold=hold)
    world.live_on(120)
    world.finish()
    broker.close()

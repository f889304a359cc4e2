"""Settling: how a claim ends, what fences it, who may no longer, and who is charged."""

from __future__ import annotations

import dataclasses
import random
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from duly.brokers.sqlite import Clock, SQLiteBroker
from duly.errors import TransactionLost
from duly.guarantees import Admission, Dead, Done, Release, Retry
from duly.sql import log
from duly.sql.sqlite import boot_id
from duly.sql.sqlite.driver import StatementRunner
from duly.store import Scope
from duly.stores.sqlite import SQLiteStore
from tests.sqlite.brokers import (
    PLAIN,
    Hands,
    bodies,
    claim,
    done,
    drain,
    execute,
    leftovers,
    opened,
    options,
    publish,
    receipts,
)

NOTHING = {"duly_claims": 0, "duly_parked": 0}


def lane_of(broker: SQLiteBroker, **given: Any) -> Any:
    return broker.subscribe([PLAIN], "s", options(**given))


def test_done_is_over_for_good(db_path: Path):
    broker = opened(db_path)
    publish(broker, PLAIN, range(3))
    lane = lane_of(broker)
    assert lane.settle(done(claim(lane))) == []
    assert leftovers(broker) == NOTHING
    broker.close()
    assert claim(lane_of(opened(db_path))) == []


def test_settling_is_synced(db_path: Path):
    broker = opened(db_path)
    publish(broker, PLAIN, range(3))
    lane = lane_of(broker)
    got = claim(lane)
    before = broker.file.stats.fsyncs
    lane.settle(done(got))
    assert broker.file.stats.fsyncs == before + 1


def test_a_retry_comes_again_later_and_counts(db_path: Path):
    hands = Hands()
    broker = opened(db_path, hands=hands)
    publish(broker, PLAIN, range(3))
    lane = lane_of(broker)
    got = claim(lane)
    lane.settle([Done(got[0].receipt), Retry(got[1].receipt, 2.0, "boo"), Done(got[2].receipt)])
    assert claim(lane) == []
    hands.advance(1.9)
    assert claim(lane) == []
    hands.advance(0.2)
    [again] = claim(lane)
    assert (again.message.body, again.attempt, again.repeated, again.alone) == (
        b"1",
        2,
        True,
        False,
    )
    lane.settle([Retry(again.receipt, 0.0, "boo")])
    [third] = claim(lane)
    assert third.attempt == 3
    lane.settle(done([third]))
    assert leftovers(broker) == NOTHING
    assert broker.incident_counts() == {("s", "retry"): 2}


@pytest.mark.parametrize("hour", [-3_600_000, 3_600_000])
def test_a_step_of_the_wall_clock_changes_no_retrys_wait(db_path: Path, hour: int):
    hands = Hands()
    broker = opened(db_path, hands=hands)
    publish(broker, PLAIN, ["x"])
    lane = lane_of(broker)
    lane.settle([Retry(r, 2.0, "boo") for r in receipts(claim(lane))])
    hands.wall += hour
    assert claim(lane) == []
    hands.advance(1.9)
    assert claim(lane) == []
    hands.advance(0.2)
    assert bodies(claim(lane)) == ["x"]


@contextmanager
def before_the_turn(
    broker: SQLiteBroker, meanwhile: Callable[[], object], hands: Hands, step_ms: int
) -> Iterator[None]:
    """What the next write asks for is decided, the file's turn has not come: the clock is
    stepped, and others go on.
    """
    write = broker.file.write

    def late(steps: Any, **given: Any) -> Any:
        patch.undo()
        hands.wall += step_ms
        meanwhile()
        return write(steps, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(broker.file, "write", late)
        yield


@pytest.mark.parametrize("hour", [3_600_000, -3_600_000])
def test_a_step_while_a_settlement_waits_for_its_turn_changes_no_retrys_wait(
    db_path: Path, hour: int
):
    """Whoever was faster has followed the step already, or somebody will, later."""
    hands = Hands()
    broker, other = opened(db_path, hands=hands), opened(db_path, hands=hands)
    publish(broker, PLAIN, range(2))
    lane, watching = lane_of(broker), lane_of(other)
    first, second = claim(lane)
    with before_the_turn(broker, lambda: claim(watching), hands, hour):
        lane.settle([Retry(first.receipt, 10.0, "no")])
    with before_the_turn(broker, lambda: None, hands, hour):
        lane.settle([Retry(second.receipt, 10.0, "no")])
    hands.advance(9)
    assert claim(watching) == []
    hands.advance(2)
    assert bodies(claim(watching)) == ["0", "1"]


class Stepping(Hands):
    """A clock that is stepped right behind one of the looks at it."""

    step_ms = 3_600_000
    looks = -1

    def clock(self) -> Clock:
        return dataclasses.replace(super().clock(), wall_ms=self._look)

    def _look(self) -> int:
        shown = self.wall
        self.looks -= 1
        if self.looks == 0:
            self.wall += self.step_ms
        return shown


@pytest.mark.parametrize("look", [1, 2, 3])
@pytest.mark.parametrize("by", ["the broker", "a transaction"])
def test_a_step_in_the_middle_of_a_settlement_changes_no_retrys_wait(
    db_path: Path, by: str, look: int
):
    """It is shifted by a step that it was noted after, and waits for an hour, or not at all."""
    hands = Stepping(boot_id=boot_id())
    broker = opened(db_path, hands=hands)
    publish(broker, PLAIN, range(1))
    lane = lane_of(broker)
    claimed = claim(lane)
    [retry] = [Retry(each.receipt, 10.0, "no") for each in claimed]
    database = broker.capabilities.database
    clock = hands.clock()
    with closing(
        SQLiteStore(db_path, broker_database=database, wall_ms=clock.wall_ms, boot_ms=clock.boot_ms)
    ) as store:
        session = store.begin(Scope("s", Admission.BY_CLAIM)) if by == "a transaction" else None
        if session is not None:
            session.admit(claimed)
        hands.looks = look
        if session is None:
            lane.settle([retry])
        else:
            session.settle([retry], claimed)
            session.commit()
    hands.looks = -1
    hands.advance(9)
    assert claim(lane) == []
    hands.advance(2)
    assert bodies(claim(lane)) == ["0"]


def test_who_stood_still_follows_no_step_of_the_past(db_path: Path):
    """It read the clock, and was stopped before the file's turn came to it."""
    hands = Hands()
    broker, other = opened(db_path, hands=hands), opened(db_path, hands=hands)
    publish(broker, PLAIN, range(1))
    lane, watching = lane_of(broker), lane_of(other)
    [first] = claim(lane)
    claim(watching)
    lane.settle([Retry(first.receipt, 10.0, "no")])
    hands.wall += 3_600_000
    with before_the_turn(broker, lambda: claim(watching), hands, -3_600_000):
        claim(lane)
    hands.advance(9)
    assert claim(watching) == []
    hands.advance(2)
    assert bodies(claim(watching)) == ["0"]


def test_a_retry_survives_the_process(db_path: Path):
    broker = opened(db_path)
    publish(broker, PLAIN, ["x"])
    lane = lane_of(broker)
    lane.settle([Retry(r, 0.0, "boo") for r in receipts(claim(lane))])
    broker.close()
    [again] = claim(lane_of(opened(db_path)))
    assert again.attempt == 2


def test_the_dead_are_kept_whole(db_path: Path):
    broker = opened(db_path)
    message = PLAIN.message(b"x", source="shop", id="i", key="k", headers={"tenant": "blå"})
    broker.publish([message])
    lane = lane_of(broker)
    lane.settle([Retry(r, 0.0, "first") for r in receipts(claim(lane))])
    lane.settle([Dead(r, "no use") for r in receipts(claim(lane))])
    assert claim(lane) == []
    assert leftovers(broker) == NOTHING
    [letter] = broker.dead_letters("s")
    assert letter.message == message
    assert (letter.subscription, letter.error, letter.attempts) == ("s", "no use", 2)


def test_released_comes_again_uncharged(db_path: Path):
    broker = opened(db_path)
    publish(broker, PLAIN, range(5))
    lane = lane_of(broker)
    got = claim(lane)
    lane.settle([Release(got[1].receipt), Release(got[2].receipt), Release(got[4].receipt)])
    lane.settle([Done(got[0].receipt), Done(got[3].receipt)])
    again = list(claim(lane))
    while more := claim(lane):
        again += more
    assert bodies(again) == ["1", "2", "4"]
    assert {(d.attempt, d.repeated, d.alone) for d in again} == {(1, False, False)}


def test_a_retried_message_that_is_released_keeps_its_count(db_path: Path):
    broker = opened(db_path)
    publish(broker, PLAIN, ["x"])
    lane = lane_of(broker)
    lane.settle([Retry(r, 0.0, "boo") for r in receipts(claim(lane))])
    lane.settle([Release(r) for r in receipts(claim(lane))])
    [again] = claim(lane)
    assert (again.attempt, again.repeated) == (2, True)


def test_each_end_in_one_call(db_path: Path):
    broker = opened(db_path)
    publish(broker, PLAIN, range(8))
    lane = lane_of(broker)
    ends: list[Any] = [Done, lambda r: Retry(r, 0, "e"), lambda r: Dead(r, "e"), Release]
    assert lane.settle([ends[i % 4](r) for i, r in enumerate(receipts(claim(lane)))]) == []
    again = {d.message.body.decode(): d.attempt for d in claim(lane)}
    again |= {d.message.body.decode(): d.attempt for d in claim(lane)}
    assert again == {"1": 2, "5": 2, "3": 1, "7": 1}
    assert {d.message.body for d in broker.dead_letters()} == {b"2", b"6"}


def test_settling_piecemeal_in_any_order(db_path: Path):
    broker = opened(db_path)
    publish(broker, PLAIN, range(200))
    lane = lane_of(broker)
    left = receipts(claim(lane))
    chance = random.Random(5)
    chance.shuffle(left)
    while left:
        count = chance.randint(1, 20)
        assert lane.settle([Done(r) for r in left[:count]]) == []
        del left[:count]
        assert claim(lane) == []  # nobody is given what is settled or still held
        [(held,)] = execute(broker, "select coalesce(sum(last - first + 1), 0) from duly_claims")
        assert held == len(left)
    assert leftovers(broker) == NOTHING


# --- fences ---------------------------------------------------------------------------------------


def test_settling_twice_is_refused_the_second_time(db_path: Path):
    broker = opened(db_path)
    publish(broker, PLAIN, range(3))
    lane = lane_of(broker)
    got = claim(lane)
    [first, second, _] = receipts(got)
    assert lane.settle([Done(first), Done(second), Dead(first, "also")]) == [first]
    assert lane.settle([Done(second)]) == [second]
    assert broker.dead_letters() == []
    assert broker.incident_counts()[("s", "stale-settle")] == 2


def test_a_receipt_that_never_was_is_refused(db_path: Path):
    broker = opened(db_path)
    publish(broker, PLAIN, range(3))
    lane = lane_of(broker)
    [(token, position), *_] = receipts(claim(lane))
    for wrong in ((token + 1, position), (token, position + 3), (token, position - 1)):
        assert lane.settle([Done(wrong)]) == [wrong]


def test_after_the_lease_another_has_it_and_the_first_is_refused(db_path: Path):
    hands = Hands()
    broker = opened(db_path, hands=hands)
    publish(broker, PLAIN, range(3))
    slow, quick = lane_of(broker, lease_s=10), lane_of(broker, lease_s=10)
    late = claim(slow)
    hands.advance(9.9)
    assert claim(quick) == []
    hands.advance(0.2)
    [first] = claim(quick)
    assert (first.message.body, first.attempt, first.alone, first.repeated) == (b"0", 1, True, True)
    # The zombie settles, retries, releases, extends, fences: all of it is too late.
    assert slow.settle(done(late)) == receipts(late)
    assert slow.settle([Retry(r, 0, "e") for r in receipts(late)]) == receipts(late)
    assert slow.extend(receipts(late), 60) == receipts(late)
    assert broker.file.write(lambda: log.fence(receipts(late), 1)) == []
    assert quick.settle(done([first])) == []
    assert [bodies(claim(quick)) for _ in range(3)] == [["1"], ["2"], []]
    assert broker.incident_counts()[("s", "redelivery")] == 3


@pytest.mark.parametrize("hour", [-3_600_000, 3_600_000])
def test_a_step_of_the_wall_clock_ends_no_lease_and_delays_none(db_path: Path, hour: int):
    hands = Hands()
    broker = opened(db_path, hands=hands)
    publish(broker, PLAIN, range(2))
    lane, other = lane_of(broker, lease_s=10), lane_of(broker, lease_s=10)
    got = claim(lane)
    hands.wall += hour
    hands.boot += 5_000
    assert claim(other) == []
    hands.boot += 6_000
    assert bodies(claim(other)) == ["0"]
    assert lane.settle(done(got)) == receipts(got)


def test_after_a_reboot_every_claim_of_before_is_over(db_path: Path):
    hands = Hands()
    broker = opened(db_path, hands=hands)
    publish(broker, PLAIN, range(2))
    got = claim(lane_of(broker))
    later = Hands(wall=hands.wall + 1, boot=1, boot_id="next-boot")
    broker._clock = later.clock()  # as a process started after the reboot would have it
    lane = lane_of(broker)
    assert bodies(claim(lane)) == ["0"]
    assert lane.settle(done(got)) == receipts(got)


def test_a_lease_that_is_extended_is_kept(db_path: Path):
    hands = Hands()
    broker = opened(db_path, hands=hands)
    publish(broker, PLAIN, range(4))
    lane, other = lane_of(broker, lease_s=10), lane_of(broker, lease_s=10)
    got = receipts(claim(lane))
    for _ in range(5):
        hands.advance(8)
        assert lane.extend(got, 10) == []
        assert claim(other) == []
    assert lane.settle([Done(r) for r in got]) == []


def test_only_what_is_named_is_extended(db_path: Path):
    hands = Hands()
    broker = opened(db_path, hands=hands)
    publish(broker, PLAIN, range(6))
    lane, other = lane_of(broker, lease_s=10), lane_of(broker, lease_s=10)
    got = receipts(claim(lane))
    hands.advance(5)
    named = [got[0], got[2], got[3]]
    assert lane.extend(named, 30) == []
    hands.advance(6)
    lost = [got[1], got[4], got[5]]
    assert sorted(b for _ in range(4) for b in bodies(claim(other))) == ["1", "4", "5"]
    assert lane.extend(got, 30) == lost
    assert lane.settle([Done(r) for r in got]) == lost


# --- who is charged -------------------------------------------------------------------------------


def lose(hands: Hands) -> None:
    """Let every lease end."""
    hands.advance(31)


def test_the_loss_of_a_batch_charges_nobody_and_then_each_alone(db_path: Path):
    hands = Hands()
    broker = opened(db_path, hands=hands)
    publish(broker, PLAIN, range(3))
    lane = lane_of(broker)
    assert len(claim(lane)) == 3
    lose(hands)
    attempts = []
    for _ in range(3):  # the first of them loses its worker each time, alone
        [first] = claim(lane)
        attempts.append((first.message.body, first.attempt, first.alone))
        lose(hands)
    assert attempts[0] == (b"0", 1, True)
    [d] = claim(lane)
    # It is the oldest of what is free: its count grew by each death, the others' did not.
    assert (d.message.body, d.attempt, d.alone) == (b"0", 4, True)
    lane.settle([Dead(d.receipt, "kills its worker")])
    rest = [claim(lane)[0], claim(lane)[0]]
    assert [(d.message.body, d.attempt, d.alone) for d in rest] == [
        (b"1", 1, True),
        (b"2", 1, True),
    ]


def test_the_only_message_of_a_call_for_one_is_charged(db_path: Path):
    hands = Hands()
    broker = opened(db_path, hands=hands)
    publish(broker, PLAIN, range(1))
    lane = lane_of(broker)
    [first] = claim(lane, 1)
    assert (first.attempt, first.alone) == (1, False)
    lose(hands)
    [again] = claim(lane, 1)
    assert (again.attempt, again.alone) == (2, True)


def test_one_of_many_calls_for_one_is_not_charged(db_path: Path):
    """A lane that runs many handlers at once fills each free place with a call for one."""
    hands = Hands()
    broker = opened(db_path, hands=hands)
    publish(broker, PLAIN, range(3))
    lane = lane_of(broker)
    for _ in range(3):
        claim(lane, 1)
    lose(hands)
    again = [claim(lane, 1)[0] for _ in range(3)]
    assert [(d.message.body, d.attempt, d.alone) for d in again] == [
        (b"0", 1, True),
        (b"1", 1, True),
        (b"2", 1, True),
    ]


def test_a_suspect_that_is_released_stays_one_and_is_not_charged(db_path: Path):
    hands = Hands()
    broker = opened(db_path, hands=hands)
    publish(broker, PLAIN, range(2))
    lane = lane_of(broker)
    claim(lane)
    lose(hands)
    [d] = claim(lane)
    lane.settle([Release(d.receipt)])
    [d] = claim(lane)
    assert (d.message.body, d.attempt, d.alone) == (b"0", 1, True)


def test_a_suspect_that_only_raises_is_a_plain_retry(db_path: Path):
    hands = Hands()
    broker = opened(db_path, hands=hands)
    publish(broker, PLAIN, range(2))
    lane = lane_of(broker)
    claim(lane)
    lose(hands)
    for d in [claim(lane)[0], claim(lane)[0]]:
        lane.settle([Retry(d.receipt, 0, "boo")])
    both = claim(lane)
    assert [(d.message.body, d.attempt, d.alone) for d in both] == [
        (b"0", 2, False),
        (b"1", 2, False),
    ]


# --- inside a transaction -------------------------------------------------------------------------


class Handler:
    """A handler's own connection, as a store would hold it."""

    def __init__(self, path: Path) -> None:
        self.connection = sqlite3.connect(path, isolation_level=None)
        self.runner = StatementRunner(self.connection)
        self.connection.execute("begin immediate")

    def end(self, how: str) -> None:
        self.connection.execute(how)
        self.connection.close()


def test_settled_with_the_transaction_or_not_at_all(db_path: Path):
    broker = opened(db_path)
    publish(broker, PLAIN, range(4))
    lane = lane_of(broker)
    got = claim(lane)
    for how in ("rollback", "commit"):
        handler = Handler(db_path)
        assert handler.runner.run(log.fence(receipts(got), 77)) == receipts(got)
        assert handler.runner.run(log.settle(done(got[:3]), 1, 77)) == []
        handler.end(how)
    assert lane.settle(done(got)) == receipts(got)[:3]


def test_a_fence_says_what_is_still_held(db_path: Path):
    broker = opened(db_path)
    publish(broker, PLAIN, range(4))
    lane = lane_of(broker)
    got = receipts(claim(lane))
    lane.settle([Done(got[1])])
    handler = Handler(db_path)
    assert handler.runner.run(log.fence(got, 77)) == [got[0], got[2], got[3]]
    handler.end("rollback")


def test_a_transaction_that_started_anew_is_found_out(db_path: Path):
    """A statement fails, SQLite rolls everything back, the handler swallows it and goes on."""
    broker = opened(db_path)
    publish(broker, PLAIN, range(4))
    got = claim(lane_of(broker))
    handler = Handler(db_path)
    handler.runner.run(log.fence(receipts(got), 77))
    handler.connection.execute("rollback")
    handler.connection.execute("begin immediate")
    with pytest.raises(TransactionLost):
        handler.runner.run(log.settle(done(got), 1, 77))
    handler.end("rollback")


def test_a_claim_taken_over_cannot_be_settled_in_a_transaction(db_path: Path):
    hands = Hands()
    broker = opened(db_path, hands=hands)
    publish(broker, PLAIN, range(4))
    lane = lane_of(broker)
    got = claim(lane)
    handler = Handler(db_path)
    handler.runner.run(log.fence(receipts(got), 77))
    handler.end("commit")  # as one that forgot to settle
    lose(hands)
    claim(lane)
    handler = Handler(db_path)
    with pytest.raises(TransactionLost):
        handler.runner.run(log.settle(done(got), 1, 77))
    handler.end("rollback")


def test_many_claims_settle_in_one_call(db_path: Path):
    broker = opened(db_path)
    publish(broker, PLAIN, range(30))
    lane = lane_of(broker)
    got = [d for _ in range(3) for d in claim(lane, 10)]
    random.Random(1).shuffle(got)
    assert lane.settle(done(got)) == []
    assert leftovers(broker) == NOTHING
    assert drain(lane) == []


@pytest.mark.parametrize("hour", [-1, 1])
def test_a_step_that_a_retry_was_noted_by_is_known_when_it_is_taken_back(db_path: Path, hour: int):
    hands = Hands()
    broker = opened(db_path, hands=hands)
    publish(broker, PLAIN, ["a"])
    lane = broker.subscribe([PLAIN], "s", options())
    [failed] = claim(lane)
    hands.wall += hour * 3_600_000
    lane.settle([Retry(failed.receipt, 5.0, "not now")])
    hands.wall -= hour * 3_600_000
    hands.advance(4)
    assert bodies(claim(lane)) == []
    hands.advance(2)
    assert bodies(claim(lane)) == ["a"]

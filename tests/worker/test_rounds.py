"""The three ways to run, step by step, on the in-memory database."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import duly
from duly import errors
from duly.message import Topic
from duly.stores.memory.tables import MemoryTables
from duly.worker.lane import CAREFUL_ROUNDS, Lane
from tests.worker.lanes import Bench

numbers: Topic[int] = Topic("numbers", int, guarantee="at-least-once")
echoes: Topic[int] = Topic("echoes", int, guarantee="at-least-once")


@pytest.fixture
def bench() -> Bench:
    return Bench()


def effects(bench: Bench) -> list[Any]:
    return sorted(bench.store.rows("effects").values())


def echo(bench: Bench) -> Lane:
    """A lane that collects what was published to ``echoes``."""

    @bench.app.consumer(echoes, name="echo", guarantee="at-least-once")
    def collect(number: int) -> None:
        bench.seen.append(number)

    return bench.lane("echo")


class TestAtLeastOnce:
    def test_every_message_is_handled_and_settled_after(self, bench: Bench) -> None:
        @bench.app.consumer(numbers, name="c", guarantee="at-least-once")
        def handle(number: int) -> None:
            bench.seen.append(number)

        lane = bench.lane("c")
        bench.publish(numbers, *range(250))
        bench.drain(lane)
        assert bench.seen == list(range(250))
        assert lane.counts.handled == 250
        bench.broker.crash(lane.subscription)
        bench.drain(bench.lane("c"))
        assert len(bench.seen) == 250

    def test_a_death_before_settlement_repeats(self, bench: Bench) -> None:
        @bench.app.consumer(numbers, name="c", guarantee="at-least-once")
        def handle(number: int) -> None:
            bench.seen.append(number)

        lane = bench.lane("c")
        bench.publish(numbers, 1, 2, 3)
        lane.step()  # claimed
        lane.step()  # ran
        bench.broker.crash(lane.subscription)
        bench.drain(bench.lane("c"))
        assert bench.seen == [1, 2, 3, 1, 2, 3]

    def test_a_failure_is_tried_again_after_its_delay_then_dead(self, bench: Bench) -> None:
        @bench.app.consumer(
            numbers,
            name="c",
            guarantee="at-least-once",
            retry=duly.RetryPolicy(attempts=3, first_s=10, factor=2, jitter=0),
        )
        def handle(number: int) -> None:
            bench.seen.append(number)
            if number == 2:
                raise ValueError("two")

        lane = bench.lane("c")
        bench.publish(numbers, 1, 2, 3)
        bench.drain(lane)
        assert bench.seen == [1, 2, 3]
        bench.clock.now += 9
        bench.drain(lane)
        assert bench.seen == [1, 2, 3]
        bench.clock.now += 2
        bench.drain(lane)
        assert bench.seen == [1, 2, 3, 2]
        bench.clock.now += 21
        bench.drain(lane)
        assert bench.seen == [1, 2, 3, 2, 2]
        bench.clock.now += 1000
        bench.drain(lane)
        assert bench.seen == [1, 2, 3, 2, 2]
        (dead,) = bench.dead("c")
        assert "ValueError: two" in dead.error

    def test_retry_and_reject_raised_by_the_handler(self, bench: Bench) -> None:
        @bench.app.consumer(numbers, name="c", guarantee="at-least-once")
        def handle(number: int) -> None:
            bench.seen.append(number)
            if number == 1 and bench.seen.count(1) == 1:
                raise duly.Retry("not yet", in_s=100)
            if number == 2:
                raise duly.Reject("never")

        lane = bench.lane("c")
        bench.publish(numbers, 1, 2)
        bench.drain(lane)
        bench.clock.now += 99
        bench.drain(lane)
        assert bench.seen == [1, 2]
        bench.clock.now += 2
        bench.drain(lane)
        assert bench.seen == [1, 2, 1]
        (dead,) = bench.dead("c")
        assert "never" in dead.error

    def test_what_is_not_the_handlers_failure_settles_nothing(self, bench: Bench) -> None:
        @bench.app.consumer(numbers, name="c", guarantee="at-least-once")
        def handle(number: int) -> None:
            bench.seen.append(number)
            if number == 2 and bench.seen.count(2) == 1:
                raise SystemExit

        lane = bench.lane("c")
        bench.publish(numbers, 1, 2, 3)
        lane.step()
        with pytest.raises(SystemExit):
            lane.step()
        bench.broker.crash(lane.subscription)
        bench.drain(bench.lane("c"))
        assert bench.seen == [1, 2, 1, 2, 3]

    def test_time_bounds_a_round_and_the_rest_stays_claimed(self, bench: Bench) -> None:
        @bench.app.consumer(numbers, name="c", guarantee="at-least-once", tx_s=1.0)
        def handle(number: int) -> None:
            bench.seen.append(number)
            bench.clock.now += 0.4

        lane = bench.lane("c")
        bench.publish(numbers, *range(5))
        lane.step()
        lane.step()
        assert bench.seen == [0, 1, 2]
        assert len(lane.receipts()) == 5
        lane.step()
        assert [delivery.message.body for delivery, _ in lane.pending] == [b"3", b"4"]
        bench.drain(lane)
        assert bench.seen == list(range(5))
        assert lane.counts.claimed == 5

    def test_stopping_starts_nothing_more_and_gives_the_rest_back(self, bench: Bench) -> None:
        @bench.app.consumer(numbers, name="c", guarantee="at-least-once")
        def handle(number: int) -> None:
            bench.seen.append(number)
            if number == 2:
                lane.stop()

        lane = bench.lane("c")
        bench.publish(numbers, *range(5))
        for _ in range(5):
            lane.step()
        lane.close()
        assert bench.seen == [0, 1, 2]
        bench.drain(bench.lane("c"))
        assert bench.seen == [0, 1, 2, 3, 4]

    def test_stopping_gives_back_a_batch_that_was_not_started(self, bench: Bench) -> None:
        @bench.app.batch_consumer(numbers, name="c", guarantee="at-least-once")
        def handle(batch: list[int]) -> None:
            bench.seen.append(batch)

        lane = bench.lane("c")
        bench.publish(numbers, *range(3))
        lane.step()
        lane.stop()
        while not lane.idle():
            lane.step()
        lane.close()
        assert bench.seen == []
        bench.drain(bench.lane("c"))
        assert bench.seen == [[0, 1, 2]]

    def test_single_calls_after_a_failed_batch_do_not_go_on_for_ever(self, bench: Bench) -> None:
        calls: list[list[int]] = []

        @bench.app.batch_consumer(numbers, name="c", guarantee="at-least-once")
        def handle(batch: list[int]) -> None:
            calls.append(batch)
            if 0 in batch:
                raise duly.Reject("none")

        lane = bench.lane("c")
        bench.publish(numbers, 0, 1)
        bench.drain(lane)
        for _ in range(CAREFUL_ROUNDS + 1):
            bench.publish(numbers, 2, 3)
            bench.drain(lane)
        assert calls[:5] == [[0, 1], [0], [1], [2], [3]]
        assert calls[-3:] == [[2], [3], [2, 3]]

    def test_a_failed_batch_comes_again_one_call_each(self, bench: Bench) -> None:
        calls: list[list[int]] = []

        @bench.app.batch_consumer(numbers, name="c", guarantee="at-least-once")
        def handle(batch: list[int]) -> None:
            calls.append(batch)
            if 2 in batch:
                raise duly.Reject("two")

        lane = bench.lane("c")
        bench.publish(numbers, 1, 2, 3)
        bench.drain(lane)
        assert calls == [[1, 2, 3], [1], [2], [3]]
        assert len(bench.dead("c")) == 1

    def test_a_body_that_cannot_be_decoded_is_dead_with_its_reason(self, bench: Bench) -> None:
        @bench.app.consumer(numbers, name="c", guarantee="at-least-once")
        def handle(number: int) -> None:
            bench.seen.append(number)

        lane = bench.lane("c")
        wrong: Topic[str] = Topic("numbers", str, guarantee="at-least-once")
        bench.publish(numbers, 1)
        bench.broker.publish([wrong.message("x", source="bench")])
        bench.publish(numbers, 3)
        bench.drain(lane)
        assert bench.seen == [1, 3]
        (dead,) = bench.dead("c")
        assert "cannot be decoded" in dead.error


class TestAtMostOnce:
    def test_settled_before_it_starts(self, bench: Bench) -> None:
        @bench.app.consumer(numbers, name="c", guarantee="at-most-once")
        def handle(number: int) -> None:
            bench.seen.append(number)

        lane = bench.lane("c")
        bench.publish(numbers, 1, 2)
        lane.step()
        lane.step()
        assert bench.seen == []
        bench.broker.crash(lane.subscription)
        bench.drain(bench.lane("c"))
        assert bench.seen == [], "settled, so a crash loses and never repeats"

    def test_a_failure_is_not_tried_again(self, bench: Bench) -> None:
        @bench.app.consumer(numbers, name="c", guarantee="at-most-once")
        def handle(number: int) -> None:
            bench.seen.append(number)
            raise ValueError

        lane = bench.lane("c")
        bench.publish(numbers, 1, 2)
        bench.drain(lane)
        bench.clock.now += 10_000
        bench.drain(lane)
        assert bench.seen == [1, 2]

    def test_a_refused_settlement_does_not_start(self, bench: Bench) -> None:
        @bench.app.consumer(numbers, name="c", guarantee="at-most-once", lease_s=5)
        def handle(number: int) -> None:
            bench.seen.append(number)

        stale, fresh = bench.lane("c"), bench.lane("c")
        bench.publish(numbers, 1)
        stale.step()
        bench.clock.now += 6
        bench.drain(fresh)
        bench.drain(stale)
        assert bench.seen == [1]
        assert stale.counts.refused == 1
        assert (stale.counts.handled, fresh.counts.handled) == (0, 1)

    def test_an_unknown_settlement_does_not_start(self, bench: Bench) -> None:
        @bench.app.consumer(numbers, name="c", guarantee="at-most-once")
        def handle(number: int) -> None:
            bench.seen.append(number)

        lane = bench.lane("c")
        settle = lane.subscription.settle

        def settle_and_lose_the_answer(settlements: Any) -> Any:
            settle(settlements)
            raise errors.CommitUnknown("the answer was lost")

        lane.subscription.settle = settle_and_lose_the_answer  # type: ignore[method-assign]
        bench.publish(numbers, 1)
        for _ in range(4):
            lane.step()
        assert bench.seen == []


class TestExactlyOnce:
    def declare(self, bench: Bench, fail: Any = None, **options: Any) -> None:
        @bench.app.consumer(numbers, name="c", guarantee="exactly-once", **options)
        def handle(number: int, tx: duly.Transaction[MemoryTables]) -> None:
            bench.seen.append(number)
            tx.connection.insert("effects", number, number)
            tx.publish(echoes, number)
            if fail is not None:
                fail(number, tx)

    def test_effects_settlement_and_outputs_commit_together(self, bench: Bench) -> None:
        self.declare(bench)
        collected = echo(bench)
        lane = bench.lane("c")
        bench.publish(numbers, *range(10))
        bench.drain(lane)
        assert effects(bench) == list(range(10))
        assert lane.counts.commits == 1
        bench.seen.clear()
        bench.drain(collected)
        assert bench.seen == list(range(10))

    @pytest.mark.parametrize("steps", range(1, 9))
    def test_a_death_at_any_boundary_leaves_all_or_nothing(self, bench: Bench, steps: int) -> None:
        self.declare(bench)
        collected = echo(bench)
        lane = bench.lane("c")
        bench.publish(numbers, 1, 2, 3)
        for _ in range(steps):
            lane.step()
        bench.store.crash()
        bench.broker.crash(lane.subscription)
        bench.drain(bench.lane("c"))
        assert effects(bench) == [1, 2, 3]
        bench.seen.clear()
        bench.drain(collected)
        assert sorted(bench.seen) == [1, 2, 3]

    def test_only_the_culprit_is_rolled_back(self, bench: Bench) -> None:
        def fail(number: int, tx: Any) -> None:
            if number == 2:
                raise ValueError("two")

        self.declare(bench, fail, retry=duly.RetryPolicy(attempts=1))
        collected = echo(bench)
        lane = bench.lane("c")
        bench.publish(numbers, 1, 2, 3)
        bench.drain(lane)
        assert bench.seen == [1, 2, 1, 2, 3], "once without savepoints, once with"
        assert effects(bench) == [1, 3]
        assert len(bench.dead("c")) == 1
        bench.seen.clear()
        bench.drain(collected)
        assert bench.seen == [1, 3]

    def test_savepoints_stay_on_after_a_failure(self, bench: Bench) -> None:
        def fail(number: int, tx: Any) -> None:
            if number % 10 == 2:
                raise duly.Reject("no")

        self.declare(bench, fail, batch=10)
        lane = bench.lane("c")
        bench.publish(numbers, *range(40))
        bench.drain(lane)
        assert len(bench.seen) == 40 + 3, "only the first batch ran twice, up to its culprit"
        assert len(effects(bench)) == 36

    def test_a_failing_batch_is_run_again_one_call_each(self, bench: Bench) -> None:
        @bench.app.batch_consumer(numbers, name="c", guarantee="exactly-once")
        def handle(batch: list[int], tx: duly.Transaction[MemoryTables]) -> None:
            for number in batch:
                tx.connection.insert("effects", number, number)
            if 2 in batch:
                raise duly.Reject("two")

        lane = bench.lane("c")
        bench.publish(numbers, 1, 2, 3)
        bench.drain(lane)
        assert effects(bench) == [1, 3]
        assert len(bench.dead("c")) == 1

    def test_a_superseded_transaction_does_not_commit(self, bench: Bench) -> None:
        self.declare(bench, lease_s=5)
        zombie, successor = bench.lane("c"), bench.lane("c")
        bench.publish(numbers, 1)
        zombie.step()
        bench.clock.now += 6
        bench.drain(successor)
        bench.drain(zombie)
        assert effects(bench) == [1]
        assert zombie.counts.refused == 1
        assert zombie.counts.commits == 0

    @pytest.mark.parametrize("moment", ["before", "after"])
    def test_an_unknown_commit_is_not_retried_blindly(self, bench: Bench, moment: str) -> None:
        self.declare(bench)
        lane = bench.lane("c")
        bench.publish(numbers, 1, 2)
        left = [1]

        def lose(at: str) -> None:
            if at == moment and left:
                left.pop()
                raise ConnectionError("the answer was lost")

        bench.store.on_commit = lose
        bench.drain(lane)
        assert effects(bench) == [1, 2]
        assert bench.seen == ([1, 2] if moment == "after" else [1, 2, 1, 2])

    def test_a_commit_that_fails_goes_message_by_message(self, bench: Bench) -> None:
        self.declare(bench, retry=duly.RetryPolicy(attempts=1))
        lane = bench.lane("c")
        bench.publish(numbers, 1, 2, 3)

        def refuse(at: str) -> None:
            if at == "before" and 2 in bench.store._open.connection.rows("effects"):  # type: ignore[union-attr]
                raise errors.TransactionFailed("a deferred constraint")

        bench.store.on_commit = refuse
        bench.drain(lane)
        assert effects(bench) == [1, 3]
        (dead,) = bench.dead("c")
        assert "deferred constraint" in dead.error

    def test_a_claim_lost_while_going_message_by_message_is_given_back_whole(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.declare(bench, lease_s=5)
        lane, successor = bench.lane("c"), bench.lane("c")
        bench.publish(numbers, *range(10))
        left = [1]

        def refuse(at: str) -> None:
            if left:
                left.pop()
                raise errors.TransactionFailed("just now")

        bench.store.on_commit = refuse
        while lane.counts.commits < 2:
            lane.step()
        bench.clock.now += 6
        bench.drain(successor)
        begun: list[Any] = []
        begin = bench.store.begin

        def noted(scope: Any) -> Any:
            begun.append(scope)
            return begin(scope)

        monkeypatch.setattr(bench.store, "begin", noted)
        bench.drain(lane)
        assert effects(bench) == list(range(10))
        assert lane.counts.refused == 8
        assert len(begun) == 1, "one found out for all"
        bench.publish(numbers, 10, 11)
        commits = lane.counts.commits
        bench.drain(lane)
        assert effects(bench) == list(range(12))
        assert lane.counts.commits == commits + 1, "and what is claimed next goes together"

    def test_calls_after_commit_are_made_only_then(self, bench: Bench) -> None:
        calls: list[int] = []

        def fail(number: int, tx: Any) -> None:
            tx.after_commit(lambda: calls.append(number))
            if number == 2:
                raise duly.Reject("two")

        self.declare(bench, fail)
        lane = bench.lane("c")
        bench.publish(numbers, 1, 2, 3)
        bench.drain(lane)
        assert calls == [1, 3]

    def test_what_is_not_the_handlers_failure_rolls_back_and_settles_nothing(
        self, bench: Bench
    ) -> None:
        def fail(number: int, tx: Any) -> None:
            if number == 2 and bench.seen.count(2) == 1:
                raise KeyboardInterrupt

        self.declare(bench, fail)
        lane = bench.lane("c")
        bench.publish(numbers, 1, 2)
        with pytest.raises(KeyboardInterrupt):
            bench.drain(lane)
        assert effects(bench) == []
        bench.broker.crash(lane.subscription)
        bench.drain(bench.lane("c"))
        assert effects(bench) == [1, 2]

    def test_async_handlers_keep_the_guarantee(self, bench: Bench) -> None:
        @bench.app.consumer(numbers, name="c", guarantee="exactly-once")
        async def handle(number: int, tx: duly.Transaction[MemoryTables]) -> None:
            tx.connection.insert("effects", number, number)
            await asyncio.sleep(0)
            if number == 2:
                raise duly.Reject("two")

        lane = bench.lane("c", on_loop=asyncio.run)
        bench.publish(numbers, 1, 2, 3)
        bench.drain(lane)
        assert effects(bench) == [1, 3]

    def test_a_conflicting_output_is_its_handlers_failure(self, bench: Bench) -> None:
        once: Topic[int] = Topic("once", int, guarantee="exactly-once")
        bench.publish(once, 0)
        bench.broker.publish([once.message(7, source="bench", id="taken")])

        @bench.app.consumer(numbers, name="c", guarantee="exactly-once")
        def handle(number: int, tx: duly.Transaction[MemoryTables]) -> None:
            tx.connection.insert("effects", number, number)
            if number == 2:
                tx.publish(once, 8, id="taken")

        lane = bench.lane("c")
        bench.publish(numbers, 1, 2, 3)
        bench.drain(lane)
        assert effects(bench) == [1, 3]
        (dead,) = bench.dead("c")
        assert "IdentityConflict" in dead.error


def test_a_body_that_cannot_be_decoded_is_not_quoted(bench: Bench) -> None:
    import pydantic

    class Card(pydantic.BaseModel):
        number: int

    cards: Topic[Card] = Topic("cards", Card, guarantee="at-least-once")
    raw: Topic[bytes] = Topic("cards", bytes, guarantee="at-least-once")

    @bench.app.consumer(cards, name="c", guarantee="at-least-once")
    def handle(card: Card) -> None:
        bench.seen.append(card)

    lane = bench.lane("c")
    bench.publish(raw, b'{"number": "SECRET-4111"}')
    bench.drain(lane)
    (dead,) = bench.dead("c")
    assert "number" in dead.error
    assert "SECRET" not in dead.error


def test_a_body_over_the_topics_limit_is_dead_before_it_is_parsed(bench: Bench) -> None:
    small: Topic[str] = Topic("small", str, guarantee="at-least-once", max_body_bytes=5)
    large: Topic[str] = Topic("small", str, guarantee="at-least-once")

    @bench.app.consumer(small, name="c", guarantee="at-least-once")
    def handle(text: str) -> None:
        bench.seen.append(text)

    lane = bench.lane("c")
    bench.publish(large, "short", "longer", "fits")
    bench.drain(lane)
    assert bench.seen == ["short", "fits"]
    (dead,) = bench.dead("c")
    assert "max_body_bytes" in dead.error


def test_a_cancelled_handler_does_not_lose_the_settled_messages_behind_it(bench: Bench) -> None:
    @bench.app.consumer(numbers, name="c", guarantee="at-most-once")
    def handle(number: int) -> None:
        bench.seen.append(number)
        if number == 1:
            raise asyncio.CancelledError

    lane = bench.lane("c")
    bench.publish(numbers, 1, 2, 3)
    bench.drain(lane)
    assert bench.seen == [1, 2, 3]


def test_a_store_that_cannot_take_an_output_charges_no_message(bench: Bench) -> None:
    def fail_once(number: int, tx: Any) -> None:
        bench.seen.append(number)
        tx.publish(echoes, number)

    bench.app.consumer(
        numbers, name="c", guarantee="exactly-once", retry=duly.RetryPolicy(attempts=1)
    )(fail_once)
    lane = bench.lane("c")
    left = [errors.BrokerUnavailable("full"), errors.BrokerUnavailable("full")]
    begin = bench.store.begin

    def begin_that_cannot_publish(scope: Any) -> Any:
        session = begin(scope)
        publish = session.publish
        session.publish = lambda messages: _raise(left.pop()) if left else publish(messages)  # type: ignore[method-assign]
        return session

    bench.store.begin = begin_that_cannot_publish  # type: ignore[method-assign]
    bench.publish(numbers, 7)
    bench.drain(lane)
    assert bench.seen == [7, 7, 7]
    assert not bench.dead("c")


def _raise(error: Exception) -> Any:
    raise error

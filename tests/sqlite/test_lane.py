"""Lanes on a real file: what they claim ahead, and bodies that are decoded when handled."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import duly
from duly import logs
from duly.dependencies import Resolver
from duly.errors import BrokerUnusable
from duly.guarantees import Admission, Guarantee, Release
from duly.message import now_ms
from duly.worker.lane import Lane
from duly.worker.permits import Permits
from duly.worker.process import subscribe_options
from duly.worker.steps import BodyWork, Surroundings

numbers: duly.Topic[int] = duly.Topic("numbers", int, guarantee="at-least-once")


class Bench:
    """An app on a file, and its consumers as lanes that the test steps."""

    def __init__(self, url: str, store: str | None = None) -> None:
        self.app = duly.App("bench", broker=url, store=store)
        self.admission = Admission.BY_CLAIM if store is None else Admission.BY_INBOX
        self.now = 1000.0
        self.seen: list[Any] = []

    def lane(self, name: str) -> Lane:
        [consumer] = [c for c in self.app.consumers if c.name == name]
        broker, store = self.app.backends()
        exactly = consumer.guarantee is Guarantee.EXACTLY_ONCE
        admission = self.admission if exactly else None
        return Lane(
            consumer,
            broker.subscribe(consumer.topics, name, subscribe_options(consumer, admission)),
            Resolver().bind(consumer.handler),
            Surroundings("bench", clock=lambda: self.now, roll=lambda: 0.0, wait_s=0.0),
            store=store if exactly else None,
            admission=admission,
        )

    def publish(self, *payloads: int) -> None:
        self.app.publish_many(numbers, payloads)

    def damage(self, payload: int) -> None:
        """Make what is stored of a number no number."""
        path = self.app.backends()[0].file.path  # type: ignore[attr-defined]
        with sqlite3.connect(path) as other:
            body = str(payload).encode()
            other.execute("update duly_messages set body = x'ff' where body = ?", (body,))

    @property
    def commits(self) -> int:
        return self.app.backends()[0].file.stats.commits  # type: ignore[attr-defined, no-any-return]

    def dead(self) -> list[Any]:
        return self.app.backends()[0].dead_letters("c")  # type: ignore[attr-defined, no-any-return]


@pytest.fixture
def bench(db_url: str) -> Iterator[Bench]:
    bench = Bench(db_url)
    yield bench
    bench.app.close()


def rounds(lane: Lane, count: int) -> None:
    for _ in range(count):
        lane.step()
        while not lane.idle():
            lane.step()


def consume(bench: Bench, guarantee: str, does: Callable[[int], None], **options: Any) -> Lane:
    """A lane of consumer ``c`` that notes what it is given, and then does this."""

    def handle(number: int) -> None:
        bench.seen.append(number)
        does(number)

    def handle_within(number: int, tx: duly.Transaction[sqlite3.Connection]) -> None:
        handle(number)

    handler: Any = handle_within if guarantee == "exactly-once" else handle
    declare: Any = bench.app.consumer
    declare(numbers, name="c", guarantee=guarantee, **options)(handler)
    return bench.lane("c")


def nothing(number: int) -> None:
    """Takes it well."""


EACH = pytest.mark.parametrize("guarantee", ["at-most-once", "at-least-once", "exactly-once"])
SETTLED_AFTER = pytest.mark.parametrize("guarantee", ["at-least-once", "exactly-once"])


@SETTLED_AFTER
def test_a_batch_costs_one_commit(bench: Bench, guarantee: str):
    lane = consume(bench, guarantee, nothing, batch=2)
    bench.publish(*range(12))
    rounds(lane, 2)
    before = bench.commits
    rounds(lane, 3)
    assert bench.commits - before == 3
    assert bench.seen == list(range(10))
    rounds(lane, 3)
    assert bench.seen == list(range(12))


@SETTLED_AFTER
def test_what_was_claimed_ahead_is_given_back_uncharged(bench: Bench, guarantee: str):
    lane = consume(bench, guarantee, nothing, batch=2)
    bench.publish(*range(6))
    rounds(lane, 2)
    lane.stop()
    rounds(lane, 1)
    lane.close()
    again = bench.lane("c")
    rounds(again, 3)
    assert bench.seen == list(range(6))
    assert again.counts.claimed + lane.counts.claimed > 6


def test_at_most_once_nothing_is_claimed_while_a_handler_runs(bench: Bench):
    """It would be charged with the death that the handler causes, and hold up other workers."""
    claimed: list[int] = []
    lane = consume(bench, "at-most-once", lambda _: claimed.append(lane.counts.claimed), batch=1)
    bench.publish(*range(4))
    rounds(lane, 4)
    assert claimed == [1, 2, 3, 4]


def test_what_never_started_comes_again_unmarked(bench: Bench):
    lane = consume(bench, "at-least-once", nothing, batch=2)
    bench.publish(*range(6))
    rounds(lane, 2)
    assert len(lane.pending) == 2
    lane.stop()
    lane.close()
    again = bench.lane("c").subscription.claim(10, 1 << 20, 0.0)
    assert [(d.attempt, d.repeated, d.alone) for d in again] == [(1, False, False)] * 2


@SETTLED_AFTER
def test_a_claim_that_fails_undoes_nothing_that_was_handled(
    bench: Bench, guarantee: str, monkeypatch: pytest.MonkeyPatch
):
    lane = consume(bench, guarantee, nothing, batch=2)
    bench.publish(*range(10))
    rounds(lane, 1)

    def fail(ahead: Any) -> Any:
        raise BrokerUnusable("a damaged page")
        yield

    with monkeypatch.context() as patch:
        patch.setattr("duly.sql.claims.Ahead.steps", fail)
        rounds(lane, 4)
    assert set(bench.seen) == set(range(8 if guarantee == "exactly-once" else 10))
    rounds(lane, 2)
    assert set(bench.seen) == set(range(10))
    if guarantee == "at-least-once":
        assert bench.seen == list(range(10)), "nothing ran twice"
    assert lane.counts.handled == 10


def test_a_rate_limit_claims_nothing_ahead(bench: Bench):
    lane = consume(bench, "at-least-once", nothing, batch=2)
    lane.around.permits = Permits(2, lambda: bench.now)
    bench.publish(*range(6))
    for _ in range(4):
        rounds(lane, 1)
        assert lane.counts.claimed == len(bench.seen)
        bench.now += 1
    assert len(bench.seen) >= 4


def test_calls_after_the_commit_run_before_the_next_claim(bench: Bench):
    """A call that ends the process is charged to no message claimed alone behind it."""
    claimed: list[int] = []

    @bench.app.consumer(numbers, name="c", guarantee="exactly-once", batch=1)
    def handle(number: int, tx: duly.Transaction[sqlite3.Connection]) -> None:
        tx.after_commit(lambda: claimed.append(lane.counts.claimed))

    lane = bench.lane("c")
    bench.publish(*range(3))
    rounds(lane, 3)
    assert claimed == [1, 2, 3]


def test_with_savepoints_no_message_is_looked_up(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    def looked_up(*_: object, **__: object) -> Any:
        raise AssertionError("nobody asked for more than the body")

    lane = consume(bench, "exactly-once", nothing, batch=3)
    bench.publish(*range(6))
    monkeypatch.setattr("duly.sql.log.fetch", looked_up)
    monkeypatch.setattr("duly.sql.log.fetch_ids", looked_up)
    lane.careful = 5
    rounds(lane, 3)
    assert bench.seen == list(range(6))


@pytest.mark.parametrize("savepoints", [0, 5])
def test_a_damaged_body_undoes_nothing_around_it(bench: Bench, savepoints: int):
    lane = consume(bench, "exactly-once", nothing)
    bench.publish(*range(5))
    bench.damage(2)
    lane.careful = savepoints
    rounds(lane, 1)
    assert bench.seen == [0, 1, 3, 4]
    assert lane.counts.commits == 1
    assert len(bench.dead()) == 1
    assert lane.counts.failed == 0


@pytest.mark.parametrize("guarantee", ["at-most-once", "at-least-once"])
def test_a_message_erased_while_it_fails_stops_nobody(bench: Bench, guarantee: str):
    """Nothing of its claim is left in the log to say even its id."""

    def fail(number: int) -> None:
        if number == 1:
            assert bench.app.erase(id="n-1") == 1
            raise ValueError(number)

    lane = consume(bench, guarantee, fail)
    bench.app.publish(numbers, 1, id="n-1")
    rounds(lane, 1)
    bench.app.publish(numbers, 2, id="n-2")
    rounds(lane, 2)
    assert bench.seen == [1, 2]


@EACH
def test_a_body_that_cannot_be_decoded_stops_nobody(bench: Bench, guarantee: str):
    lane = consume(bench, guarantee, nothing)
    bench.publish(*range(5))
    bench.damage(2)
    rounds(lane, 2)
    assert bench.seen == [0, 1, 3, 4]
    [dead] = bench.dead()
    assert "cannot be decoded" in dead.error
    assert dead.attempts == 1


def test_a_body_that_cannot_be_decoded_undoes_no_transaction(bench: Bench):
    lane = consume(bench, "exactly-once", nothing)
    bench.publish(*range(5))
    bench.damage(0)
    bench.damage(4)
    rounds(lane, 1)
    assert bench.seen == [1, 2, 3]
    assert lane.counts.commits == 1
    assert len(bench.dead()) == 2


@SETTLED_AFTER
def test_a_failure_and_a_damaged_body_in_one_batch(bench: Bench, guarantee: str):
    def fail(number: int) -> None:
        if number == 3:
            raise duly.Reject("three")

    lane = consume(bench, guarantee, fail)
    bench.publish(*range(6))
    bench.damage(1)
    rounds(lane, 3)
    assert set(bench.seen) == {0, 2, 3, 4, 5}
    assert len(bench.dead()) == 2


@EACH
def test_a_handler_that_raises_stop_iteration_has_failed(bench: Bench, guarantee: str):
    def stop(number: int) -> None:
        if number == 1:
            raise StopIteration

    retry = duly.RetryPolicy(attempts=1)
    lane = consume(bench, guarantee, stop, retry=retry)
    bench.publish(*range(3))
    rounds(lane, 3)
    assert lane.counts.failed >= 1
    assert set(bench.seen) == {0, 1, 2}
    assert len(bench.dead()) == (guarantee != "at-most-once")


@SETTLED_AFTER
def test_a_stop_in_the_middle_of_a_batch_starts_no_more(bench: Bench, guarantee: str):
    lane = consume(bench, guarantee, lambda number: lane.stop() if number == 2 else None)
    bench.publish(*range(6))
    rounds(lane, 1)
    assert bench.seen == [0, 1, 2]
    lane.close()
    rounds(bench.lane("c"), 2)
    assert bench.seen == [0, 1, 2, 3, 4, 5]


def test_what_is_settled_first_runs_to_its_end_whatever_stops(bench: Bench):
    lane = consume(bench, "at-most-once", lambda number: lane.stop() if number == 2 else None)
    bench.publish(*range(6))
    rounds(lane, 1)
    assert bench.seen == [0, 1, 2, 3, 4, 5]


@EACH
def test_every_log_line_names_its_message(bench: Bench, guarantee: str):
    records: list[logging.LogRecord] = []
    log = logging.getLogger("bench")
    logs.install()

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    keep = Keep()
    log.addHandler(keep)
    lane = consume(bench, guarantee, lambda number: log.warning("%d", number), batch=2)
    published = bench.app.publish_many(numbers, range(4))
    rounds(lane, 3)
    log.removeHandler(keep)
    found = [record.__dict__["duly_message_id"] for record in records]
    assert found == [each.message_id for each in published]


def test_bodies_are_decoded_when_they_are_handled(bench: Bench):
    lane = consume(bench, "at-least-once", nothing)
    bench.publish(1, 2)
    assert isinstance(lane.claim(10, 0.0), BodyWork)


def test_what_was_kept_and_what_is_left_go_on_together(bench: Bench):
    lane = consume(bench, "at-least-once", nothing, batch=4)
    bench.publish(*range(8))
    first = lane.claim(4, 0.0)
    second = lane.claim(4, 0.0)
    both = first[2:].then(second)
    assert [argument for _, argument in both] == [2, 3, 4, 5, 6, 7]
    assert len(both.receipts()) == 6


class TestByInbox:
    """Spans whose ids a store in another file remembers."""

    @pytest.fixture
    def bench(self, tmp_path: Path) -> Iterator[Bench]:
        bench = Bench(f"sqlite:///{tmp_path}/duly.db", f"sqlite:///{tmp_path}/effects.db")
        yield bench
        bench.app.close()

    def test_a_batch_costs_a_commit_of_each_file(self, bench: Bench):
        lane = consume(bench, "exactly-once", nothing, batch=2)
        bench.publish(*range(12))
        rounds(lane, 2)
        assert isinstance(lane.pending, BodyWork)
        before = bench.commits
        rounds(lane, 3)
        assert bench.commits - before == 3
        assert bench.seen == list(range(10))

    def test_what_took_effect_is_not_run_again(self, bench: Bench, monkeypatch: Any):
        lane = consume(bench, "exactly-once", nothing, batch=4)
        bench.publish(*range(6))
        with monkeypatch.context() as patch:
            patch.setattr(lane, "settle_after_commit", lambda _: iter(()))
            rounds(lane, 1)
        assert bench.seen == [0, 1, 2, 3]
        lane.close()
        other = bench.lane("c")
        rounds(other, 4)
        assert bench.seen == list(range(6))
        assert other.counts.repeats == 4
        assert other.counts.handled == 2

    def test_what_was_not_started_for_lack_of_time_runs_later(self, bench: Bench):
        def slow(number: int) -> None:
            bench.now += 10

        lane = consume(bench, "exactly-once", slow, batch=4)
        bench.publish(*range(4))
        rounds(lane, 1)
        assert bench.seen == [0]
        rounds(lane, 3)
        assert bench.seen == [0, 1, 2, 3]
        assert lane.counts.repeats == 0

    def test_one_that_fails_is_alone_in_running_again(self, bench: Bench):
        def fail(number: int) -> None:
            if number == 2:
                raise duly.Reject("two")

        lane = consume(bench, "exactly-once", fail, batch=4)
        bench.publish(*range(4))
        bench.damage(1)
        rounds(lane, 3)
        assert len(bench.dead()) == 2
        assert bench.seen == [0, 2, 0, 2, 3], "once more after the rollback"
        rounds(lane, 2)
        assert lane.counts.handled == 4

    def test_what_is_older_than_the_inbox_remembers_is_dead_and_not_run(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ):
        lane = consume(bench, "exactly-once", nothing, inbox_retention_s=60.0)
        broker = bench.app.backends()[0]
        broker.declare([numbers])
        old = now_ms() - 3_600_000
        broker.publish([numbers.message(n, source="s", id=str(n), time_ms=old) for n in range(3)])
        claimed = lane.subscription.claim(10, 1 << 20, 0.0)
        assert len(claimed) == 3
        released = [Release(d.receipt, started=True) for d in claimed]
        lane.subscription.settle(released)
        for _ in range(3):
            rounds(lane, 1)
        assert bench.seen == []
        assert len(bench.dead()) == 3
        assert lane.counts.refused == 0

    def test_sources_are_told_apart(self, bench: Bench):
        lane = consume(bench, "exactly-once", nothing)
        broker = bench.app.backends()[0]
        broker.declare([numbers])
        broker.publish([numbers.message(n, source=f"s{n % 3}", id=f"{n // 3}") for n in range(9)])
        rounds(lane, 1)
        assert bench.seen == list(range(9))


def test_a_body_over_the_topics_limit_is_dead_also_where_its_claim_is_a_span(bench: Bench) -> None:
    small: duly.Topic[int] = duly.Topic("numbers", int, guarantee="at-least-once", max_body_bytes=3)

    @bench.app.consumer(small, name="c", guarantee="at-least-once")
    def handle(number: int) -> None:
        bench.seen.append(number)

    lane = bench.lane("c")
    bench.publish(1, 22_222, 333)
    rounds(lane, 4)
    assert bench.seen == [1, 333]
    [dead] = bench.dead()
    assert "max_body_bytes" in dead.error
    bench.publish(4)  # the stream has had a larger one
    rounds(lane, 2)
    assert bench.seen == [1, 333, 4]

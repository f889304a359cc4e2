"""What a store remembers is settled without waiting for the group, and the group is told of who
starts what all the same.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, KafkaError, TopicPartition

import duly
from duly.broker import SubscribeOptions
from duly.brokers.kafka.commits import Commits
from duly.brokers.kafka.extent import START, Extent
from duly.brokers.kafka.lane import Lane
from duly.brokers.kafka.notes import Notes
from duly.brokers.kafka.share import Order, Share
from duly.brokers.kafka.soundness import Soundness
from duly.brokers.kafka.telling import Telling
from duly.guarantees import Done, Guarantee, Retry
from duly.message import Topic
from duly.worker import Worker
from tests.kafka.test_spans import a_span, filled
from tests.kafka.work import awaited, broker_at, host_of, namespace_of
from tests.waiting import eventually

ONE: Topic[str] = Topic("one", str, guarantee="at-least-once", partitions=1)
EXACTLY = SubscribeOptions(Guarantee.EXACTLY_ONCE, bodies_only=True)
NUMBERS = [str(number) for number in range(100)]


@pytest.fixture(autouse=True)
def few_are_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few are fetched at a time."""
    monkeypatch.setattr(Soundness.__init__, "__defaults__", (1,))


def position_of(url: str) -> int:
    """As people's lag tools see it."""
    space = namespace_of(url)
    consumer: Any = Consumer({"bootstrap.servers": host_of(url), "group.id": f"{space}.sub"})
    try:
        [place] = consumer.committed([TopicPartition(f"{space}.one", 0)], timeout=10)
        return int(place.offset)
    finally:
        consumer.close()


def test_the_position_follows(kafka_url: str):
    with filled(kafka_url) as broker:
        lane = broker.subscribe([ONE], "sub", EXACTLY)
        span = a_span(lane, 100)
        assert list(lane.settle_remembered([Done(span.receipt, 100)])) == []
        eventually(lambda: position_of(kafka_url) == 100, "the group knows")
        assert list(lane.settle_remembered([Done(span.receipt, 100)])) == [
            each.receipt for each in span
        ], "nobody holds it any more"


def test_nobody_waits_for_it_and_a_claim_for_no_more_than_it_starts(
    kafka_url: str, monkeypatch: pytest.MonkeyPatch
):
    """While nothing can be committed: what was announced before may be started, and no other."""
    with filled(kafka_url) as broker:
        lane = broker.subscribe([ONE], "sub", EXACTLY)
        first = a_span(lane, 10, limit=10)
        assert list(lane.settle_remembered([Done(first.receipt, 10)])) == []
        # It announces as many as were claimed, twice.
        eventually(lambda: position_of(kafka_url) == 10, "the group knows")
        monkeypatch.setattr("duly.brokers.kafka.commits._ANSWERS_S", 0.5)
        with monkeypatch.context() as stopped:
            stopped.setattr(Commits, "serve", lambda _self, _consumer: None)
            second = a_span(lane, 10, limit=10)
            assert list(lane.settle_remembered([Done(second.receipt, 10)])) == []
            third = a_span(lane, 10, limit=10)
            assert list(lane.settle_remembered([Done(third.receipt, 10)])) == []
            with pytest.raises(duly.BrokerUnavailable, match="nothing was claimed"):
                lane.claim(10, 1 << 20, 1.0)
            assert position_of(kafka_url) == 10
        fourth = a_span(lane, 10, limit=10)
        assert [span[0].message_id for span in (second, third, fourth)] == ["10", "20", "30"]


def test_who_dies_with_a_claim_was_announced(kafka_url: str):
    with filled(kafka_url) as broker:
        lane = broker.subscribe([ONE], "sub", EXACTLY)
        first = a_span(lane, 5, limit=5)
        assert list(lane.settle_remembered([Done(first.receipt, 5)])) == []
        second = a_span(lane, 20, limit=20)
        assert second[-1].message_id == "24"
        broker.abandon()
    with broker_at(kafka_url, ONE) as broker:
        lane = broker.subscribe([ONE], "sub", EXACTLY)
        seen: list[str] = []
        while "24" not in seen:
            [one] = awaited(lane)
            assert (one.alone, one.repeated, one.attempt) == (True, True, 1)
            seen.append(one.message_id)
            lane.settle([Done(one.receipt)])
        # Those of the first may be told of, or not: they had not to be.
        assert seen[-20:] == NUMBERS[5:25]


def test_an_announcement_counts_once_every_request_on_its_way_says_so():
    telling = Telling(Extent(START, 0))
    telling.sent(Extent(START, 20))
    assert not telling.covers(10), "the group has not been told"
    telling.told(Extent(START, 20), 0)
    assert telling.covers(19)
    assert not telling.covers(20)
    telling.sent(Extent(START, 10))
    assert not telling.covers(15)
    telling.told(Extent(START, 10), 0)
    telling.sent(Extent(START, 20))
    assert not telling.covers(15), "it is told first"
    assert telling.covers(9)


def test_what_was_sent_and_not_answered_may_be_what_the_group_has():
    telling = Telling(Extent(START, 20))
    telling.sent(Extent(START, 13))
    telling.sent(Extent(START, 17))
    assert not telling.covers(13)
    telling.told(Extent(START, 17), 0)
    assert telling.covers(16)


def test_a_count_that_the_group_may_not_have_is_not_started_with(
    kafka_url: str, monkeypatch: pytest.MonkeyPatch
):
    """It is in order by key, where a count is noted beside the position."""
    options = SubscribeOptions(Guarantee.AT_LEAST_ONCE, order_by_key=True)
    with filled(kafka_url, texts=NUMBERS[:10]) as broker:
        lane = broker.subscribe([ONE], "sub", options)
        [first] = awaited(lane, limit=1)
        assert list(lane.settle([Done(first.receipt)])) == []
        [second] = awaited(lane, limit=1)
        monkeypatch.setattr("duly.brokers.kafka.commits._ANSWERS_S", 0.5)
        with monkeypatch.context() as stopped:
            stopped.setattr(Commits, "serve", lambda _self, _consumer: None)
            with pytest.raises(duly.CommitUnknown):
                lane.settle([Retry(second.receipt, 0.0, "no")])
            with pytest.raises(duly.BrokerUnavailable, match="nothing was claimed"):
                lane.claim(1, 1 << 20, 1.0)
        [again] = awaited(lane, limit=1)
        assert (again.message_id, again.attempt) == (second.message_id, 2)


def test_what_was_asked_before_a_doubt_does_not_end_it():
    telling = Telling(Extent(START, 20))
    before = telling.sent(Extent(START, 30))
    telling.doubt()
    telling.told(Extent(START, 30), before)
    assert not telling.covers(5)
    telling.told(Extent(START, 30), telling.sent(Extent(START, 30)))
    assert telling.covers(29)


def test_a_worker_by_cursor_settles_so(
    kafka_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "effects.db"
    settled: list[int] = []
    inner = Lane.settle_remembered

    def settle_remembered(self: Lane, settlements: Sequence[Done]) -> Sequence[Any]:
        settled.append(len(settlements))
        return inner(self, settlements)

    monkeypatch.setattr(Lane, "settle_remembered", settle_remembered)
    with sqlite3.connect(path) as effects:
        effects.execute("create table charges (id text)")
    app = duly.App("shop", broker=kafka_url, store=f"sqlite:///{path}")

    @app.consumer(ONE, name="billing", guarantee="exactly-once")
    def charge(order: str, tx: duly.Transaction[sqlite3.Connection]) -> None:
        tx.connection.execute("insert into charges values (?)", (order,))

    with app:
        app.publish_many(ONE, NUMBERS)
        with Worker(app) as worker:
            eventually(lambda: worker.counts()["billing"].handled == 100, "all are charged")
    assert settled
    with sqlite3.connect(path) as effects:
        assert effects.execute("select count(*), count(distinct id) from charges").fetchone() == (
            100, 100,
        )  # fmt: skip


class Silent:
    """Is asked to commit, and says nothing."""

    def commit(self, **_: Any) -> None: ...


def asked(error: int | None, *, sent: bool = True, waits_s: float = 0.0) -> set[int] | None:
    """A partition is lost while somebody waits for its commit, after this answer; what that one is
    told of it, None: that nobody knows.
    """
    changed, shares = threading.Condition(), dict[int, Share]()
    commits = Commits("sub", changed, shares, time.monotonic, lambda: 0)
    share = shares[7] = Share(("one", 0), "log", 7, Order.NONE, 0, Notes())
    share.version = 1
    told: list[set[int] | None] = []

    def ask() -> None:
        try:
            told.append(commits.ask([share], settling=True))
        except duly.CommitUnknown:
            told.append(None)

    asking = threading.Thread(target=ask)
    asking.start()
    eventually(lambda: commits._requests, "it asks")
    if sent:
        commits.serve(Silent())
        if error is not None:
            commits._sent_s -= waits_s
            commits.answered(KafkaError(error), [TopicPartition("one", 0, 0)])
    with changed:
        shares.clear()
        commits.lost()
    asking.join(10)
    [found] = told
    return found


def test_what_was_sent_before_the_partition_was_lost_may_be_committed():
    assert asked(None) is None
    assert asked(KafkaError._TIMED_OUT) is None
    assert asked(KafkaError.ILLEGAL_GENERATION, waits_s=12.0) is None, "it was asked twice, perhaps"


def test_what_was_not_sent_or_is_refused_is_not_committed():
    assert asked(None, sent=False) == {7}
    assert asked(KafkaError.ILLEGAL_GENERATION) == {7}

"""What is claimed as a span, on a real node: part of it fails, is lost, or its worker dies."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import pytest

import duly
from duly.broker import Delivery, Span, SubscribeOptions
from duly.brokers.kafka import KafkaBroker
from duly.brokers.kafka.soundness import Soundness
from duly.errors import BrokerUnavailable
from duly.guarantees import Dead, Done, Guarantee, Release, Retry, Settlement
from duly.inspection import Selection
from duly.message import Topic
from duly.testing.conformance.subject import Clock
from duly.worker import Worker
from tests.kafka.work import A_LOT, awaited, broker_at, namespace_of, stranger
from tests.waiting import eventually

ONE: Topic[str] = Topic("one", str, guarantee="at-least-once", partitions=1)
FOUR: Topic[str] = Topic("four", str, guarantee="at-least-once", partitions=4)
BODIES = SubscribeOptions(Guarantee.AT_LEAST_ONCE, bodies_only=True)
EXACTLY = SubscribeOptions(Guarantee.EXACTLY_ONCE, bodies_only=True)

NUMBERS = [str(number) for number in range(100)]


@pytest.fixture(autouse=True)
def few_are_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few are fetched at a time."""
    monkeypatch.setattr(Soundness.__init__, "__defaults__", (1,))


@contextmanager
def filled(
    url: str, topic: Topic[Any] = ONE, texts: Sequence[str] = NUMBERS, **more: Any
) -> Iterator[KafkaBroker]:
    with broker_at(url, topic, **more) as broker:
        outcomes = broker.publish([topic.message(t, id=t, key=t, source="tests") for t in texts])
        assert len(outcomes) == len(texts)
        yield broker


def a_span(lane: Any, count: int, limit: int = 1000) -> Span:
    """One with so many messages, once they are fetched."""
    found: list[Span] = []

    def comes() -> bool:
        claimed = lane.claim(limit, A_LOT, 1.0)
        if claimed:
            assert isinstance(claimed, Span)
            if len(claimed) == count:
                found.append(claimed)
            else:
                lane.settle([Release(claimed.receipt)])
        return bool(found)

    eventually(comes, f"a span of {count} comes")
    return found[0]


def letters(broker: KafkaBroker) -> list[str]:
    return [letter.error for letter in broker._graveyard.select(Selection("sub"), 10)]


def test_a_span_is_settled_as_a_whole(kafka_url: str):
    with filled(kafka_url) as broker:
        lane = broker.subscribe([ONE], "sub", BODIES)
        span = a_span(lane, 100)
        assert [each.message_id for each in span] == NUMBERS
        assert [each.message.id for each in span] == NUMBERS
        assert list(lane.settle([Done(span[:60].receipt, 60)])) == []
        assert list(lane.extend([span[60:].receipt], 30.0)) == []
        assert list(lane.settle([Done(span[60:].receipt, 40)])) == []
        assert list(lane.settle([Done(span[:1].receipt, 1)])) == [span[0].receipt]
        assert list(lane.extend([span.receipt], 30.0)) == [span.receipt]
    with broker_at(kafka_url, ONE) as broker:
        lane = broker.subscribe([ONE], "sub", BODIES)
        assert list(lane.claim(10, A_LOT, 0.0)) == []


def test_a_claim_goes_over_partitions_and_keeps_to_its_limits(kafka_url: str):
    with filled(kafka_url, FOUR) as broker:
        lane = broker.subscribe([FOUR], "sub", BODIES)
        span = a_span(lane, 100)
        logs = {each.log for each in span.stretches}
        assert len(logs) > 1
        assert list(lane.settle([Release(span.receipt)])) == []
        some = lane.claim(7, A_LOT, 1.0)
        assert len(some) == 7
        assert isinstance(some, Span)
        few = lane.claim(100, 16, 1.0)
        assert isinstance(few, Span)
        assert len(few) > 1
        assert 16 - 2 < sum(map(len, few.bodies)) <= 16
        [one] = lane.claim(100, 1, 1.0)
        ended: list[Settlement] = [
            Done(some.receipt, 7),
            Done(few.receipt, len(few)),
            Done(one.receipt),
        ]
        assert list(lane.settle(ended)) == []


def test_part_of_a_span_fails(kafka_url: str):
    """One comes again, one is dead, some were never started; and nothing else comes again."""
    with filled(kafka_url) as broker:
        lane = broker.subscribe([ONE], "sub", BODIES)
        span = a_span(lane, 100)
        ended: list[Settlement] = [
            Done(span[:10].receipt, 10),
            Retry(span[10].receipt, 0.0, "no"),
            Done(span[11:20].receipt, 9),
            Dead(span[20].receipt, "no"),
            Done(span[21:90].receipt, 69),
            Release(span[90:].receipt),
        ]
        assert list(lane.settle(ended)) == []
        again: dict[str, Delivery] = {}
        eventually(
            lambda: (
                again.update({d.message_id: d for d in lane.claim(100, A_LOT, 0.5)})
                or len(again) == 11
            ),
            "the rest comes",
        )
        assert again.keys() == {"10", *NUMBERS[90:]}
        assert (again["10"].attempt, again["10"].repeated) == (2, True)
        assert all((again[n].attempt, again[n].repeated) == (1, False) for n in NUMBERS[90:])
        assert list(lane.settle([Done(each.receipt) for each in again.values()])) == []
        assert letters(broker) == ["no"]


def test_what_could_not_be_put_aside_is_settled_later(
    kafka_url: str, monkeypatch: pytest.MonkeyPatch
):
    """Nothing of the span was, and the same settlements count when they are made again."""
    with filled(kafka_url) as broker:
        lane = broker.subscribe([ONE], "sub", BODIES)
        span = a_span(lane, 100)
        ended: list[Settlement] = [
            Done(span[:50].receipt, 50),
            Dead(span[50].receipt, "no"),
            Done(span[51:].receipt, 49),
        ]

        def refuse(*_: object) -> None:
            raise BrokerUnavailable("no")

        with monkeypatch.context() as patched:
            patched.setattr(broker, "put_aside", refuse)
            with pytest.raises(BrokerUnavailable):
                lane.settle(ended)
        assert list(lane.extend([span.receipt], 30.0)) == [], "all of it is still held"
        assert list(lane.settle(ended)) == []
    with broker_at(kafka_url, ONE) as broker:
        lane = broker.subscribe([ONE], "sub", BODIES)
        assert list(lane.claim(10, A_LOT, 0.0)) == []


def test_a_record_without_identity_within_a_run_is_a_dead_letter(kafka_url: str):
    """Those around it are handled."""
    name = f"{namespace_of(kafka_url)}.one"
    with broker_at(kafka_url, ONE) as broker:
        lane = broker.subscribe([ONE], "sub", BODIES)
        with stranger(kafka_url) as producer:
            for number in range(90):
                id = {} if number in {40, 41, 70} else {"ce_id": str(number)}
                unread = {"x": b"\xff"} if number == 60 else {}
                headers = [*id.items(), *unread.items()]
                producer.produce(name, f'"{number}"', headers=headers or None)
        handled = Counter[str]()

        def all_handled() -> bool:
            claimed = lane.claim(100, A_LOT, 0.5)
            handled.update(each.carried.body.decode().strip('"') for each in claimed)
            assert list(lane.settle([Done(each.receipt) for each in claimed])) == []
            return len(handled) == 86

        eventually(all_handled, "the others are handled")
        assert handled == Counter(str(n) for n in range(90) if n not in {40, 41, 60, 70})
        assert len(letters(broker)) == 4


def test_a_span_steps_over_gaps(kafka_url: str):
    """Those that transactions leave, at once and rolled back."""
    name = f"{namespace_of(kafka_url)}.one"
    with broker_at(kafka_url, ONE) as broker:
        lane = broker.subscribe([ONE], "sub", BODIES)
        with stranger(kafka_url, **{"transactional.id": name}) as producer:
            producer.init_transactions(30)
            for number in range(6):
                producer.begin_transaction()
                for each in range(10):
                    id = f"{number}-{each}"
                    producer.produce(name, f'"{id}"', headers={"ce_id": id})
                if number % 2:
                    producer.commit_transaction(30)
                else:
                    producer.flush(30)
                    producer.abort_transaction(30)
        wanted = [f"{number}-{each}" for number in (1, 3, 5) for each in range(10)]
        span = a_span(lane, 30)
        assert [each.message_id for each in span] == wanted
        places = [o for stretch in span.stretches for o in stretch.offsets]
        assert places[-1] - places[0] > 30, "there are gaps"
        first, last = Done(span[:15].receipt, 15), Done(span[16:].receipt, 14)
        assert list(lane.settle([first, Retry(span[15].receipt, 0.0, "no"), last])) == []
        [again] = awaited(lane)
        assert (again.message_id, again.attempt) == (wanted[15], 2)
        assert list(lane.settle([Done(again.receipt)])) == []
    with broker_at(kafka_url, ONE) as broker:
        lane = broker.subscribe([ONE], "sub", BODIES)
        assert list(lane.claim(10, A_LOT, 0.0)) == []


def test_a_lease_ends_with_part_of_a_span_settled(kafka_url: str):
    """The others come to another one by one, marked; who held them is refused."""
    clock = Clock()
    with filled(kafka_url, texts=NUMBERS[:20], clock=clock, wall_ms=clock.wall_ms) as broker:
        silent = broker.subscribe([ONE], "sub", BODIES)
        span = a_span(silent, 20)
        assert list(silent.settle([Done(span[:15].receipt, 15)])) == []
        clock.advance(29)
        assert list(silent.extend([span[18:].receipt], 30.0)) == []
        clock.advance(2)
        other = broker.subscribe([ONE], "sub", BODIES)
        for number in NUMBERS[15:18]:
            [one] = other.claim(100, A_LOT, 0.0)
            assert (one.message_id, one.alone, one.repeated, one.attempt) == (number, True, True, 1)
            assert list(other.settle([Done(one.receipt)])) == []
        assert list(other.claim(100, A_LOT, 0.0)) == []
        assert list(silent.settle([Done(span[15:].receipt, 5)])) == [
            each.receipt for each in span[15:18]
        ]


def test_a_death_with_a_span_in_hand(kafka_url: str):
    """Each of it comes alone, counted before its start, and marked; what was settled does not."""
    with filled(kafka_url, texts=NUMBERS[:30]) as broker:
        lane = broker.subscribe([ONE], "sub", BODIES)
        span = a_span(lane, 20, limit=20)
        assert list(lane.settle([Done(span[:12].receipt, 12)])) == []
        assert list(lane.settle([Done(span[13:14].receipt, 1)])) == []
        broker.abandon()
    with broker_at(kafka_url, ONE) as broker:
        lane = broker.subscribe([ONE], "sub", BODIES)
        seen: list[str] = []
        while len(seen) < 7:
            [one] = awaited(lane)
            assert (one.alone, one.repeated, one.attempt) == (True, True, 1)
            seen.append(one.message_id)
            assert list(lane.settle([Done(one.receipt)])) == []
        assert seen == ["12", *NUMBERS[14:20]]
        while len(seen) < 17:
            rest = awaited(lane, limit=100)
            seen += [each.message_id for each in rest]
            assert list(lane.settle([Done(each.receipt) for each in rest])) == []
        assert seen[7:] == NUMBERS[20:30]


def test_a_span_of_partitions_that_moved_is_refused_in_part(
    kafka_url: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("duly.brokers.kafka.intake.DRAINS_S", 0.2)
    with filled(kafka_url, FOUR) as one, broker_at(kafka_url, FOUR) as two:
        first = one.subscribe([FOUR], "sub", BODIES)
        span = a_span(first, 100)
        second = two.subscribe([FOUR], "sub", BODIES)
        [intake] = two._intakes.values()
        eventually(
            lambda: any(name.endswith("four") for name, _ in list(intake.shares)),
            "the second has partitions",
        )
        refused = set(first.settle([Done(span.receipt, len(span))]))
        moved = {each.message_id for each in span if each.receipt in refused}
        assert len(moved) == len(refused)
        assert moved
        assert len(moved) < 100, "partitions that stay are not touched"
        again = awaited(second, len(moved), limit=1000)
        assert {each.message_id for each in again} == moved
        assert all(each.repeated and not each.alone for each in again), "nobody died"


def test_a_lane_that_is_closed_gives_its_span_back(kafka_url: str):
    with filled(kafka_url) as broker:
        lane, other = (broker.subscribe([ONE], "sub", BODIES) for _ in "ab")
        span = a_span(lane, 50, limit=50)
        lane.close()
        assert list(lane.settle([Done(span.receipt, 50)])) == [d.receipt for d in span]
        again = awaited(other, 100, limit=1000)
        assert [each.message_id for each in again if each.repeated] == NUMBERS[:50]


def test_lanes_that_want_messages_and_such_that_want_bodies(kafka_url: str):
    """They share what was fetched."""
    with filled(kafka_url) as broker:
        by_bodies = broker.subscribe([ONE], "sub", BODIES)
        whole = broker.subscribe([ONE], "sub", replace(BODIES, bodies_only=False))
        span = a_span(by_bodies, 30, limit=30)
        rest = awaited(whole, 70, limit=70)
        assert [each.message.id for each in rest] == NUMBERS[30:]
        assert not isinstance(rest, Span)
        assert list(by_bodies.settle([Done(span.receipt, 30)])) == []
        assert list(whole.settle([Done(each.receipt) for each in rest])) == []


# --- by workers


@contextmanager
def worked(
    url: str, handled: list[str], *, store: str, fails: Callable[[str], bool]
) -> Iterator[tuple[duly.App, Worker]]:
    app = duly.App("shop", broker=url, store=store)
    retry = duly.RetryPolicy(attempts=3, first_s=0.05)

    @app.consumer(ONE, name="least", guarantee="at-least-once", retry=retry, batch=40)
    def least(text: str) -> None:
        handled.append(text)
        if fails(text):
            raise RuntimeError(text)

    @app.consumer(ONE, name="exactly", guarantee="exactly-once", retry=retry, batch=40)
    def exactly(text: str, tx: duly.Transaction[Any]) -> None:
        tx.connection.execute("create table if not exists seen (id text)")
        tx.connection.execute("insert into seen values (?)", (text,))
        if fails(text):
            raise RuntimeError(text)

    try:
        app.publish_many(ONE, NUMBERS)
        with Worker(app) as worker:
            yield app, worker
    finally:
        app.close()


def test_a_worker_handles_spans_of_which_some_fail(kafka_url: str, tmp_path: Any):
    """At least once by spans, exactly once by a cursor that moves over spans."""
    handled: list[str] = []
    store = f"sqlite:///{tmp_path}/effects.db"
    bad = {"7", "39", "40", "99"}
    with worked(kafka_url, handled, store=store, fails=bad.__contains__) as (app, worker):
        eventually(
            lambda: [len(app.dead_letters(name)) for name in ("least", "exactly")] == [4, 4],
            "all that fails is given up on",
        )
        eventually(lambda: worker.counts()["exactly"].handled >= 96, "the others are handled")
        eventually(lambda: set(handled) == {*NUMBERS}, "all are handled")
    assert Counter(handled) == Counter(NUMBERS) + Counter([*bad, *bad])
    with closing(sqlite3.connect(tmp_path / "effects.db")) as connection:
        rows = [row[0] for row in connection.execute("select id from seen order by rowid")]
    assert rows == [number for number in NUMBERS if number not in bad]

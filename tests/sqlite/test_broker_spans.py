"""Claims that carry only bodies: one span, one receipt, and everything still by message."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from duly.broker import Span, SubscribeOptions
from duly.brokers.sqlite import SQLiteBroker
from duly.guarantees import Done, Guarantee, Release, Retry
from duly.message import Topic

words: Topic[str] = Topic("words", str, guarantee="at-least-once")


@pytest.fixture
def broker(db_path: Path) -> Any:
    broker = SQLiteBroker(db_path)
    broker.declare([words])
    yield broker
    broker.close()


def lane(broker: SQLiteBroker) -> Any:
    options = SubscribeOptions(Guarantee.AT_LEAST_ONCE, bodies_only=True)
    return broker.subscribe([words], "s", options)


def publish(broker: SQLiteBroker, *payloads: str) -> None:
    broker.publish([words.message(p, source="test", id=p, key=p) for p in payloads])


def claim(lane: Any, limit: int = 100) -> Span:
    claimed = lane.claim(limit, 1 << 20, 0)
    assert isinstance(claimed, Span)
    return claimed


def bodies(lane: Any) -> list[bytes]:
    return [delivery.carried.body for delivery in lane.claim(100, 1 << 20, 0)]


def test_a_span_is_a_sequence_of_deliveries(broker: SQLiteBroker) -> None:
    publish(broker, "a", "b", "c")
    span = claim(lane(broker))
    assert [d.carried.body for d in span] == [b"a", b"b", b"c"]
    assert [d.message.id for d in span] == ["a", "b", "c"]
    assert span[-1].message.key == "c"
    assert [d.receipt for d in span[1:]] == [d.receipt for d in list(span)[1:]]
    assert list(span[1:][:1]) == [span[1]]
    with pytest.raises(IndexError):
        span[3]
    with pytest.raises(ValueError, match="step"):
        span[::2]


@pytest.mark.parametrize("sources", ["xxx", "xyx", "xxy"])
def test_a_span_tells_every_source_and_id(broker: SQLiteBroker, sources: str) -> None:
    options = SubscribeOptions(Guarantee.EXACTLY_ONCE, bodies_only=True, identities=True)
    mine = broker.subscribe([words], "s", options)
    names = [f'{letter}"\\é' for letter in "bca"]  # each of them is escaped in JSON
    told = [words.message(n, source=s, id=n) for n, s in zip(names, sources, strict=True)]
    broker.publish(told)
    topic, found, ids = claim(mine).identities
    assert (topic, [*found], [*ids]) == ("words", [*sources], names)


def test_one_receipt_settles_all_or_a_part(broker: SQLiteBroker) -> None:
    publish(broker, *"abcdef")
    mine = lane(broker)
    span = claim(mine)
    assert mine.settle([Done(span[:2].receipt), Done(span[4:5].receipt)]) == []
    assert mine.settle([Release(span[2:4].receipt), Done(span[5].receipt)]) == []
    assert bodies(mine) == [b"c", b"d"]


def test_a_span_settled_beside_single_messages(broker: SQLiteBroker) -> None:
    publish(broker, *"abcd")
    mine = lane(broker)
    span = claim(mine)
    mine.settle([Done(span[:2].receipt), Retry(span[2].receipt, 0, "no"), Done(span[3].receipt)])
    [again] = mine.claim(100, 1 << 20, 0)
    assert (again.carried.body, again.attempt) == (b"c", 2)


def test_what_is_refused_of_a_span_has_its_own_receipts(broker: SQLiteBroker) -> None:
    publish(broker, *"abcd")
    mine = lane(broker)
    span = claim(mine)
    mine.settle([Done(span[1].receipt)])
    assert mine.settle([Done(span.receipt)]) == [span[1].receipt]
    assert bodies(mine) == []


def test_a_span_settled_twice_in_one_call_is_refused_the_second_time(
    broker: SQLiteBroker,
) -> None:
    publish(broker, *"ab")
    mine = lane(broker)
    span = claim(mine)
    refused = mine.settle([Done(span.receipt), Retry(span[0].receipt, 0, "late")])
    assert refused == [span[0].receipt]
    assert bodies(mine) == []


def test_a_span_is_extended_as_one_and_lost_as_one(broker: SQLiteBroker) -> None:
    publish(broker, *"abc")
    mine = lane(broker)
    span = claim(mine)
    assert mine.extend([span.receipt], 30) == []
    mine.settle([Release(span[2].receipt)])
    assert mine.extend([span.receipt], 30) == [span.receipt]
    assert mine.extend([span[:2].receipt], 30) == []


def test_a_claim_with_gaps_is_no_span(broker: SQLiteBroker) -> None:
    publish(broker, *"abcd")
    with sqlite3.connect(broker.file.path) as other:
        other.execute("delete from duly_messages where id = 'b'")
    claimed = lane(broker).claim(100, 1 << 20, 0)
    assert [d.carried.body for d in claimed] == [b"a", b"c", b"d"]
    assert [d.message.id for d in claimed] == ["a", "c", "d"]

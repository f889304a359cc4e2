"""What a claim meets on its way to a message, and what then stands in nobody's way."""

from __future__ import annotations

from typing import Any

import pytest

import duly
from duly.broker import SubscribeOptions
from duly.brokers.kafka import KafkaBroker
from duly.brokers.kafka.ending import STRAYS_WAIT_S
from duly.brokers.kafka.producers import Producers
from duly.brokers.kafka.transactions import TransactionalProducer
from duly.errors import BrokerUnavailable
from duly.guarantees import Done, Guarantee, Retry
from tests.kafka.work import (
    A_LOT,
    OPTIONS,
    ORDERS,
    awaited,
    bodies,
    broker_at,
    message,
    namespace_of,
    publish,
    stranger,
)

OTHERS = duly.Topic("others", str, guarantee="at-least-once", partitions=1)


class Clock:
    """Shows what it was set to, to whoever asks."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now

    def wall_ms(self) -> int:
        return int(self.now * 1000)


def test_a_retry_of_a_topic_that_is_not_consumed_here_keeps_no_other_waiting(kafka_url: str):
    """A consumer that has given up a topic, or whose newer code is there already elsewhere."""
    clock = Clock()
    times: dict[str, Any] = {"clock": clock, "wall_ms": clock.wall_ms}
    with broker_at(kafka_url, **times) as before:
        before.declare([OTHERS])
        lane = before.subscribe([ORDERS, OTHERS], "sub", OPTIONS)
        before.publish([OTHERS.message("stray", source="tests", id="stray")])
        [stray] = awaited(lane)
        lane.settle([Retry(stray.receipt, 0.5, "not yet")])
    with broker_at(kafka_url, **times) as after:
        lane = after.subscribe([ORDERS], "sub", OPTIONS)
        publish(after, "mine")
        [mine] = awaited(lane)
        lane.settle([Retry(mine.receipt, 0.5, "not yet")])
        clock.now += 1
        [again] = awaited(lane)
        assert (again.message.id, again.attempt) == ("mine", 2)
        lane.settle([Done(again.receipt)])
    clock.now += STRAYS_WAIT_S
    with broker_at(kafka_url, **times) as later:
        later.declare([OTHERS])
        lane = later.subscribe([ORDERS, OTHERS], "sub", OPTIONS)
        [stray] = awaited(lane)
        assert (stray.message.topic, stray.message.id, stray.attempt) == ("others", "stray", 2)


def test_a_count_that_no_program_wrote_is_none(kafka_url: str):
    """Others may write to the topic of retries, whatever they like."""
    with broker_at(kafka_url) as broker, stranger(kafka_url) as producer:
        lane = broker.subscribe([ORDERS], "sub", OPTIONS)
        publish(broker, "mine")
        [mine] = awaited(lane)
        lane.settle([Retry(mine.receipt, 0.0, "it is made, by the first")])
        [mine] = awaited(lane)
        lane.settle([Done(mine.receipt)])
        headers = [("ce_id", b"1"), ("duly-topic", b"orders"), ("duly-charged", b"9" * 5_000)]
        topic = f"{namespace_of(kafka_url)}.duly.again.sub"
        producer.produce(topic, b"theirs", headers=headers, partition=0)
        producer.flush(30)
        [theirs] = awaited(lane)
        assert (theirs.message.id, theirs.attempt) == ("1", 1)


def test_a_claim_that_finds_no_producer_holds_nothing(
    kafka_url: str, monkeypatch: pytest.MonkeyPatch
):
    """Positions are committed by a transaction there: nothing was started, nothing is charged."""
    exactly = SubscribeOptions(Guarantee.EXACTLY_ONCE, lease_s=600.0)
    broker = KafkaBroker(kafka_url)
    take, failing = Producers.take, ["one", "two", "three"]

    def taken(producers: Producers) -> TransactionalProducer:
        if failing:
            raise BrokerUnavailable(f"cannot be ended: {failing.pop()}")
        return take(producers)

    try:
        broker.declare([ORDERS])
        broker.own_store()
        lane = broker.subscribe([ORDERS], "sub", exactly)
        broker.publish([message("a", key="one"), message("b", key="one")])
        monkeypatch.setattr(Producers, "take", taken)
        while failing:
            with pytest.raises(BrokerUnavailable, match="cannot be ended"):
                lane.claim(10, A_LOT, 10.0)
        held = lane.claim(10, A_LOT, 10.0)
        assert bodies(held) == ["a", "b"]
        assert {each.attempt for each in held} == {1}
    finally:
        broker.close()

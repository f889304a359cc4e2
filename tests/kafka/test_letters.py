"""Dead letters of an app without a store, of whatever others published."""

from __future__ import annotations

import pytest

import duly
from duly.broker import SubscribeOptions
from duly.brokers.kafka import KafkaBroker
from duly.errors import ConfigurationError
from duly.guarantees import Dead, Done, Guarantee
from duly.inspection import DeadLetter, Selection
from tests.kafka.work import (
    ORDERS,
    awaited,
    bodies,
    broker_at,
    namespace_of,
    publish,
    stranger,
)

OPTIONS = SubscribeOptions(Guarantee.AT_LEAST_ONCE)
ONE = duly.Topic("one", str, guarantee="at-least-once", partitions=1)


def letters(broker: KafkaBroker) -> list[DeadLetter]:
    return sorted(broker.graveyard.select(Selection(), 100), key=lambda letter: letter.number)


def test_a_source_that_nobody_could_keep_is_replaced(kafka_url: str):
    with broker_at(kafka_url, ONE) as broker, stranger(kafka_url) as producer:
        lane = broker.subscribe([ONE], "sub", OPTIONS)
        topic = f"{namespace_of(kafka_url)}.{ONE.name}"
        producer.produce(topic, b"wrong", headers=[("ce_id", b"1"), ("ce_source", b"x\x01y")])
        producer.flush(30)
        broker.publish([ONE.message("after", source="tests")])
        assert bodies(awaited(lane)) == ["after"]  # and so the claims came to the first of them
        [letter] = letters(broker)
        assert (letter.message.id, letter.message.source) == ("1", "kafka")
        assert "x\\x01y" in letter.error


def test_one_record_that_is_no_letter_hides_no_other(kafka_url: str):
    with broker_at(kafka_url) as broker, stranger(kafka_url) as producer:
        lane = broker.subscribe([ORDERS], "sub", OPTIONS)
        publish(broker, "a", "b")
        first, second = awaited(lane, 2)
        lane.settle([Dead(first.receipt, "no")])
        dead = f"{namespace_of(kafka_url)}.duly.dead"
        producer.produce(dead, b"what", key=b"k", headers=[("duly-letter", b"{")], partition=0)
        producer.flush(30)
        lane.settle([Dead(second.receipt, "no")])
        one, wrong, two = letters(broker)
        assert {one.message.id, two.message.id} == {"a", "b"}
        assert "is no dead letter" in wrong.error
        assert wrong.message.body == b"what"
        with pytest.raises(ConfigurationError, match="a record is no letter"):
            broker.redeliver([wrong])
        assert broker.graveyard.remove([wrong]) == []
        assert [letter.message.id for letter in letters(broker)] == [
            one.message.id, two.message.id,
        ]  # fmt: skip


def test_what_is_too_large_for_a_letter_is_cut_and_stops_nobody(kafka_url: str):
    """Others may publish what a topic takes, whatever duly's own take."""
    small = f"{kafka_url}&message.max.bytes=100000"
    with broker_at(kafka_url) as theirs:
        theirs.declare([ONE])  # takes a mebibyte
        with broker_at(small) as broker:
            broker.declare([ONE])
            lane = broker.subscribe([ONE], "sub", OPTIONS)
            for body in ("before", "x" * 500_000, "after"):
                theirs.publish([ONE.message(body, source="tests", id=body[:6])])
            before, large, after = awaited(lane, 3)
            assert not lane.settle(
                [Done(before.receipt), Dead(large.receipt, "too large"), Done(after.receipt)]
            )
            [letter] = letters(broker)
            assert letter.message.body == b"x" * len(letter.message.body)
            assert 50_000 <= len(letter.message.body) < 100_000
            assert f"of its 500000 bytes the last {500_000 - len(letter.message.body)}" in (
                letter.error
            )
            with pytest.raises(ConfigurationError, match="was too large for a record and was cut"):
                broker.redeliver([letter])
            assert broker.graveyard.remove([letter]) == []
            assert letters(broker) == []

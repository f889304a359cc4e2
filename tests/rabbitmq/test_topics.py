"""One subscription of several topics, each of which has a queue of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import pytest

from duly.broker import Delivery, SubscribeOptions
from duly.brokers.rabbitmq import RabbitMQBroker
from duly.brokers.rabbitmq.lane import Lane
from duly.guarantees import Done
from duly.message import Topic
from tests.rabbitmq.work import A_LOT, OPTIONS, bodies
from tests.waiting import eventually

TOPICS: Sequence[Topic[str]] = [
    Topic(name, str, guarantee="at-least-once") for name in ("mails", "calls", "visits")
]


@pytest.fixture
def process(rabbit_url: str) -> Iterator[Callable[[], RabbitMQBroker]]:
    """Makes brokers, which are closed in the end."""
    with ExitStack() as closing:

        def make() -> RabbitMQBroker:
            broker = RabbitMQBroker(rabbit_url)
            closing.callback(broker.close)
            broker.declare(TOPICS)
            return broker

        yield make


def lane_of(broker: RabbitMQBroker, options: SubscribeOptions = OPTIONS) -> Lane:
    lane = broker.subscribe(TOPICS, "desk", options)
    assert isinstance(lane, Lane)
    return lane


def publish(broker: RabbitMQBroker, topic: Topic[str], *texts: str) -> None:
    broker.publish([topic.message(each, source="tests", id=each) for each in texts])


def one(lane: Lane) -> Delivery:
    """The next, claimed singly."""
    got: list[Delivery] = []

    def comes() -> bool:
        got.extend(lane.claim(1, A_LOT, 0.5))
        return bool(got)

    eventually(comes, "something comes")
    [delivery] = got
    return delivery


def test_a_lane_that_takes_one_at_a_time_gets_none_beforehand_of_any_topic(
    process: Callable[[], RabbitMQBroker],
):
    """It may keep the first for an hour; an idle process is to have the others."""
    mails, calls, visits = TOPICS
    busy, idle = lane_of(process()), lane_of(process())
    broker = process()
    publish(broker, mails, "first")
    held = one(busy)
    assert list(idle.claim(1, A_LOT, 0.1)) == []
    publish(broker, mails, "m1", "m2")
    publish(broker, calls, "c1", "c2")
    publish(broker, visits, "v1", "v2")
    got = []
    for _ in range(6):
        delivery = one(idle)
        got += bodies([delivery])
        assert list(idle.settle([Done(delivery.receipt)])) == []
    assert sorted(got) == ["c1", "c2", "m1", "m2", "v1", "v2"]
    assert list(busy.settle([Done(held.receipt)])) == []


def test_no_topic_waits_for_another(process: Callable[[], RabbitMQBroker]):
    broker = process()
    lane = lane_of(broker)
    for topic in TOPICS:
        publish(broker, topic, *(f"{topic.name}-{n}" for n in range(10)))
    first = [one(lane).message.topic for _ in range(6)]
    assert {first.count(topic.name) for topic in TOPICS} == {2}


def test_a_claim_that_does_not_wait_finds_what_was_published(
    process: Callable[[], RabbitMQBroker],
):
    """Also where all was empty a moment ago."""
    broker = process()
    lane = lane_of(broker)
    for n in range(20):
        assert list(lane.claim(1, A_LOT, 0.0)) == []
        publish(broker, TOPICS[n % 3], str(n))
        assert bodies(lane.claim(1, A_LOT, 0.0)) == [str(n)]


def test_who_takes_one_at_a_time_is_seen_as_a_worker(process: Callable[[], RabbitMQBroker]):
    broker = process()
    lane = lane_of(broker)
    lane.claim(1, A_LOT, 0.0)
    assert {each.workers for each in broker.queued()} == {1}
    broker.link.cut()

    def claimed_again() -> Any:
        publish(broker, TOPICS[1], "after")
        return lane.claim(1, A_LOT, 0.5)

    eventually(claimed_again, "it goes on")
    eventually(lambda: {each.workers for each in broker.queued()} == {1}, "it is seen again")


def test_what_is_had_beforehand_is_shared_among_the_topics(
    process: Callable[[], RabbitMQBroker],
):
    """Two claims for each lane, or one of each topic."""
    broker = process()
    lane = lane_of(broker)
    intake = lane.intake
    lane.claim(10, A_LOT, 0.0)
    assert intake._credit == 30
    for topic in TOPICS:
        publish(broker, topic, *(f"{topic.name}-{n}" for n in range(40)))
    eventually(lambda: len(intake.ready) >= 30, "as much as is wanted comes")
    assert intake._credit == 0
    got: set[str] = set()

    def all_come() -> bool:
        held = lane.claim(10, A_LOT, 0.5)
        got.update(bodies(held))
        assert len(intake.ready) + len(intake.held) <= 30
        assert list(lane.settle([Done(each.receipt) for each in held])) == []
        return len(got) == 120

    eventually(all_come, "all come", lambda: str(len(got)))

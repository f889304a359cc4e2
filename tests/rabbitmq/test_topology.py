"""What stands on the server, and what others may do with it."""

from __future__ import annotations

import time
from typing import Any

import pytest

from duly.broker import Published, SubscribeOptions
from duly.brokers.rabbitmq import RabbitMQBroker
from duly.brokers.rabbitmq.link import content
from duly.brokers.rabbitmq.topology import Names
from duly.errors import ConfigurationError, PublishFailed
from duly.guarantees import Dead, Done, Guarantee, Retry
from duly.inspection import Selection
from duly.message import Topic
from tests.rabbitmq.work import (
    A_LOT,
    ORDERS,
    awaited,
    bodies,
    broker_at,
    lane_of,
    message,
    publish,
)
from tests.servers.rabbitmq import RabbitMQNode, channel
from tests.waiting import eventually


def names(url: str) -> Names:
    return Names(url.partition("namespace=")[2])


def taken(url: str, queue: str) -> Any:
    """The first message of a queue, taken by a stranger."""
    with channel(url) as stranger:
        found: list[Any] = []

        def comes() -> bool:
            found.append(stranger.basic_get(queue))
            return found[-1] is not None

        eventually(comes, f"a message is in {queue}")
        stranger.basic_ack(found[-1].delivery_tag)
        return found[-1]


def send(url: str, body: bytes, **properties: Any) -> None:
    """Publish to the topic's exchange, as a program without duly does."""
    with channel(url) as stranger:
        exchange = names(url).topic(ORDERS.name)
        stranger.basic_publish(content(body, properties), exchange, "")


def test_a_queue_that_is_there_as_another_is_told_with_the_difference(rabbit_url: str):
    queue = names(rabbit_url).queue(ORDERS.name, "sub")
    with channel(rabbit_url) as stranger:
        stranger.queue_declare(queue, durable=True, auto_delete=False)
    refused = pytest.raises(ConfigurationError, match=r"x-queue-type|x-dead-letter")
    with refused as refusal, broker_at(rabbit_url):
        pass
    assert queue in str(refusal.value)
    assert "namespace" in str(refusal.value)


def test_an_exchange_that_is_there_as_another_is_told(rabbit_url: str):
    with channel(rabbit_url) as stranger:
        stranger.exchange_declare(
            names(rabbit_url).topic(ORDERS.name), "topic", durable=True, auto_delete=False
        )
    refused = pytest.raises(ConfigurationError, match="inequivalent arg 'type'")
    with refused, broker_at(rabbit_url):
        pass


def test_the_permissions_of_the_page_are_enough_and_others_are_told():
    with RabbitMQNode() as node:
        for user, write in (("enough", ".*"), ("less", "^duly/.*")):
            node.control("add_user", user, "secret")
            node.control("set_permissions", user, "^duly/.*", write, "^duly/.*")
        url = node.url.replace("guest:guest", "{}:secret")
        refused = pytest.raises(ConfigurationError, match=r"access to exch.*needs the permissions")
        with refused, broker_at(url.format("less")):
            pass
        with broker_at(url.format("enough")) as broker:
            lane = lane_of(broker)
            publish(broker, "a")
            [first] = awaited(lane)
            lane.settle([Retry(first.receipt, 0.1, "not yet")])
            [again] = awaited(lane)
            lane.settle([Dead(again.receipt, "no")])
            [letter] = broker.graveyard.select(Selection(), 10)
            assert letter.message.id == "a"


def test_the_guarantee_of_a_topic_is_fixed(rabbit_url: str):
    with broker_at(rabbit_url) as broker:
        other = Topic(ORDERS.name, str, guarantee="exactly-once")
        with pytest.raises(ConfigurationError, match="guarantee at-least-once"):
            broker.declare([other])


def test_a_refusal_leaves_the_others_at_work(rabbit_url: str):
    with broker_at(rabbit_url) as broker:
        lane = lane_of(broker)
        publish(broker, "a")
        [held] = lane.claim(1, A_LOT, 10.0)
        with pytest.raises(ConfigurationError):
            broker.subscribe([ORDERS], "sub", SubscribeOptions(Guarantee.EXACTLY_ONCE))
        assert list(lane.settle([Done(held.receipt)])) == []


def test_nobody_need_listen_to_what_may_be_lost(rabbit_url: str):
    readings: Topic[str] = Topic("readings", str, guarantee="at-most-once")
    with broker_at(rabbit_url) as broker:
        broker.declare([readings])
        [outcome] = broker.publish([readings.message("21", source="tests")])
        assert isinstance(outcome, Published)
        unheard: Topic[str] = Topic("unheard", str, guarantee="at-least-once")
        broker.declare([unheard])
        [outcome] = broker.publish([unheard.message("21", source="tests")])
        assert isinstance(outcome, PublishFailed)
        assert "no subscription takes it" in str(outcome)


def test_a_retry_waits_on_the_server_and_comes_back(rabbit_url: str):
    with broker_at(rabbit_url) as broker:
        lane = lane_of(broker)
        publish(broker, "a", "b")
        first, second = lane.claim(10, A_LOT, 10.0)
        assert list(lane.settle([Retry(first.receipt, 0.4, "not yet"), Done(second.receipt)])) == []
        started = time.monotonic()
        lane.close()
        # Nobody of duly's is there meanwhile.
    with broker_at(rabbit_url) as broker:
        [again] = lane_of(broker).claim(10, A_LOT, 20.0)
        assert time.monotonic() - started >= 0.35
        assert (bodies([again]), again.attempt, again.repeated) == (["a"], 2, True)


def test_a_stranger_reads_what_duly_publishes(rabbit_url: str):
    with broker_at(rabbit_url) as broker:
        broker.publish([message("hello", id="o-1", key="k", headers={"tenant": "blue"})])
    got = taken(rabbit_url, names(rabbit_url).queue(ORDERS.name, "sub"))
    headers = got.properties["application_headers"]
    assert got.body in ("hello", b"hello")
    assert (got.properties["message_id"], got.properties["app_id"]) == ("o-1", "tests")
    assert (headers["cloudEvents:tenant"], headers["cloudEvents:partitionkey"]) == ("blue", "k")


def test_duly_reads_what_a_stranger_publishes(rabbit_url: str):
    with broker_at(rabbit_url) as broker:
        send(rabbit_url, b"plain", message_id="one", app_id="billing")
        event = {
            "cloudEvents:specversion": "1.0",
            "cloudEvents:id": "two",
            "cloudEvents:source": "/bank",
            "cloudEvents:type": "paid",
            "cloudEvents_tenant": "blue",
            "cloudEvents:time": "2026-01-01T00:00:00Z",
        }
        send(rabbit_url, b"event", application_headers=event)
        lane = lane_of(broker)
        got = awaited(lane, 2)
        plain, event_ = (delivery.message for delivery in got)
        assert (plain.id, plain.source, plain.body) == ("one", "billing", b"plain")
        assert (event_.id, event_.source, event_.time_ms) == ("two", "/bank", 1767225600000)
        assert dict(event_.headers) == {"type": "paid", "tenant": "blue"}


def test_the_death_of_a_process_is_charged_to_who_was_alone(rabbit_url: str):
    """Three processes die with it, and the server keeps count."""
    with broker_at(rabbit_url) as broker:
        publish(broker, "poison", "mate")
    attempts = []
    for _ in range(4):
        dying = RabbitMQBroker(rabbit_url)
        dying.declare([ORDERS])
        lane = lane_of(dying)
        got = awaited(lane)
        if bodies(got) == ["mate"]:
            assert got[0].attempt == 1, "it was not alone when others died"
            lane.settle([Done(got[0].receipt)])
            got = awaited(lane)
        attempts.append((len(got), got[0].attempt, got[0].alone))
        dying.abandon()
    assert attempts == [(2, 1, False), (1, 1, True), (1, 2, True), (1, 3, True)]

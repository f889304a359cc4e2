"""The server killed and restarted, connections cut, queues deleted, alarms: nothing is lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, Self

import pytest

from duly.broker import Published
from duly.brokers.rabbitmq import RabbitMQBroker
from duly.brokers.rabbitmq.lane import Lane
from duly.brokers.rabbitmq.link import content
from duly.brokers.rabbitmq.topology import Names
from duly.errors import BrokerError, BrokerUnavailable, PublishFailed, PublishUnknown
from duly.guarantees import Done, Retry
from duly.inspection import Selection
from tests.postgres.proxy import Proxy
from tests.rabbitmq.work import (
    A_LOT,
    ORDERS,
    awaited,
    bodies,
    broker_at,
    lane_of,
    message,
    publish,
    work_off,
)
from tests.servers.postgres import named_after
from tests.servers.rabbitmq import RabbitMQNode, channel, in_namespace
from tests.waiting import eventually


@pytest.fixture
def url(rabbit_node: RabbitMQNode, request: pytest.FixtureRequest) -> str:
    rabbit_node.start_again()  # a test that failed may have left it dead
    return in_namespace(named_after(request.node.name), rabbit_node.url)


@pytest.fixture
def proxy(rabbit_node: RabbitMQNode) -> Iterator[Proxy]:
    with Proxy(rabbit_node.port) as proxy:
        yield proxy


def settled(node: RabbitMQNode, url: str) -> None:
    """Wait until the server has the queues on disk."""
    queue = Names(url.partition("namespace=")[2]).queue(ORDERS.name, "sub")
    eventually(lambda: node.remembers(queue), "the queues are on disk")


class Producer:
    """Publishes on a thread, each message until it is confirmed."""

    def __init__(self, broker: RabbitMQBroker) -> None:
        self.confirmed: set[str] = set()
        self.unknown = 0
        self._broker = broker
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive(), "publishing hangs"

    def _run(self) -> None:
        number = 0
        while not self._stop.is_set():
            batch = [message(str(n), id=str(n)) for n in range(number, number + 20)]
            number += 20
            while batch and not self._stop.is_set():
                outcomes = self._broker.publish(batch)
                pairs = list(zip(batch, outcomes, strict=True))
                self.confirmed |= {m.id for m, o in pairs if isinstance(o, Published)}
                self.unknown += sum(isinstance(o, PublishUnknown) for _, o in pairs)
                batch = [m for m, outcome in pairs if not isinstance(outcome, Published)]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", pytest.param("stop", marks=pytest.mark.long)])
def test_what_was_confirmed_survives_the_server(rabbit_node: RabbitMQNode, url: str, how: str):
    with broker_at(url) as broker:
        lane = lane_of(broker)
        settled(rabbit_node, url)  # before somebody publishes: the files are whole in a lull only
        with Producer(broker) as producer:
            go_through_a_restart(rabbit_node, how, lane, producer)


def go_through_a_restart(node: RabbitMQNode, how: str, lane: Lane, producer: Producer) -> None:
    early = work_off(lane, lambda handled: len(handled) > 100)
    held = lane.claim(5, A_LOT, 10.0)
    getattr(node, how)()
    node.start()
    before = len(producer.confirmed)
    late = work_off(lane, lambda handled: len(producer.confirmed) > before + 100)
    # A tag of the old channel means another message on the new one.
    stale = [delivery.receipt for delivery in held]
    assert list(lane.settle([Done(receipt) for receipt in stale])) == stale
    producer._stop.set()
    producer._thread.join(60)
    rest = work_off(lane, lambda h: producer.confirmed <= {*early, *late, *h})
    assert producer.confirmed <= {*early, *late, *rest}


@pytest.mark.slow
def test_a_server_that_is_away_is_told_and_found_again(rabbit_node: RabbitMQNode, url: str):
    with broker_at(url, deadline_s=1.0) as broker:
        lane = lane_of(broker)
        publish(broker, "a")
        [held] = lane.claim(1, A_LOT, 10.0)
        settled(rabbit_node, url)
        rabbit_node.kill()
        [outcome] = broker.publish([message("b", id="b")])
        assert isinstance(outcome, PublishFailed | PublishUnknown)
        eventually(lambda: not broker.link.is_up, "the consumers know it too")
        assert list(lane.settle([Done(held.receipt)])) == [held.receipt]
        rabbit_node.start()
        eventually(
            lambda: isinstance(broker.publish([message("c", id="c")])[0], Published),
            "the publisher is connected again",
        )
        assert {"a", "c"} <= set(work_off(lane, {"a", "c"}.issubset))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_publish_whose_link_is_cut_is_told_as_it_is(proxy: Proxy, url: str, when: Any):
    with broker_at(proxy.url(url), deadline_s=5.0) as broker:
        lane = lane_of(broker)
        proxy.cut_at(b"the marked body", when)
        [outcome] = broker.publish([message("the marked body", id="m")])
        assert isinstance(outcome, PublishUnknown)
        assert outcome.message_id == "m"
        assert proxy.cuts == 1
        publish(broker, "next")
        handled = work_off(lane, {"next"}.issubset)
        assert handled.count("the marked body") == (when == "after")


def test_a_cut_link_of_consumers_brings_what_was_held_again(proxy: Proxy, url: str):
    with broker_at(proxy.url(url)) as broker:
        lane = lane_of(broker)
        publish(broker, "a", "b")
        held = lane.claim(10, A_LOT, 10.0)
        assert bodies(held) == ["a", "b"]
        broker.link.cut()
        eventually(
            lambda: list(lane.extend([d.receipt for d in held], 30.0)) == [d.receipt for d in held],
            "the claims are lost",
        )
        again = awaited(lane)
        assert (bodies(again), again[0].repeated, again[0].alone) == (["a"], True, True)
        assert list(lane.settle([Done(d.receipt) for d in held])) == [d.receipt for d in held]
        assert list(lane.settle([Done(again[0].receipt)])) == []
        assert work_off(lane, {"b"}.issubset) == ["b"]


def test_half_open_a_connection_is_noticed_by_its_heartbeats(url: str, proxy: Proxy):
    """The other side is there and says nothing, as behind a firewall that forgot."""
    silent = proxy.url(url) + "&heartbeat=1"
    with broker_at(silent) as broker:
        lane = lane_of(broker)
        publish(broker, "a")
        [held] = lane.claim(1, A_LOT, 10.0)
        generation = lane.intake.generation
        proxy.mute()
        eventually(lambda: lane.intake.generation > generation, "the silence is noticed")
        assert list(lane.settle([Done(held.receipt)])) == [held.receipt]
        assert work_off(lane, {"a"}.issubset) == ["a"]


def test_a_suspect_of_a_connection_that_is_gone_is_nobodys(url: str):
    """Its tag is another message's by then."""
    names = Names(url.partition("namespace=")[2])
    with broker_at(url) as broker:
        with channel(url) as operator:
            suspect = content(b"suspect", {"message_id": "suspect"})
            operator.basic_publish(suspect, "", names.alone(ORDERS.name, "sub"))
        lane = lane_of(broker)
        intake = lane.intake
        call = broker.link.call
        lost: list[Any] = []

        def then_lost(run: Any, timeout_s: float = 30.0) -> Any:
            told = call(run, timeout_s)
            if run == intake.get_alone and intake.suspects and not lost:
                lost.extend(intake.suspects)
                call(intake.open)
            return told

        broker.link.call = then_lost  # type: ignore[method-assign]
        assert bodies(awaited(lane)) == ["suspect"]
        assert [held.item.taken_back for held in intake.held.values()] == [1]


def test_a_suspect_that_comes_after_nobody_waits_for_it_any_more_is_claimed(url: str):
    names = Names(url.partition("namespace=")[2])
    with broker_at(url) as broker:
        with channel(url) as operator:
            suspect = content(b"suspect", {"message_id": "suspect"})
            operator.basic_publish(suspect, "", names.alone(ORDERS.name, "sub"))
        lane = lane_of(broker)
        intake = lane.intake
        call = broker.link.call
        given_up: list[Any] = []

        def too_late(run: Any, timeout_s: float = 30.0) -> Any:
            told = call(run, timeout_s)
            if run == intake.get_alone and intake.suspects and not given_up:
                given_up.extend(intake.suspects)
                raise BrokerError("no answer within 30 s")
            return told

        broker.link.call = too_late  # type: ignore[method-assign]
        with pytest.raises(BrokerError, match="no answer"):
            awaited(lane)
        [claimed] = awaited(lane)
        assert (bodies([claimed]), claimed.alone, claimed.attempt) == (["suspect"], True, 1)
        assert list(lane.settle([Done(claimed.receipt)])) == []


def test_a_suspect_that_nobody_claimed_is_given_back_uncharged(url: str):
    names = Names(url.partition("namespace=")[2])
    with channel(url) as operator, broker_at(url) as first:
        lane = lane_of(first)
        suspect = content(b"suspect", {"message_id": "suspect"})
        operator.basic_publish(suspect, "", names.alone(ORDERS.name, "sub"))

        def is_here() -> bool:
            first.link.call(lane.intake.get_alone)
            return bool(lane.intake.suspects)

        eventually(is_here, "it was fetched")
        lane.close()
    with broker_at(url) as second:
        [claimed] = awaited(lane_of(second))
        assert (bodies([claimed]), claimed.attempt) == (["suspect"], 1)


def test_what_nobody_can_read_is_no_suspect_for_ever(url: str):
    """It was on its way to a process that died."""
    with broker_at(url) as first:
        lane = lane_of(first)
        assert list(lane.claim(10, A_LOT, 0.1)) == []
        with channel(url) as stranger:
            topic = Names(url.partition("namespace=")[2]).topic(ORDERS.name)
            stranger.basic_publish(content(b"nameless", {}), topic, "")
        eventually(lambda: bool(lane.intake.ready), "it is on its way")
        first.abandon()
    with broker_at(url) as second:
        publish(second, "a")
        lane = lane_of(second)
        assert work_off(lane, {"a"}.issubset) == ["a"]

        def errors() -> list[str]:
            lane.claim(10, A_LOT, 0.1)
            return [each.error for each in second.graveyard.select(Selection(), 10)]

        eventually(lambda: bool(errors()), "it is a dead letter")
        assert "without identity" in errors()[0]


def test_a_queue_that_is_deleted_is_made_again(url: str):
    names = Names(url.partition("namespace=")[2])
    with broker_at(url) as broker:
        lane = lane_of(broker)
        publish(broker, "a")
        assert work_off(lane, {"a"}.issubset) == ["a"]
        with channel(url) as operator:
            operator.queue_delete(names.queue(ORDERS.name, "sub"))
        eventually(
            lambda: isinstance(broker.publish([message("b", id="b")])[0], Published),
            "the queue is there again",
        )
        assert set(work_off(lane, {"b"}.issubset)) == {"b"}


def test_a_channel_that_both_sides_end_ends_alone(url: str):
    """One that did not answer is given up just when the server closes it, as it does after it has
    waited for that queue itself.
    """
    with broker_at(url) as broker:
        before = broker.link._connection

        def given_up(connection: Any) -> Any:
            channel = connection.channel()
            channel.on_lost = lambda _: None
            channel.basic_ack(77)  # there is no such delivery, for which the server closes it
            channel._given_up()
            return channel

        lost = broker.link.call(given_up)
        eventually(lambda: lost.connection is None, "both have ended it")
        assert broker.link.call(lambda connection: connection.channel().is_open)
        assert broker.link._connection is before, "the others go on"


def test_a_consumer_that_the_server_does_not_see_subscribes_again(url: str):
    with broker_at(url) as broker:
        lane = lane_of(broker)
        publish(broker, "a")
        assert work_off(lane, {"a"}.issubset) == ["a"]
        broker.link.call(lane.intake.stop)
        assert not broker.link.call(lane.intake.is_consumed)
        broker.look()
        publish(broker, "b")
        assert work_off(lane, {"b"}.issubset) == ["b"]


@pytest.mark.slow
def test_an_alarm_is_back_pressure_with_a_deadline(rabbit_node: RabbitMQNode, url: str):
    with broker_at(url, deadline_s=2.0) as broker:
        lane = lane_of(broker)
        publish(broker, "a", "a2")
        [held, other] = awaited(lane, 2)
        rabbit_node.control("set_vm_memory_high_watermark", "absolute", "1")
        try:
            outcomes: list[Any] = []

            def blocked() -> bool:
                outcomes.extend(broker.publish([message("b", id="b")]))
                return isinstance(outcomes[-1], PublishFailed)

            eventually(blocked, "publishers are blocked", lambda: str(outcomes))
            assert "blocked" in str(outcomes[-1])
            # Consumers have a connection of their own, and go on.
            assert list(lane.settle([Done(held.receipt)])) == []
            # A retry is published, and so it waits with the publishers; nothing is lost by that.
            with pytest.raises(BrokerUnavailable):
                lane.settle([Retry(other.receipt, 0.0, "later")])
            assert list(lane.extend([other.receipt], 30.0)) == []
        finally:
            rabbit_node.control("set_vm_memory_high_watermark", "0.4")
        eventually(
            lambda: isinstance(broker.publish([message("c", id="c")])[0], Published),
            "publishers go on",
        )
        assert "c" in work_off(lane, {"c"}.issubset)


def test_heartbeats_are_answered_whatever_the_handler_does(url: str):
    """A server that hears nothing for two of them would end the connection, and the claim."""
    with broker_at(f"{url}&heartbeat=1") as broker:
        lane = lane_of(broker)
        publish(broker, "a")
        [held] = lane.claim(1, A_LOT, 10.0)
        generation = lane.intake.generation
        heard: set[int] = set()

        def several_heartbeats() -> bool:
            heard.add(broker.link.call(lambda connection: int(connection.bytes_recv)))
            return len(heard) > 6

        eventually(several_heartbeats, "nothing but heartbeats came")
        assert lane.intake.generation == generation
        assert list(lane.settle([Done(held.receipt)])) == []

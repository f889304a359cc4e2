"""More that goes wrong: silence in one direction, a full disk, what is deleted, killed or slow."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import amqp
import pytest

from duly.broker import Published, SubscribeOptions
from duly.brokers.rabbitmq.lane import Lane
from duly.brokers.rabbitmq.link import content
from duly.brokers.rabbitmq.publisher import Sending, State
from duly.brokers.rabbitmq.topology import Names
from duly.errors import BrokerError, PublishFailed, PublishUnknown
from duly.guarantees import Done, Guarantee, Retry
from duly.message import Topic
from tests.postgres.proxy import Proxy
from tests.rabbitmq.work import (
    A_LOT,
    OPTIONS,
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

# On servers of its own, and minutes in all.
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def node() -> Iterator[RabbitMQNode]:
    """It takes messages back after two seconds, and looks for them twice a second."""
    with RabbitMQNode("consumer_timeout = 2000") as node:
        node.control("eval", "application:set_env(rabbit, channel_tick_interval, 500).")
        yield node


@pytest.fixture
def namespace(request: pytest.FixtureRequest) -> str:
    return named_after(request.node.name)


@pytest.fixture
def url(node: RabbitMQNode, namespace: str) -> str:
    return in_namespace(namespace, node.url)


# --- silence in one direction


@pytest.mark.parametrize("direction", ["to_server", "to_client"])
def test_half_open_in_one_direction_consumers_are_connected_again(
    node: RabbitMQNode, url: str, direction: str
):
    with Proxy(node.port) as proxy, broker_at(f"{proxy.url(url)}&heartbeat=1") as broker:
        lane = lane_of(broker)
        publish(broker, "a")
        [held] = lane.claim(1, A_LOT, 10.0)
        generation = lane.intake.generation
        proxy.mute(**{**dict.fromkeys(("to_server", "to_client"), False), direction: True})
        eventually(lambda: lane.intake.generation > generation, "the silence is noticed")
        assert list(lane.settle([Done(held.receipt)])) == [held.receipt]
        assert work_off(lane, {"a"}.issubset) == ["a"]


@pytest.mark.parametrize("direction", ["to_server", "to_client"])
def test_half_open_in_one_direction_a_publish_is_told_as_it_is(
    node: RabbitMQNode, url: str, direction: str
):
    """What was swallowed on its way, and what arrived and was not confirmed, look the same."""
    with Proxy(node.port) as proxy, broker_at(f"{proxy.url(url)}&heartbeat=1") as broker:
        lane = lane_of(broker)
        proxy.mute(**{**dict.fromkeys(("to_server", "to_client"), False), direction: True})
        [outcome] = broker.publish([message("a", id="a")])
        assert isinstance(outcome, PublishUnknown)
        eventually(
            lambda: isinstance(broker.publish([message("b", id="b")])[0], Published),
            "the publisher is connected again",
        )
        handled = work_off(lane, {"b"}.issubset)
        assert ("a" in handled) == (direction == "to_client")


# --- alarms


def test_a_full_disk_is_back_pressure_with_a_deadline(node: RabbitMQNode, url: str):
    with broker_at(url, deadline_s=2.0) as broker:
        lane = lane_of(broker)
        node.control("set_disk_free_limit", "1000000GB")
        try:
            told: list[str] = []

            def blocked() -> bool:
                [outcome] = broker.publish([message("b", id="b")])
                told.append(str(outcome))
                return isinstance(outcome, PublishFailed)

            eventually(blocked, "publishers are blocked", lambda: str(told))
            assert "the server has blocked publishers" in told[-1]
            [finding] = [each for each in broker.examine() if each.level == "wrong"]
            assert "the server has blocked publishers" in finding.found
        finally:
            node.control("set_disk_free_limit", "50MB")
        eventually(
            lambda: isinstance(broker.publish([message("c", id="c")])[0], Published),
            "publishers go on",
        )
        assert all(each.level != "wrong" for each in broker.examine())
        assert "c" in work_off(lane, {"c"}.issubset)


def test_what_was_refused_does_not_keep_the_next_from_being_told_apart(
    node: RabbitMQNode, url: str, namespace: str
):
    """After a refusal publishing goes on with another channel, whose tags begin anew."""
    pattern = f"^{namespace}/orders/sub$"
    node.control("set_policy", "--apply-to", "queues", "full", pattern, '{"max-length": 10}')
    try:
        with broker_at(url) as broker:
            confirmed: set[str] = set()
            channels: set[object] = set()
            number = itertools.count()

            def renewed_thrice() -> bool:
                batch = [message(str(n), id=str(n)) for n in itertools.islice(number, 30)]
                outcomes = zip(batch, broker.publish(batch), strict=True)
                confirmed.update(m.id for m, each in outcomes if isinstance(each, Published))
                channels.add(broker._publisher._confirmed)
                return len(channels) > 3

            eventually(renewed_thrice, "another channel is taken each time")
            assert confirmed <= set(work_off(lane_of(broker), confirmed.issubset))
            assert isinstance(broker.publish([message("then", id="then")])[0], Published)
            left = broker._publisher.link.call(lambda connection: len(connection.channels))
            assert left <= 4, "those that are done with are closed"
    finally:
        node.control("clear_policy", "full")


def test_what_is_sent_while_another_channel_is_made_is_told_apart_too(
    url: str, monkeypatch: pytest.MonkeyPatch
):
    """An answer that comes meanwhile makes more be sent, by the channel before."""
    with broker_at(url, deadline_s=5.0) as broker:
        publisher = broker._publisher
        publish(broker, "before")
        target = Names(url.partition("namespace=")[2]).queue(ORDERS.name, "sub")
        meanwhile = [Sending(content(b"-", {"message_id": str(n)}), "", target) for n in range(4)]
        left = iter(meanwhile)

        def then(do: Callable[..., Any]) -> Callable[..., Any]:
            def done(*args: Any, **named: Any) -> Any:
                result = do(*args, **named)
                publisher._waiting.append(next(left))
                publisher._pump(publisher._confirmed.connection)
                return result

            return done

        with monkeypatch.context() as patch:
            for step in ("open", "confirm_select"):
                patch.setattr(amqp.Channel, step, then(getattr(amqp.Channel, step)))
            publisher.link.call(publisher._renew)
            publisher.link.call(publisher._renew)
        publish(broker, "after")
        eventually(lambda: not publisher._unconfirmed, "each has its own answer")
        assert {each.state for each in meanwhile} == {State.CONFIRMED}


def test_what_amqp_cannot_carry_is_told_and_shifts_no_answer(url: str):
    with broker_at(url, deadline_s=5.0) as broker:
        publish(broker, "before")
        publisher = broker._publisher
        wrong = Sending(content(b"", {"app_id": "x" * 256}), "", "nobody")
        publisher.send([wrong])
        assert wrong.state is State.UNWRITABLE
        publish(broker, "after")
        assert not publisher._unconfirmed


def test_what_was_not_sent_in_time_is_kept_no_longer(url: str):
    with broker_at(url, deadline_s=0.2) as broker:
        broker._publisher.link.blocked = "a test"
        outcomes = broker.publish([message(str(n)) for n in range(10)])
        assert {type(each) for each in outcomes} == {PublishFailed}
        assert not broker._publisher._waiting


# --- deleted, killed


def test_an_exchange_that_is_deleted_is_made_again(url: str, namespace: str):
    """With who listens to it: its bindings went with it."""
    with broker_at(url, deadline_s=5.0) as broker:
        lane = lane_of(broker)
        publish(broker, "a")
        assert work_off(lane, {"a"}.issubset) == ["a"]
        with channel(url) as operator:
            operator.exchange_delete(Names(namespace).topic(ORDERS.name))
        [outcome] = broker.publish([message("b", id="b")])
        assert isinstance(outcome, PublishUnknown)
        eventually(
            lambda: isinstance(broker.publish([message("c", id="c")])[0], Published),
            "it is there again",
        )
        assert "c" in work_off(lane, {"c"}.issubset)


def test_a_queue_whose_process_is_killed_goes_on(node: RabbitMQNode, url: str, namespace: str):
    with broker_at(url) as broker:
        lane = lane_of(broker)
        publish(broker, "a", "b", "c")
        held = awaited(lane, 3)
        process = f'list_to_atom("%2F_{Names(namespace).queue(ORDERS.name, "sub")}")'
        told = node.control("eval", f"exit(whereis({process}), kill).")
        assert "true" in told
        publish(broker, "d")
        refused = lane.settle([Done(each.receipt) for each in held])
        seen = set(work_off(lane, {"d"}.issubset))
        assert seen >= {each.message.body.decode() for each in held if each.receipt in refused}


def test_a_queue_whose_name_did_not_reach_the_disk_is_told_and_can_be_mended():
    """The server has answered that it is declared, and forgets it. It comes back as a queue that
    takes and gives nothing, which duly cannot tell from one that has lost its majority for a while.
    """
    with RabbitMQNode() as node:
        url = in_namespace("early", node.url)
        with broker_at(url) as broker:
            publish(broker, "a")
            broker.abandon()
        node.kill()
        node.start()
        with broker_at(url, deadline_s=2.0) as broker:
            assert isinstance(broker.publish([message("b", id="b")])[0], PublishUnknown)
            lane = lane_of(broker)
            with pytest.raises(BrokerError, match="list_unresponsive_queues names the queue"):
                lane.claim(10, A_LOT, 1.0)
            broker.abandon()
        for dead in node.control("list_unresponsive_queues").split()[1:]:
            node.control("delete_queue", dead)
        with broker_at(url) as broker:
            publish(broker, "c")
            assert work_off(lane_of(broker), {"c"}.issubset) == ["c"]


# --- the server takes back what is held for too long


def test_a_message_that_is_held_for_too_long_is_taken_back(url: str):
    with broker_at(url) as broker:
        lane = lane_of(broker)
        publish(broker, "slow", "other")
        held = awaited(lane, 2)
        receipts = [each.receipt for each in held]
        eventually(lambda: list(lane.extend(receipts, 60.0)) == receipts, "the claims are lost")
        assert list(lane.settle([Done(receipt) for receipt in receipts])) == receipts
        # Suspects now, each alone: the second is not to suffer for the first again.
        handled = work_off(lane, {"slow", "other"}.issubset, 1)
        assert sorted(handled) == ["other", "slow"]


def test_taken_back_is_not_the_answer_to_another_call(url: str, namespace: str):
    """The server closes the channel while something is declared on another."""
    with broker_at(url) as broker:
        lane = lane_of(broker)
        publish(broker, "slow")
        [held] = awaited(lane)
        generation = lane.intake.generation

        def declare(connection: Any) -> None:
            another = connection.channel()
            until = time.monotonic() + 20
            while lane.intake.generation == generation and time.monotonic() < until:
                another.queue_declare(Names(namespace).queue(ORDERS.name, "sub"), passive=True)
            another.close()

        broker.link.call(declare)
        assert lane.intake.generation > generation, "it was taken back meanwhile"
        assert list(lane.settle([Done(held.receipt)])) == [held.receipt]


def test_who_is_too_slow_each_time_becomes_a_dead_letter_in_the_end(url: str):
    """The starts are charged, once the message is alone: it does not go round for ever."""
    with broker_at(url) as broker:
        lane = lane_of(broker)
        publish(broker, "slow")
        attempts = []
        for _ in range(3):
            [held] = awaited(lane)
            assert bodies([held]) == ["slow"]
            attempts.append((held.attempt, held.alone))
            eventually(partial(lane.extend, [held.receipt], 60.0), "it is lost")
        assert attempts == [(1, False), (1, True), (2, True)]


def test_a_queue_that_answers_nothing_keeps_no_other_subscription_from_its_claims():
    """One that the server forgot when it was killed; the others were on its disk."""
    well: Topic[str] = Topic("well", str, guarantee="at-least-once")
    with RabbitMQNode() as node:
        url = in_namespace("stuck", node.url)
        with broker_at(url) as broker:
            broker.declare([well])
            broker.prepare([well], "well", OPTIONS)
            queues = [Names("stuck").queue(*of) for of in (("well", "well"), ("orders", "sub"))]
            eventually(lambda: all(map(node.remembers, queues)), "the queues are on disk")
            broker.prepare([ORDERS], "stuck", OPTIONS)
            broker.abandon()
        node.kill()
        node.start()
        with broker_at(url) as broker:
            broker.declare([well])
            lane = broker.subscribe([well], "well", OPTIONS)
            stuck = broker.subscribe([ORDERS], "stuck", OPTIONS)
            broker.publish([well.message("a", source="tests", id="a")])
            held = awaited(lane)
            with pytest.raises(BrokerError, match="list_unresponsive_queues names the queue"):
                stuck.claim(10, A_LOT, 1.0)
            with pytest.raises(BrokerError, match="asked again later"):
                stuck.claim(10, A_LOT, 1.0)
            # As `duly doctor` and the watch ask, every 10 s.
            broker.look()
            broker.queued()
            broker.carry()
            assert list(lane.settle([Done(each.receipt) for each in held])) == []
            # And whoever is connected anew.
            broker.link.cut()
            broker.publish([well.message("b", source="tests", id="b")])
            assert work_off(cast(Lane, lane), {"b"}.issubset)[-1] == "b"
            broker.abandon()


@pytest.fixture
def patient(node: RabbitMQNode) -> Iterator[None]:
    """It waits for eight seconds."""
    setting = "application:set_env(rabbit, consumer_timeout, {})."
    node.control("eval", setting.format(8000))
    yield
    node.control("eval", setting.format(2000))


@pytest.mark.usefixtures("patient")
def test_what_waits_for_its_turn_in_order_is_not_held_for_too_long(url: str):
    """Ten of one key, each of which takes an eighth of what the server waits for the first. And one
    that is to be tried again after longer than that.
    """
    lines: Topic[str] = Topic("lines", str, guarantee="at-least-once", partitions=1)
    options = SubscribeOptions(Guarantee.AT_LEAST_ONCE, order_by_key=True)
    handled: list[str] = []
    takes = threading.Event()
    with broker_at(f"{url}&consumer_timeout=8000") as broker:
        broker.declare([lines])
        lane = broker.subscribe([lines], "slow", options)
        for n in range(10):
            broker.publish([lines.message(f"{n}", source="tests", id=f"{n}", key="k")])

        def work() -> bool:
            for each in lane.claim(1, A_LOT, 0.2):
                again = each.message.id == "5" and each.attempt == 1
                takes.wait(1.0)
                assert not each.alone, "nobody died with it"
                assert each.repeated == (each.attempt > 1)
                done = Retry(each.receipt, 10.0, "later") if again else Done(each.receipt)
                assert list(lane.settle([done])) == []
                handled.extend(() if again else bodies([each]))
            return len(handled) == 10

        eventually(work, "all are handled", lambda: str(handled), 60.0)
    assert handled == [str(n) for n in range(10)]


@pytest.mark.usefixtures("patient")
def test_what_waits_for_a_lane_that_is_busy_is_not_held_for_too_long(url: str):
    busy = threading.Event()
    with broker_at(f"{url}&consumer_timeout=8000") as broker:
        lane = lane_of(broker)
        publish(broker, *(str(n) for n in range(50)))
        held = lane.claim(10, A_LOT, 5.0)
        assert list(lane.settle([Done(each.receipt) for each in held])) == []
        seen = bodies(held)
        generation = lane.intake.generation
        busy.wait(14.0)
        assert lane.intake.generation == generation

        def work() -> bool:
            came = lane.claim(10, A_LOT, 0.2)
            assert not any(each.alone or each.repeated for each in came), "nobody died with it"
            assert list(lane.settle([Done(each.receipt) for each in came])) == []
            seen.extend(bodies(came))
            return len(seen) >= 50

        eventually(work, "all are handled", lambda: str(len(seen)))
        assert sorted(seen, key=int) == [str(n) for n in range(50)]

"""What is over is acknowledged, whatever the rest of its batch has to wait for."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from duly.broker import Delivery, Published, SubscribeOptions
from duly.brokers.rabbitmq import RabbitMQBroker
from duly.errors import BrokerError, BrokerUnavailable, CommitUnknown
from duly.guarantees import Dead, Done, Guarantee, Release, Retry, Settlement
from duly.message import Topic
from tests.rabbitmq.work import A_LOT, ORDERS, awaited, bodies, broker_at
from tests.servers.postgres import named_after
from tests.servers.rabbitmq import RabbitMQNode, in_namespace
from tests.waiting import eventually

PROBE: Topic[str] = Topic("probe", str, guarantee="at-least-once", may_go_unheard=True)
LINES: Topic[str] = Topic("lines", str, guarantee="at-least-once", partitions=1, key=str)
TOPICS = pytest.mark.parametrize("topic", [ORDERS, LINES], ids=["plain", "in order"])


@pytest.fixture
def url(rabbit_node: RabbitMQNode, request: pytest.FixtureRequest) -> str:
    rabbit_node.start_again()  # a test that failed may have left it dead
    return in_namespace(named_after(request.node.name), rabbit_node.url)


@contextmanager
def alarm(node: RabbitMQNode, broker: RabbitMQBroker) -> Iterator[None]:
    """The server takes no messages, and this process has noticed."""
    broker.declare([PROBE])
    probe = PROBE.message("-", source="tests")
    node.control("set_vm_memory_high_watermark", "absolute", "1")
    try:
        eventually(
            lambda: not isinstance(broker.publish([probe])[0], Published),
            "publishers are blocked",
        )
        yield
    finally:
        node.control("set_vm_memory_high_watermark", "0.4")


def lanes_of(broker: RabbitMQBroker, topic: Topic[Any], lease_s: float) -> Sequence[Any]:
    broker.declare([topic])
    options = SubscribeOptions(
        Guarantee.AT_LEAST_ONCE, order_by_key=topic is LINES, lease_s=lease_s
    )
    return [broker.subscribe([topic], "some", options) for _ in range(2)]


def published(broker: RabbitMQBroker, topic: Topic[Any], *ids: str) -> None:
    outcomes = broker.publish([topic.message(each, source="t", id=each) for each in ids])
    assert all(isinstance(outcome, Published) for outcome in outcomes)


def ends(deliveries: Sequence[Delivery], fails: str) -> list[Settlement]:
    return [
        Retry(each.receipt, 0.0, "fails") if each.message_id == fails else Done(each.receipt)
        for each in deliveries
    ]


@pytest.mark.slow
@TOPICS
def test_under_an_alarm_what_was_handled_is_acknowledged(
    rabbit_node: RabbitMQNode, url: str, topic: Topic[str]
):
    with broker_at(url, deadline_s=2.0) as broker:
        lane, other = lanes_of(broker, topic, lease_s=60.0)
        published(broker, topic, "a", "b", "c")
        held = awaited(lane, 3)
        receipts = [each.receipt for each in held]
        with alarm(rabbit_node, broker):
            for _ in range(2):
                assert list(lane.extend(receipts, 1.0)) == []
                with pytest.raises(CommitUnknown, match="2 messages were acknowledged"):
                    lane.settle(ends(held, "b"))
                assert list(lane.extend(receipts, 30.0)) == []
            assert list(other.claim(10, A_LOT, 0.0)) == []
            broker.abandon()  # what was not acknowledged by now comes again
    with broker_at(url) as broker:
        _, other = lanes_of(broker, topic, lease_s=30.0)
        published(broker, topic, "d")
        got: set[str] = set()
        while not got >= {"b", "d"}:
            came = awaited(other)
            got.update(each.message_id for each in came)
            other.settle([Done(each.receipt) for each in came])
        got.update(each.message_id for each in other.claim(10, A_LOT, 0.5))
        assert got == {"b", "d"}


@pytest.mark.slow
@TOPICS
def test_settled_again_once_the_alarm_is_over_nothing_is_refused(
    rabbit_node: RabbitMQNode, url: str, topic: Topic[str]
):
    with broker_at(url, deadline_s=1.0) as broker:
        lane, _ = lanes_of(broker, topic, lease_s=30.0)
        published(broker, topic, "a", "b", "c")
        held = awaited(lane, 3)
        with alarm(rabbit_node, broker), pytest.raises(CommitUnknown):
            lane.settle(ends(held, "b"))

        def settled() -> bool:
            try:
                return list(lane.settle(ends(held, "b"))) == []
            except CommitUnknown:
                return False

        eventually(settled, "nothing is refused")
        receipts = [each.receipt for each in held]
        assert list(lane.settle(ends(held, "b"))) == receipts, "and now it is over"
        [again] = awaited(lane)
        assert (again.message_id, again.attempt) == ("b", 2)


@pytest.mark.slow
def test_a_suspect_of_a_lane_that_closes_under_an_alarm_goes_to_the_next(
    rabbit_node: RabbitMQNode, url: str
):
    """It cannot be published again, and the channel on which it came is other lanes' too."""
    with broker_at(url, deadline_s=1.0) as broker:
        lane, other = lanes_of(broker, ORDERS, lease_s=30.0)
        published(broker, ORDERS, "a")
        [held] = awaited(lane)
        lane.extend([held.receipt], 0.0)
        [held] = awaited(lane)
        assert held.alone
        with alarm(rabbit_node, broker):
            lane.close()
            [again] = awaited(other)
        assert (again.message_id, again.alone, again.repeated) == ("a", True, True)
        assert list(other.settle([Done(again.receipt)])) == []


@TOPICS
def test_a_claim_that_is_being_settled_neither_ends_nor_is_lost(url: str, topic: Topic[str]):
    """However long the server takes for what is published elsewhere."""
    now = [0.0]
    with broker_at(url, clock=lambda: now[0]) as broker:
        lane, other = lanes_of(broker, topic, lease_s=10.0)
        published(broker, topic, "a", "b", "c")
        held = awaited(lane, 3)
        begun, goes_on = threading.Event(), threading.Event()
        move, keep = broker.move, broker.keep

        def waits(what: Any) -> None:
            begun.set()
            goes_on.wait(60)
            (keep if what and isinstance(what[0], tuple) else move)(what)

        for name in ("move", "keep"):
            setattr(broker, name, waits)
        refused: list[Any] = ["not yet"]
        settling = threading.Thread(
            target=lambda: refused.__setitem__(slice(None), lane.settle(ends(held, "b")))
        )
        settling.start()
        try:
            assert begun.wait(30)
            now[0] += 60.0
            assert list(other.claim(10, A_LOT, 0.0)) == []
            assert list(lane.extend([each.receipt for each in held], 10.0)) == []
            receipts = [each.receipt for each in held if each.message_id == "b"]
            assert list(lane.settle([Done(each) for each in receipts])) == receipts
        finally:
            goes_on.set()
            settling.join(30)
        assert refused == []
        [again] = awaited(other)
        assert (again.message_id, again.attempt, again.alone) == ("b", 2, False)


@TOPICS
@pytest.mark.parametrize("error", [BrokerError("full"), RuntimeError("a bug")], ids=repr)
def test_what_cannot_be_settled_stays_claimed_and_the_rest_is_over(
    url: str, topic: Topic[str], error: Exception
):
    with broker_at(url) as broker:
        lane, other = lanes_of(broker, topic, lease_s=30.0)
        published(broker, topic, "a", "b", "c")
        held = awaited(lane, 3)
        by_id = {each.message_id: each.receipt for each in held}
        some = [Done(by_id["a"]), Dead(by_id["b"], "fails"), Release(by_id["c"], True)]
        with pytest.MonkeyPatch.context() as patch:

            def raises(*_: object) -> None:
                raise error

            patch.setattr(broker, "move", raises)
            raised = CommitUnknown if isinstance(error, BrokerError) else RuntimeError
            with pytest.raises(raised):
                lane.settle(some)
            assert list(lane.extend(by_id.values(), 30.0)) == []
            with pytest.raises(raised):
                lane.settle(some)
        assert list(lane.settle(some)) == []
        [again] = awaited(other)
        assert (bodies([again]), again.repeated) == (["c"], True)


@TOPICS
def test_where_nothing_is_over_nothing_was_settled(url: str, topic: Topic[str]):
    with broker_at(url) as broker:
        lane, _ = lanes_of(broker, topic, lease_s=30.0)
        published(broker, topic, "a")
        [held] = awaited(lane)
        with pytest.MonkeyPatch.context() as patch:

            def raises(*_: object) -> None:
                raise BrokerError("full")

            patch.setattr(broker, "move", raises)
            with pytest.raises(BrokerUnavailable, match="nothing was settled"):
                lane.settle([Dead(held.receipt, "fails")])
        assert list(lane.settle([Done(held.receipt)])) == []

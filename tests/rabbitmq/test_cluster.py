"""Three nodes that lose one, and another: run by ``make cluster``, for it takes minutes."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from functools import partial

import pytest

from duly.broker import Published, SubscribeOptions, Subscription
from duly.brokers.rabbitmq import RabbitMQBroker
from duly.brokers.rabbitmq.lane import Lane
from duly.brokers.rabbitmq.topology import Names
from duly.errors import BrokerError, CommitUnknown
from duly.guarantees import Done, Guarantee
from duly.message import Topic
from tests.rabbitmq.test_faults import Producer
from tests.rabbitmq.work import (
    A_LOT,
    OPTIONS,
    ORDERS,
    broker_at,
    lane_of,
    message,
    work_off,
)
from tests.servers.postgres import named_after
from tests.servers.rabbitmq import RabbitMQNode, in_namespace
from tests.servers.rabbitmq_cluster import RabbitMQCluster
from tests.waiting import eventually

log = logging.getLogger("tests.cluster")

IN_ORDER = SubscribeOptions(Guarantee.AT_LEAST_ONCE, order_by_key=True)
ONCE = SubscribeOptions(Guarantee.AT_MOST_ONCE)
pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[RabbitMQCluster]:
    with RabbitMQCluster() as cluster:
        yield cluster


@pytest.fixture
def url(cluster: RabbitMQCluster, request: pytest.FixtureRequest) -> str:
    for node in cluster.nodes:
        node.start_again()
    return in_namespace(named_after(request.node.name), cluster.url)


def queue_at(url: str) -> str:
    return Names(url.partition("namespace=")[2]).queue(ORDERS.name, "sub")


class Run:
    """Publishing and consuming through what happens, and the account at the end."""

    def __init__(self, broker: RabbitMQBroker, lane: Lane, producer: Producer) -> None:
        self._broker = broker
        self._lane = lane
        self._producer = producer
        self.handled: list[str] = []

    def goes_on(self) -> float:
        """Until a hundred more are confirmed and some are handled; how long that took."""
        began, before = time.monotonic(), len(self._producer.confirmed)
        seen = set(self.handled)
        self.handled += work_off(
            self._lane,
            lambda h: len(self._producer.confirmed) > before + 100 and len(h - seen) > 50,
        )
        return time.monotonic() - began

    def ends(self) -> None:
        """Everything that was confirmed was handled."""
        self._producer._stop.set()
        self._producer._thread.join(120)
        assert not self._producer._thread.is_alive(), "publishing hangs"
        confirmed = self._producer.confirmed
        left = confirmed - set(self.handled)
        if left:
            self.handled += work_off(self._lane, left.issubset, limit=500)
        assert confirmed <= set(self.handled)
        repeats = len(self.handled) - len(set(self.handled))
        log.warning("%s confirmed, all handled, %s of them again", len(confirmed), repeats)


def test_the_leader_is_killed_and_then_another(cluster: RabbitMQCluster, url: str):
    with broker_at(url) as broker:
        lane = lane_of(broker)
        cluster.wait_for(queue_at(url), 3)
        with Producer(broker) as producer:
            run = Run(broker, lane, producer)
            run.goes_on()
            for _ in range(2):
                leader = cluster.leader_of(queue_at(url))
                leader.kill()
                log.warning("without its leader it goes on within %.1f s", run.goes_on())
                leader.start()
                cluster.wait_for(queue_at(url), 3)
                log.warning("with all three within %.1f s", run.goes_on())
            follower = next(n for n in cluster.nodes if n is not cluster.leader_of(queue_at(url)))
            follower.kill()
            log.warning("without a follower within %.1f s", run.goes_on())
            run.ends()


def test_without_a_majority_nothing_is_confirmed(cluster: RabbitMQCluster, url: str):
    with broker_at(url, deadline_s=3.0) as broker:
        lane = lane_of(broker)
        cluster.wait_for(queue_at(url), 3)
        last = cluster.leader_of(queue_at(url))
        others = [node for node in cluster.nodes if node is not last]
        for node in others:
            node.kill()
        outcomes = [broker.publish([message(f"lost {n}", id=f"lost {n}")])[0] for n in range(3)]
        assert not any(isinstance(outcome, Published) for outcome in outcomes), outcomes
        others[0].start()
        eventually(
            lambda: isinstance(broker.publish([message("after", id="after")])[0], Published),
            "two of three are enough",
            timeout_s=90.0,
        )
        assert "after" in work_off(lane, {"after"}.issubset)


def test_each_node_is_restarted_in_turn(cluster: RabbitMQCluster, url: str):
    """As an upgrade does."""
    with broker_at(url) as broker:
        lane = lane_of(broker)
        cluster.wait_for(queue_at(url), 3)
        with Producer(broker) as producer:
            run = Run(broker, lane, producer)
            for node in cluster.nodes:
                node.restart()
                cluster.wait_for(queue_at(url), 3)
                run.goes_on()
            run.ends()


def test_no_node_is_needed_by_itself(cluster: RabbitMQCluster, url: str):
    """Each in turn is down. Whatever has one home has another soon, also for a new process."""
    lines: Topic[str] = Topic("lines", str, guarantee="at-least-once", partitions=2)
    views: Topic[str] = Topic("views", str, guarantee="at-most-once")
    topics = {ORDERS: OPTIONS, lines: IN_ORDER, views: ONCE}

    def working(broker: RabbitMQBroker) -> list[Subscription]:
        broker.declare(topics)
        for topic, options in topics.items():
            broker.prepare([topic], topic.name, options)
        return [broker.subscribe([topic], topic.name, o) for topic, o in topics.items()]

    with broker_at(url, deadline_s=5.0) as broker:
        lanes = working(broker)
        for node in cluster.nodes:
            cluster.wait_for(queue_at(url), 3)
            node.kill()
            come: dict[str, set[str]] = {topic.name: set() for topic in topics}

            def all_come(node: RabbitMQNode = node, come: dict[str, set[str]] = come) -> bool:
                id = f"{node.name} {time.monotonic()}"
                broker.publish([t.message("x", source="tests", id=id, key=id) for t in topics])
                try:
                    for lane in lanes:
                        for each in lane.claim(10, A_LOT, 0.5):
                            come[each.message.topic].add(each.message.id)
                            lane.settle([Done(each.receipt)])
                except (BrokerError, CommitUnknown):
                    return False
                return all(any(node.name in id for id in ids) for ids in come.values())

            eventually(all_come, "all goes on", partial(str, come), 90.0)

            def are_seen() -> bool:
                for lane in lanes:
                    lane.claim(0, A_LOT, 0.0)
                broker.look()
                counted = {each.subscription: each.workers for each in broker.queued()}
                return all(counted[topic.name] == 1 for topic in topics)

            eventually(are_seen, "each is seen at work", lambda: str(broker.queued()), 60.0)
            assert "did not answer" not in str(broker.examine())
            with broker_at(url, deadline_s=5.0) as another:
                for lane in working(another):
                    lane.claim(1, A_LOT, 0.1)
            node.start()

"""Three brokers that lose one, and another: run by ``make cluster``, for it takes minutes."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import duly
from duly.broker import Published
from duly.errors import PublishUnknown
from tests.kafka.copying import read
from tests.kafka.shop import COPIES, RECEIPTS, Shop
from tests.kafka.test_faults import Producer
from tests.kafka.test_survey import configure, text
from tests.kafka.work import ORDERS, broker_at, message
from tests.servers.kafka import in_namespace
from tests.servers.kafka_cluster import KafkaCluster
from tests.servers.postgres import named_after
from tests.waiting import eventually

log = logging.getLogger("tests.cluster")

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(900)]
QUICK = "&session.timeout.ms=6000&heartbeat.interval.ms=1000"
PATIENCE_S = 180.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[KafkaCluster]:
    with KafkaCluster() as cluster:
        yield cluster


@pytest.fixture
def url(cluster: KafkaCluster, request: pytest.FixtureRequest) -> str:
    cluster.start()
    return in_namespace(named_after(request.node.name), cluster.url) + QUICK


class Account:
    """Publishing and working through what happens, and what is there in the end."""

    def __init__(self, shop: Shop, producer: Producer) -> None:
        self._shop = shop
        self._producer = producer

    def goes_on(self) -> float:
        """Until two hundred more are confirmed, and as many told, charged and copied; how long that
        took.
        """
        began, shop = time.monotonic(), self._shop
        confirmed, told = len(self._producer.confirmed), len(set(shop.told))
        charged = len(shop.charged())

        def all_do() -> bool:
            return (
                len(self._producer.confirmed) > confirmed + 200
                and len(set(shop.told)) > told + 200
                and len(shop.charged()) > charged + 200
            )

        eventually(all_do, "it goes on", self._so_far, PATIENCE_S)
        return time.monotonic() - began

    def _so_far(self) -> str:
        shop = self._shop
        return f"{len(self._producer.confirmed)} {len(set(shop.told))} {len(shop.charged())}"

    def ends(self) -> None:
        """Nothing was lost, and nothing stands twice where that is promised."""
        self._producer._stop.set()
        self._producer._thread.join(120)
        assert not self._producer._thread.is_alive(), "publishing hangs"
        shop, confirmed = self._shop, self._producer.confirmed
        orders = shop.stored(ORDERS.name)
        assert confirmed <= orders.keys(), "what was confirmed is there"

        def all_is_done() -> bool:
            return (
                orders.keys() <= set(shop.told)
                and len(shop.charged()) >= orders.total()
                and shop.stored("receipts").total() >= orders.total()
                and shop.stored("copies").total() >= orders.total()
            )

        eventually(all_is_done, "all is done", self._so_far, PATIENCE_S)
        # A publish that was repeated is another order: each is charged and copied once.
        assert Counter(shop.charged()) == orders
        assert shop.stored("receipts") == orders
        assert shop.stored("copies") == orders
        repeats = orders.total() - len(orders)
        again = len(shop.told) - orders.total()
        log.warning(
            "%s confirmed, %s published again; told %s more often than published",
            len(confirmed), repeats, again,
        )  # fmt: skip


def of(url: str, *names: str) -> list[str]:
    """Topics as the cluster knows them."""
    namespace = url.partition("namespace=")[2].partition("&")[0]
    return [f"{namespace}.{name}" for name in names]


def test_one_is_killed_and_then_another(cluster: KafkaCluster, url: str, tmp_path: Path):
    """Both times the one that leads most, with its coordinators."""
    with broker_at(url) as broker:
        broker.declare([RECEIPTS, COPIES])
        cluster.wait_until_whole()
        with Shop(url, tmp_path) as shop, Producer(broker) as producer:
            account = Account(shop, producer)
            account.goes_on()
            for _ in range(2):
                leader = cluster.leads_most(of(url, "orders", "receipts", "copies"))
                cluster.nodes[leader].kill()
                log.warning("without its leader it goes on within %.1f s", account.goes_on())
                cluster.start()
                cluster.wait_until_whole()
                log.warning("with all three within %.1f s", account.goes_on())
            account.ends()


def test_each_is_shut_down_in_turn(cluster: KafkaCluster, url: str, tmp_path: Path):
    """As an upgrade does."""
    with broker_at(url) as broker:
        broker.declare([RECEIPTS, COPIES])
        cluster.wait_until_whole()
        with Shop(url, tmp_path) as shop, Producer(broker) as producer:
            account = Account(shop, producer)
            for node in cluster.nodes.values():
                node.stop()
                account.goes_on()
                cluster.start()
                cluster.wait_until_whole()
            account.ends()


def test_with_one_of_three_nothing_is_confirmed(cluster: KafkaCluster, url: str):
    with broker_at(url, deadline_s=5.0) as broker:
        cluster.wait_until_whole()
        assert isinstance(broker.publish([message("before")])[0], Published)
        last = cluster.leader_of(*of(url, "orders"))
        others = [node for number, node in cluster.nodes.items() if number != last]
        for node in others:
            node.kill()
        began = time.monotonic()
        outcomes = [broker.publish([message(f"lost {n}", id=f"lost {n}")])[0] for n in range(3)]
        assert time.monotonic() - began < 30
        assert {type(outcome) for outcome in outcomes} == {PublishUnknown}, outcomes
        others[0].begin()
        eventually(
            lambda: isinstance(broker.publish([message("after", id="after")])[0], Published),
            "two of three are enough",
            timeout_s=90.0,
        )
        cluster.start()
    assert {"before", "after"} <= {each.body for each in read(url, ORDERS.name)}


def test_what_keeps_it_safe_is_read(cluster: KafkaCluster, url: str):
    """Three copies of which two confirm need no word; less is a limit, with the remedy."""
    once: duly.Topic[str] = duly.Topic("once", str, guarantee="at-least-once", partitions=1)
    with broker_at(url), broker_at(f"{url}&replication=1", once):
        cluster.wait_until_whole()
        found = text(url)
        assert "3 brokers: copies, settings and what this login may do were looked at" in found
        assert "orders' has" not in found
        assert "once' has one copy" in text(url, once)
        configure(url, *of(url, "orders"), min_insync_replicas="1")
        assert "min.insync.replicas=1" in text(url)

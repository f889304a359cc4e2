"""A worker whose position is lost ends, whatever was handled before, and says why."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal, get_args

import confluent_kafka.admin
import pytest
from confluent_kafka import TopicPartition

import duly
from duly.broker import SubscribeOptions
from duly.brokers.kafka import KafkaBroker
from duly.errors import BrokerUnusable
from duly.guarantees import Guarantee
from duly.worker import Worker
from tests.kafka.work import (
    A_LOT,
    OPTIONS,
    awaited,
    bodies,
    broker_at,
    namespace_of,
    settled,
    stranger,
)
from tests.kafka.work import host_of as bootstrap_of
from tests.waiting import eventually

driver: Any = confluent_kafka.admin
ONE: duly.Topic[str] = duly.Topic("one", str, guarantee="at-least-once", partitions=1)
LATEST = SubscribeOptions(Guarantee.AT_LEAST_ONCE, start="latest")
Weaker = Literal["at-most-once", "at-least-once"]


@pytest.fixture
def admin(kafka_url: str) -> Any:
    """What an operator does."""
    return driver.AdminClient({"bootstrap.servers": bootstrap_of(kafka_url)})


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cluster is looked at often."""
    monkeypatch.setattr("duly.brokers.kafka.broker.WATCH_S", 0.2)


def answered(futures: Any) -> None:
    for future in futures.values():
        future.result(30)


def delete(admin: Any, url: str) -> None:
    """The topic is gone, for everybody who asks."""
    name = f"{namespace_of(url)}.one"
    answered(admin.delete_topics([name]))
    eventually(lambda: name not in admin.list_topics(timeout=10).topics, "it is gone")


def make(admin: Any, url: str) -> None:
    answered(admin.create_topics([driver.NewTopic(f"{namespace_of(url)}.one", 1, 1)]))


def publish(broker: KafkaBroker, *texts: str) -> None:
    broker.publish([ONE.message(text, id=text, source="tests") for text in texts])


@contextlib.contextmanager
def working(url: str, guarantee: Weaker = "at-least-once") -> Iterator[Worker]:
    """A worker that has handled a message, and ends by itself with `BrokerUnusable`."""
    app = duly.App("shop", broker=url)
    handled: list[str] = []

    @app.consumer(ONE, name="sub", guarantee=guarantee)
    def take(text: str) -> None:
        handled.append(text)

    try:
        worker = Worker(app)
        worker.start()
        app.publish(ONE, "a")
        eventually(lambda: handled == ["a"], "it is handled")
        yield worker
    finally:
        app.close()


def ends(worker: Worker, why: str) -> None:
    assert worker.wait(40), "the worker goes on"
    with pytest.raises(BrokerUnusable, match=why):
        worker.drain(10)


@pytest.mark.usefixtures("looks")
@pytest.mark.parametrize("guarantee", get_args(Weaker))
def test_a_worker_whose_topic_is_deleted_ends(kafka_url: str, admin: Any, guarantee: Weaker):
    with working(kafka_url, guarantee) as worker:
        delete(admin, kafka_url)
        ends(worker, "one' was deleted while")


def test_a_worker_ends_whose_topic_was_made_anew_after_it_lost_its_partitions(
    kafka_url: str, admin: Any, monkeypatch: pytest.MonkeyPatch
):
    """Where nobody looked while it was away: what it is given then is another log."""
    monkeypatch.setattr(KafkaBroker, "_watching", lambda _: None)
    with working(kafka_url) as worker:
        broker: Any = worker.app.backends()[0]
        intake = broker.intake("sub")
        delete(admin, kafka_url)
        eventually(lambda: not [n for n in intake.shares if n[0].endswith(".one")], "it is lost")
        make(admin, kafka_url)
        ends(worker, "one' was deleted and made again")


def test_a_worker_ends_that_retention_overtakes(kafka_url: str, admin: Any):
    name = f"{namespace_of(kafka_url)}.one"
    with (
        working(kafka_url) as worker,
        stranger(kafka_url, **{"transactional.id": name}) as producer,
    ):
        producer.init_transactions(30)
        producer.begin_transaction()
        producer.produce(name, "x", headers={"ce_id": "x"})
        producer.flush(30)
        # The worker stays before what is not committed, and that is deleted.
        answered(admin.delete_records([TopicPartition(name, 0, -1)]))
        ends(worker, "nothing at the position")
        producer.abort_transaction(30)


@pytest.mark.parametrize("options", [OPTIONS, LATEST])
def test_nothing_of_a_topic_that_was_made_anew_is_passed_over(
    kafka_url: str, admin: Any, options: SubscribeOptions
):
    """Whatever the consumer says about where it begins: it has begun before."""
    with broker_at(kafka_url, ONE) as broker:
        broker.subscribe([ONE], "sub", options)
    delete(admin, kafka_url)
    with broker_at(kafka_url, ONE) as broker:
        publish(broker, "new")
        assert bodies(awaited(broker.subscribe([ONE], "sub", options))) == ["new"]
        assert list(broker.subscribe([ONE], "another", LATEST).claim(1, A_LOT, 0.0)) == []


@pytest.mark.usefixtures("looks")
@pytest.mark.parametrize("guarantee", [Guarantee.AT_LEAST_ONCE, Guarantee.EXACTLY_ONCE])
def test_what_was_rolled_back_leaves_no_lag(kafka_url: str, admin: Any, guarantee: Guarantee):
    """Nor a position that retention overtakes, where a worker is killed after an idle time."""
    name, options = f"{namespace_of(kafka_url)}.one", SubscribeOptions(guarantee)
    with broker_at(kafka_url, ONE) as broker:
        if guarantee is Guarantee.EXACTLY_ONCE:
            broker.own_store()
        lane = broker.subscribe([ONE], "sub", options)
        with stranger(kafka_url, **{"transactional.id": name}) as producer:
            producer.init_transactions(30)
            producer.begin_transaction()
            producer.produce(name, "x", headers={"ce_id": "x"})
            producer.flush(30)
            producer.abort_transaction(30)
        # Before that there seems to be nothing to pass over.
        settled(kafka_url, "one")
        assert list(lane.claim(1, A_LOT, 0.0)) == []
        eventually(lambda: broker.queued()[0].backlog == 0, "it is committed")
        answered(admin.delete_records([TopicPartition(name, 0, -1)]))
        broker.abandon()
    with broker_at(kafka_url, ONE) as broker:
        publish(broker, "b")
        if guarantee is Guarantee.EXACTLY_ONCE:
            broker.own_store()
        assert bodies(awaited(broker.subscribe([ONE], "sub", options))) == ["b"]

"""Where a consumer goes on: positions that are lost are told, and gaps are none."""

from __future__ import annotations

from typing import Any

import confluent_kafka.admin
import pytest
from confluent_kafka import ConsumerGroupTopicPartitions, TopicPartition

from duly.broker import SubscribeOptions
from duly.brokers.kafka import KafkaBroker
from duly.brokers.kafka.notes import Notes, as_text
from duly.errors import BrokerUnusable
from duly.guarantees import Admission, Done, Guarantee
from duly.message import Topic
from duly.store import Scope
from duly.stores.memory import MemoryStore
from tests.kafka.work import (
    A_LOT,
    OPTIONS,
    awaited,
    bodies,
    broker_at,
    host_of,
    namespace_of,
    stranger,
    work_off,
)
from tests.waiting import eventually

ONE: Topic[str] = Topic("one", str, guarantee="at-least-once", partitions=1)
LATEST = SubscribeOptions(Guarantee.AT_LEAST_ONCE, start="latest")


@pytest.fixture
def admin(kafka_url: str) -> Any:
    """What an operator does."""
    driver: Any = confluent_kafka.admin
    return driver.AdminClient({"bootstrap.servers": host_of(kafka_url)})


def publish(broker: KafkaBroker, *texts: str) -> None:
    broker.publish([ONE.message(text, id=text, source="tests") for text in texts])


def work(url: str, *texts: str) -> None:
    """A process that publishes these, handles them and ends."""
    with broker_at(url, ONE) as broker:
        publish(broker, *texts)
        lane = broker.subscribe([ONE], "sub", OPTIONS)
        assert work_off(lane, lambda seen: seen >= set(texts)) == list(texts)


def answered(futures: Any) -> None:
    for future in futures.values():
        future.result(30)


def test_a_position_that_kafka_forgot_is_an_error(kafka_url: str, admin: Any):
    """Whatever the consumer says about where it begins: it has begun before."""
    work(kafka_url, "a", "b")
    answered(admin.delete_consumer_groups([f"{namespace_of(kafka_url)}.sub"]))
    for options in (OPTIONS, LATEST):
        with broker_at(kafka_url, ONE) as broker:
            with pytest.raises(BrokerUnusable, match=r"lost its position.*one/0"):
                broker.subscribe([ONE], "sub", options)
            broker.subscribe([ONE], "another", options)


def test_who_asks_again_when_it_is_mended_begins_anew(kafka_url: str, admin: Any):
    work(kafka_url, "a", "b")
    group, name = f"{namespace_of(kafka_url)}.sub", f"{namespace_of(kafka_url)}.one"
    answered(admin.delete_consumer_groups([group]))
    with broker_at(kafka_url, ONE) as broker:
        with pytest.raises(BrokerUnusable):
            broker.subscribe([ONE], "sub", OPTIONS)
        again = (broker._names.again("sub"), 0, 0)
        places = [TopicPartition(name, 0, 1), TopicPartition(*again)]
        answered(admin.alter_consumer_group_offsets([ConsumerGroupTopicPartitions(group, places)]))
        assert bodies(awaited(broker.subscribe([ONE], "sub", OPTIONS))) == ["b"]


def test_where_a_person_says_to_go_on_it_goes_on(kafka_url: str, admin: Any):
    work(kafka_url, "a", "b", "c")
    group, name = f"{namespace_of(kafka_url)}.sub", f"{namespace_of(kafka_url)}.one"
    to = ConsumerGroupTopicPartitions(group, [TopicPartition(name, 0, 1)])
    answered(admin.alter_consumer_group_offsets([to]))
    with broker_at(kafka_url, ONE) as broker:
        assert bodies(awaited(broker.subscribe([ONE], "sub", OPTIONS), 2)) == ["b", "c"]


def test_messages_that_retention_took_are_an_error(kafka_url: str, admin: Any):
    """Before anything starts: who is started again and again is told that it is no use."""
    work(kafka_url, "a", "b")
    name = f"{namespace_of(kafka_url)}.one"
    with broker_at(kafka_url, ONE) as broker:
        publish(broker, "c", "d", "e")
        answered(admin.delete_records([TopicPartition(name, 0, 4)]))
        with pytest.raises(BrokerUnusable, match="nothing at the position"):
            broker.subscribe([ONE], "sub", OPTIONS)
        broker.subscribe([ONE], "another", OPTIONS)


def test_a_topic_made_again_is_another_log(kafka_url: str, admin: Any):
    """Its first messages stand where others have taken effect."""
    store, name = MemoryStore(), f"{namespace_of(kafka_url)}.one"
    options = SubscribeOptions(Guarantee.EXACTLY_ONCE)
    took: list[list[str]] = []
    for texts in (["a", "b"], ["c", "d"]):
        with broker_at(kafka_url, ONE) as broker:
            publish(broker, *texts)
            held = awaited(broker.subscribe([ONE], "sub", options), 2)
            session = store.begin(Scope("sub", Admission.BY_CURSOR))
            fresh = session.admit(held).fresh
            session.settle([Done(each.receipt) for each in fresh], fresh)
            session.commit()
            took.append(bodies(fresh))
        answered(admin.delete_topics([name]))
        eventually(lambda: name not in admin.list_topics(timeout=10).topics, "it is gone")
    assert took == [["a", "b"], ["c", "d"]]


@pytest.mark.parametrize("transacted", [False, True])
def test_a_topic_made_again_under_a_worker_is_an_error(
    kafka_url: str, admin: Any, monkeypatch: pytest.MonkeyPatch, transacted: bool
):
    """Its first messages would be passed over, and the position be that of another."""
    monkeypatch.setattr("duly.brokers.kafka.broker.WATCH_S", 0.2)
    name = f"{namespace_of(kafka_url)}.one"
    driver: Any = confluent_kafka.admin
    with broker_at(kafka_url, ONE) as broker:
        publish(broker, "a", "b")
        options = OPTIONS
        if transacted:
            broker.own_store()
            options = SubscribeOptions(Guarantee.EXACTLY_ONCE)
        lane = broker.subscribe([ONE], "sub", options)
        assert work_off(lane, lambda seen: len(seen) == 2) == ["a", "b"]
        answered(admin.delete_topics([name]))
        eventually(lambda: name not in admin.list_topics(timeout=10).topics, "it is gone")
        answered(admin.create_topics([driver.NewTopic(name, 1, 1)]))
        with pytest.raises(BrokerUnusable):
            eventually(lambda: lane.claim(1, A_LOT, 0.5), "it is noticed")


def test_a_position_in_another_incarnation_is_an_error(kafka_url: str, admin: Any):
    """A worker that went on a moment too long has committed it."""
    group, name = f"{namespace_of(kafka_url)}.sub", f"{namespace_of(kafka_url)}.one"
    with broker_at(kafka_url, ONE) as broker:
        publish(broker, "a", "b")
    told = as_text(Notes("the id of another"), 1)
    to = ConsumerGroupTopicPartitions(group, [TopicPartition(name, 0, 1, told)])
    answered(admin.alter_consumer_group_offsets([to]))
    with broker_at(kafka_url, ONE) as broker, pytest.raises(BrokerUnusable, match="made again"):
        broker.subscribe([ONE], "sub", OPTIONS)


def test_partitions_that_are_added_are_read_from_their_beginning(kafka_url: str, admin: Any):
    """Also by who began with the latest: nobody has seen these."""
    free: Topic[str] = Topic("one", str, guarantee="at-least-once")
    name = f"{namespace_of(kafka_url)}.one"
    with broker_at(kafka_url, free) as broker:
        broker.subscribe([free], "sub", LATEST)
    driver: Any = confluent_kafka.admin
    answered(admin.create_partitions([driver.NewPartitions(name, 2)]))
    with stranger(kafka_url) as producer:
        producer.produce(name, "new", headers={"ce_id": "1"}, partition=1)
    with broker_at(kafka_url, free) as broker:
        assert bodies(awaited(broker.subscribe([free], "sub", LATEST))) == ["new"]


def test_what_was_rolled_back_is_never_read(kafka_url: str):
    """And the gaps that transactions leave are stepped over, by the cursor and by the position."""
    store, name = MemoryStore(), f"{namespace_of(kafka_url)}.one"
    options = SubscribeOptions(Guarantee.EXACTLY_ONCE)
    with broker_at(kafka_url, ONE) as broker:
        lane = broker.subscribe([ONE], "sub", options)
        with stranger(kafka_url, **{"transactional.id": name}) as producer:
            producer.init_transactions(30)
            for number in range(6):
                producer.begin_transaction()
                producer.produce(name, str(number), headers={"ce_id": str(number)})
                if number % 2:
                    producer.commit_transaction(30)
                else:
                    producer.flush(30)
                    producer.abort_transaction(30)
        took: list[str] = []

        def some() -> bool:
            held = lane.claim(10, A_LOT, 0.5)
            session = store.begin(Scope("sub", Admission.BY_CURSOR))
            fresh = session.admit(held).fresh
            session.settle([Done(each.receipt) for each in fresh], fresh)
            session.commit()
            took.extend(bodies(fresh))
            assert list(lane.settle([Done(each.receipt) for each in held])) == []
            return len(took) >= 3

        eventually(some, "what was committed is read")
        assert took == ["1", "3", "5"]
        [queued] = broker.queued()
    with broker_at(kafka_url, ONE) as broker:
        lane = broker.subscribe([ONE], "sub", options)
        assert list(lane.claim(10, A_LOT, 0.0)) == []
        assert (queued.subscription, queued.topic, queued.workers) == ("sub", "one", 1)


def test_the_lag_is_told(kafka_url: str):
    with broker_at(kafka_url, ONE) as broker:
        publish(broker, *"abcde")
        broker.know([ONE], "sub", OPTIONS)
        assert [each.backlog for each in broker.queued()] == [5]
        lane = broker.subscribe([ONE], "sub", OPTIONS)
        held = awaited(lane, 2, limit=2)
        lane.settle([Done(each.receipt) for each in held])
        assert [(each.backlog, each.workers) for each in broker.queued()] == [(5 - len(held), 1)]
        assert [finding.level for finding in broker.examine()] == ["ok"]

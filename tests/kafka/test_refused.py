"""One record of a transaction that the cluster refuses: which it was is told, however many there
are and whenever that comes.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AdminClient

import duly
from duly.brokers.kafka.address import Address, address_of
from duly.brokers.kafka.admin import Admin, Wanted
from duly.brokers.kafka.producer import Sending
from duly.brokers.kafka.transactions import TransactionalProducer
from duly.errors import TransactionFailed
from duly.worker import Worker
from tests.kafka.copier import THERE, copier
from tests.kafka.copying import publish
from tests.kafka.relaying import ORDERS
from tests.kafka.test_relay import read, relaying, unsent
from tests.kafka.work import host_of, namespace_of
from tests.waiting import eventually

OTHERS: duly.Topic[int] = duly.Topic("others", int, guarantee="exactly-once", partitions=1)

# So long the driver looks for a topic at each try.
QUICKLY = "&transaction.timeout.ms=4000"


@pytest.fixture
def address(kafka_url: str) -> Address:
    return address_of(kafka_url, kafka_url)


@pytest.fixture
def producer(address: Address) -> Iterator[TransactionalProducer]:
    with closing(TransactionalProducer(address, f"refused-{secrets.token_hex(8)}")) as one:
        yield one


@pytest.mark.parametrize("at", [0, 5000, 9999])
def test_one_that_is_too_large_among_thousands(
    address: Address, producer: TransactionalProducer, kafka_url: str, at: int
):
    name = f"{namespace_of(kafka_url)}.small"
    Admin(address).make([Wanted(name, 1, {"max.message.bytes": "500000"})])
    sendings = [Sending(name, b"x", None, []) for _ in range(10_000)]
    sendings[at].body = secrets.token_bytes(600_000)

    def store() -> None:
        producer.begin()
        producer.send(sendings)
        producer.commit()

    with pytest.raises(TransactionFailed, match=r"too large|larger"):
        store()


def test_a_topic_that_is_gone_is_made_again_by_who_copies_into_it(kafka_url: str):
    broker = kafka_url + QUICKLY
    publish(broker, 20)
    app = copier(broker)
    with app, Worker(app):
        eventually(lambda: numbers(broker) == [*range(20)], "they are copied", timeout_s=60.0)
        delete(broker, THERE.name)
        publish(broker, 20, first=20)
        eventually(
            lambda: numbers(broker) == [*range(20, 40)],
            "the others are", lambda: str(numbers(broker)), 90.0,
        )  # fmt: skip


def numbers(broker: str) -> list[int]:
    """What is there of what was copied, if that can be read just now."""
    name = f"{namespace_of(broker)}.{THERE.name}"
    reader: Any = Consumer(
        {
            "bootstrap.servers": host_of(broker),
            "group.id": "judge",
            "isolation.level": "read_committed",
            "allow.auto.create.topics": False,
        }
    )
    with closing(reader):
        reader.assign([TopicPartition(name, n, 0) for n in range(THERE.partitions)])
        found = [record for record in reader.consume(1000, 2.0) if record.error() is None]
    return sorted(int(record.value()) for record in found)


def delete(broker: str, topic: str) -> None:
    client: Any = AdminClient({"bootstrap.servers": host_of(broker)})
    for deleted in client.delete_topics([f"{namespace_of(broker)}.{topic}"]).values():
        deleted.result(30)


def test_what_is_published_to_a_topic_that_is_gone_holds_up_no_other(
    kafka_url: str, tmp_path: Path
):
    kafka_url += QUICKLY
    app = duly.App("shop", broker=kafka_url, store=f"sqlite:///{tmp_path}/effects.db")
    app.declare(ORDERS, OTHERS)
    with app:
        app.backends()

        def publish_both(first: int) -> None:
            with app.transaction() as tx:
                for number in range(first, first + 10):
                    tx.publish(OTHERS, number)
                    tx.publish(ORDERS, number)

        def are_there(count: int) -> bool:
            return sum(map(len, read(kafka_url))) >= count

        with relaying(app):
            publish_both(0)
            eventually(lambda: are_there(10), "they are there")
            delete(kafka_url, OTHERS.name)
            publish_both(10)
            eventually(
                lambda: are_there(20), "the others are there", lambda: str(unsent(app)), 60.0
            )
    assert sorted(n for each in read(kafka_url) for n in each) == list(range(20))

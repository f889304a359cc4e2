"""What a client sent twice, because it did not hear, and the cluster gets late."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest
from confluent_kafka import Consumer, TopicPartition

from duly.brokers.kafka import KafkaBroker
from duly.brokers.kafka.address import address_of
from duly.brokers.kafka.admin import Admin, Wanted
from duly.brokers.kafka.producer import Sending
from duly.brokers.kafka.producers import Producers
from duly.brokers.kafka.transactions import TransactionalProducer
from duly.errors import Superseded
from tests.kafka.copying import read
from tests.kafka.late import END_TXN, TXN_OFFSET_COMMIT, LateLink, late_link
from tests.kafka.work import ORDERS, message
from tests.servers.kafka import KafkaNode
from tests.servers.postgres import free_port
from tests.waiting import eventually


@pytest.fixture(scope="module")
def link() -> Iterator[LateLink]:
    """To a node of this file's own, by which all its clients come."""
    port = free_port()
    with (
        KafkaNode(f"advertised.listeners=PLAINTEXT://127.0.0.1:{port}") as node,
        late_link(port, node.port) as link,
    ):
        yield link


def store(one: TransactionalProducer, body: bytes) -> Sending:
    """In a transaction that is open, as far as the cluster has it."""
    sending = Sending("late.there", body, None, [])
    one.begin()
    one.send([sending])

    def is_there() -> bool:
        one._producer.poll(0.01)
        return sending.is_stored

    eventually(is_there, "the record is stored")
    return sending


def test_the_end_of_a_transaction_that_comes_twice_ends_no_later_one(link: LateLink):
    """The driver asks again where it was not answered, and the first request may come behind the
    second: then it is about whatever is open by then (KIP-890, which the driver does not have).
    """
    broker = f"kafka://127.0.0.1:{link.port}?namespace=late"
    address = address_of(broker, broker)
    Admin(address).make([Wanted("late.there", 1, {})])
    producers = Producers(address, "duly", Admin(address).standing)
    with producers.one() as one:
        store(one, b"a")
        link.hold(END_TXN)
        one.commit()
    with producers.one() as one:
        store(one, b"b")
        link.release()
        one.abort()
    producers.close()
    assert [each.body for each in read(broker, "there")] == ["a"]


def test_positions_that_come_twice_are_not_those_of_a_later_transaction(link: LateLink):
    address = address_of(f"kafka://127.0.0.1:{link.port}", "here")
    admin = Admin(address)
    admin.make([Wanted("late.read", 1, {})])
    reading = {"bootstrap.servers": address.bootstrap, "group.id": "late"}
    producers = Producers(address, "duly", admin.standing)
    with closing(Consumer(reading)) as consumer, closing(producers):

        def send(one: TransactionalProducer, offset: int) -> None:
            one.begin()
            places = [TopicPartition("late.read", 0, offset)]
            one.send_offsets(places, consumer.consumer_group_metadata())

        with producers.one() as one:
            link.hold(TXN_OFFSET_COMMIT)
            send(one, 1)
            one.commit()
        with producers.one() as one:
            send(one, 2)
            link.release()
            one.commit()
        [position] = consumer.committed([TopicPartition("late.read", 0)], timeout=10)
    assert position.offset == 2


def test_a_relay_goes_on_as_another_when_it_has_lost_a_connection(link: LateLink):
    broker = f"kafka://127.0.0.1:{link.port}?namespace=relayed"
    with closing(KafkaBroker(broker)) as kafka:
        kafka.declare([ORDERS])
        gate = kafka.entrance("outbox")
        assert gate.resume() is None
        link.hold(END_TXN)
        gate.publish([message("a")], lambda _: b"1")
        number = gate._turn.number
        gate.publish([message("b")], lambda _: b"2")
        assert gate._turn.number == number + 1
        link.release()
        gate.publish([message("c")], lambda _: b"3")
        assert gate.resume() == b"3"
        other = kafka.entrance("outbox")
        assert other.resume() == b"3"
        gate.close()
        other.close()
    assert sorted(each.body for each in read(broker, ORDERS.name)) == ["a", "b", "c"]


def test_a_relay_that_lost_a_connection_takes_nothing_from_the_next(link: LateLink):
    broker = f"kafka://127.0.0.1:{link.port}?namespace=followed"
    with closing(KafkaBroker(broker)) as kafka:
        kafka.declare([ORDERS])
        one, two = kafka.entrance("outbox"), kafka.entrance("outbox")
        one.resume()
        link.hold(END_TXN)
        one.publish([message("a")], lambda _: b"1")
        assert two.resume() == b"1"
        with pytest.raises(Superseded, match="another relay has resumed"):
            one.publish([message("never")], lambda _: b"2")
        two.publish([message("b")], lambda _: b"3")
        assert one.resume() == b"3"
        one.close()
        two.close()
    assert sorted(each.body for each in read(broker, ORDERS.name)) == ["a", "b"]

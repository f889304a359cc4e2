"""What is sent to Kafka, and what is not."""

from __future__ import annotations

from typing import Any

import confluent_kafka.admin
import pytest

from duly.broker import Published
from duly.brokers.kafka import KafkaBroker
from duly.brokers.kafka.address import REFUSED, address_of
from duly.errors import (
    BrokerUnavailable,
    ConfigurationError,
    MessageTooLarge,
    PublishFailed,
    PublishUnknown,
)
from duly.inspection import Selection
from duly.message import Topic
from tests.kafka.work import (
    A_LOT,
    OPTIONS,
    ORDERS,
    awaited,
    bodies,
    broker_at,
    host_of,
    message,
    namespace_of,
    publish,
    stranger,
)
from tests.servers.kafka import KafkaNode
from tests.waiting import eventually

# Of org.apache.kafka.common.utils.Utils.murmur2 (its test has these), as the partitioner of Java's
# clients uses it: without its sign, modulo the number of partitions.
JAVA = {
    "21": -973932308,
    "foobar": -790332482,
    "a-little-bit-long-string": -985981536,
    "a-little-bit-longer-string": -1486304829,
    "lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
}


def test_keys_go_where_javas_clients_put_them(kafka_url: str):
    with broker_at(kafka_url) as broker:
        publish(broker, *JAVA)
        lane = broker.subscribe([ORDERS], "sub", OPTIONS)
        got = awaited(lane, len(JAVA), limit=100)
        where = {d.message.key: int(d.position.log.rpartition("/")[2]) for d in got if d.position}
        assert where == {key: (hash & 0x7FFFFFFF) % 4 for key, hash in JAVA.items()}


def test_a_stranger_needs_an_id(kafka_url: str):
    with broker_at(kafka_url) as broker, stranger(kafka_url) as producer:
        lane = broker.subscribe([ORDERS], "sub", OPTIONS)
        topic = f"{namespace_of(kafka_url)}.orders"
        headers: dict[str, Any] = {
            "ce_id": "7",
            "ce_source": "till",
            "ce_time": "2026-01-02T03:04:05Z",
        }
        producer.produce(topic, "none", "k")
        producer.produce(
            topic, "all", "k", headers={**headers, "ce_tenant": "blue", "x-other": "y"}
        )
        producer.flush(30)
        [got] = [delivery.message for delivery in awaited(lane)]
        assert (got.id, got.source, got.key, got.body) == ("7", "till", "k", b"all")
        assert (dict(got.headers), got.time.year) == ({"tenant": "blue"}, 2026)
        [letter] = broker.graveyard.select(Selection(), 10)
        assert (letter.message.body, "ce_id" in letter.error) == (b"none", True)


def _number(order: dict[str, str]) -> str:
    return order["no"]


def test_a_topic_names_strangers_events(kafka_url: str):
    topic = Topic("named", dict[str, str], guarantee="at-least-once", dedup_by=_number)
    with broker_at(kafka_url, topic) as broker, stranger(kafka_url) as producer:
        lane = broker.subscribe([topic], "sub", OPTIONS)
        producer.produce(f"{namespace_of(kafka_url)}.named", '{"no":"o-1"}', headers={"ce_id": "x"})
        producer.flush(30)
        assert [delivery.message_id for delivery in awaited(lane)] == ["o-1"]


def test_what_is_too_large_for_the_topic_is_not_stored(kafka_url: str):
    with broker_at(kafka_url) as broker:
        name = f"{namespace_of(kafka_url)}.orders"
        shrink(kafka_url, name, "max.message.bytes", "2000")
        large = message("x" * 5000)
        eventually(
            lambda: isinstance(broker.publish([large])[0], MessageTooLarge), "the setting counts"
        )
        outcomes = broker.publish([large, message("y")])
        assert [type(outcome) for outcome in outcomes] == [MessageTooLarge, Published]
        lane = broker.subscribe([ORDERS], "sub", OPTIONS)
        eventually(lambda: "y" in bodies(lane.claim(10, A_LOT, 0.5)), "the small one is there")


def shrink(url: str, topic: str, setting: str, value: str) -> None:
    admin: Any = confluent_kafka.admin
    entry = admin.ConfigEntry(setting, value, incremental_operation=admin.AlterConfigOpType.SET)
    resource = admin.ConfigResource(admin.ResourceType.TOPIC, topic, incremental_configs=[entry])
    client = admin.AdminClient({"bootstrap.servers": host_of(url)})
    for future in client.incremental_alter_configs([resource]).values():
        future.result(30)


def test_a_topic_that_is_there_is_taken_as_it_is(kafka_url: str):
    topic = Topic("orders", str, guarantee="at-least-once")
    with broker_at(kafka_url), broker_at(kafka_url, topic) as broker:
        assert isinstance(broker.publish([topic.message("a", source="s")])[0], Published)
        other = Topic("orders", str, guarantee="at-least-once", partitions=7)
        with pytest.raises(ConfigurationError, match="4 partitions"):
            broker.declare([other])


def test_another_guarantee_is_refused(kafka_url: str):
    once = Topic("orders", str, guarantee="exactly-once", partitions=4)
    with (
        broker_at(kafka_url),
        pytest.raises(ConfigurationError, match="at-least-once"),
        broker_at(kafka_url, once),
    ):
        pass


def test_at_most_once_is_sent_and_not_confirmed(kafka_url: str):
    pings = Topic("pings", str, guarantee="at-most-once")
    with broker_at(kafka_url, pings) as broker:
        lane = broker.subscribe([pings], "sub", OPTIONS)
        outcomes = broker.publish([pings.message(str(n), source="s") for n in range(100)])
        assert {type(outcome) for outcome in outcomes} == {Published}
        assert len(awaited(lane, 100, limit=100)) == 100


@pytest.mark.long
def test_a_server_that_hangs_leaves_a_publish_unknown():
    with KafkaNode() as node, broker_at(node.url, deadline_s=2.0) as broker:
        publish(broker, "before")
        node.pause()
        try:
            [outcome] = broker.publish([message("during", id="during")])
        finally:
            node.go_on()
        assert isinstance(outcome, PublishUnknown)
        assert outcome.message_id == "during"
        publish(broker, "after")


def test_what_nobody_declared_is_refused(kafka_url: str):
    with broker_at(kafka_url) as broker:
        other = Topic("nowhere", str, guarantee="at-least-once")
        [outcome] = broker.publish([other.message("a", source="s")])
        assert isinstance(outcome, PublishFailed)


# --- addresses


@pytest.mark.parametrize("option", sorted(REFUSED))
def test_an_option_that_breaks_a_promise_is_refused(option: str):
    with pytest.raises(ConfigurationError, match="not yours to set"):
        address_of(f"kafka://host?{option}=1", "kafka://host")


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("kafka://host?nonsense=1", "no option"),
        ("kafka://host/path", "path"),
        ("kafka://host:99999", "port"),
        ("kafka://host?namespace=a/b", "namespace"),
        ("kafka://host?replication=x", "replication"),
        ("kafka://host?security.protocol=none", "security.protocol"),
        ("kafka://user:secret@host?security.protocol=ssl", "login"),
        ("kafka://host?message.max.bytes=12", "message.max.bytes"),
    ],
)
def test_what_is_no_address_is_refused(url: str, told: str):
    with pytest.raises(ConfigurationError, match=told) as refusal:
        address_of(url, "kafka://shown")
    assert "secret" not in str(refusal.value)


def test_an_address_in_its_parts():
    found = address_of(
        "kafka://me:s%2Fecret@one,two:9093,[::1]:9094?namespace=n&linger.ms=5"
        "&session.timeout.ms=9000&sasl.mechanism=PLAIN",
        "kafka://...",
    )
    assert found.bootstrap == "one:9092,two:9093,[::1]:9094"
    assert found.common["sasl.password"] == "s/ecret"
    assert (found.common["security.protocol"], found.common["sasl.mechanism"]) == (
        "sasl_ssl",
        "PLAIN",
    )
    assert "linger.ms" not in found.common
    assert found.producing["linger.ms"] == "5"
    assert found.consuming["session.timeout.ms"] == "9000"
    assert "s/ecret" not in repr(found)


def test_a_password_is_in_no_error(monkeypatch: pytest.MonkeyPatch):
    """Nobody listens there."""
    monkeypatch.setattr("duly.brokers.kafka.admin.ANSWERS_S", 1.0)
    url = "kafka://me:hunter2@127.0.0.1:1?security.protocol=sasl_plaintext&sasl.mechanism=PLAIN"
    with pytest.raises(BrokerUnavailable) as failure:
        KafkaBroker(url).declare([ORDERS])
    assert "hunter2" not in repr(failure.value)

"""What the contract knows of the cluster: copies, settings, and what a login may do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import confluent_kafka.admin
import pytest

import duly
from duly.broker import Published
from duly.brokers.kafka import KafkaBroker
from duly.brokers.kafka.address import address_of
from duly.brokers.kafka.looking import Layout, Seen
from duly.brokers.kafka.names import Names
from duly.brokers.kafka.survey import survey_of
from duly.contract import Contract, contract_on, render
from duly.errors import ContractRefused, PublishFailed
from duly.inspection.survey import Survey
from tests.kafka.work import (
    OPTIONS,
    ORDERS,
    awaited,
    bodies,
    broker_at,
    host_of,
    message,
    namespace_of,
    publish,
)
from tests.servers.kafka import KafkaNode
from tests.servers.postgres import free_port, named_after
from tests.waiting import eventually

KINDS: Any = confluent_kafka.admin  # the driver's types do not say what it has

# --- what is made of what was seen

FORGOTTEN = (
    "the position of a consumer that has had no worker for 7 days is forgotten "
    "(offsets.retention.minutes), and the next worker ends and says so"
)
BROKER = {
    "offsets.retention.minutes": "10080",
    "offset.metadata.max.bytes": "4096",
    "group.min.session.timeout.ms": "6000",
    "group.max.session.timeout.ms": "1800000",
    "default.replication.factor": "3",
    "min.insync.replicas": "2",
    "unclean.leader.election.enable": "false",
    "log.cleanup.policy": "delete",
    "log.retention.hours": "168",
    "log.retention.bytes": "-1",
    "transaction.partition.verification.enable": "true",
}
TOPIC = {
    "cleanup.policy": "delete",
    "retention.ms": "604800000",
    "retention.bytes": "-1",
    "min.insync.replicas": "2",
    "unclean.leader.election.enable": "false",
    "max.message.bytes": "10485760",
}
AGAIN = TOPIC | {"retention.ms": "-1"}
COMPACTED = TOPIC | {"cleanup.policy": "compact"}
SAFE = Seen(
    cluster="c",
    brokers={1: BROKER, 2: BROKER, 3: BROKER},
    count=3,
    layouts=dict.fromkeys(
        ("orders", "duly.again.sub", "duly.records", "duly.dead", "__consumer_offsets"), Layout(3)
    ),
    topics={
        "orders": TOPIC,
        "duly.again.sub": AGAIN,
        "duly.records": COMPACTED,
        "duly.dead": COMPACTED,
    },
)


def judged(seen: Seen, url: str = "kafka://h", topic: Any = ORDERS) -> Survey:
    address = address_of(url, url)
    return survey_of(
        address, Names(""), seen, {"orders": (topic, address.takes)}, {"sub": ["orders"]}
    )


def with_topic(name: str = "orders", **settings: str) -> Seen:
    changed = {key.replace("_", "."): value for key, value in settings.items()}
    return replace(SAFE, topics={**SAFE.topics, name: {**SAFE.topics[name], **changed}})


def with_brokers(**settings: str) -> Seen:
    """One of them is configured otherwise."""
    changed = {key.replace("_", "."): value for key, value in settings.items()}
    return replace(SAFE, brokers={**SAFE.brokers, 2: {**BROKER, **changed}})


def with_copies(name: str, copies: int) -> Seen:
    return replace(SAFE, layouts={**SAFE.layouts, name: Layout(copies)})


def test_of_a_cluster_that_keeps_everything_only_retentions_are_told():
    found = judged(SAFE)
    assert (list(found.perils), list(found.limits)) == ([], [])
    assert list(found.seen) == [
        "Kafka cluster c, 3 brokers: copies, settings and what this login may do were looked at",
        "orders: Kafka deletes it 7 days after publishing, handled or not (retention.ms)",
        FORGOTTEN,
    ]


def test_the_version_of_transactions_is_told():
    said = "\n".join(judged(replace(SAFE, transactions=2)).seen)
    assert "transactions of the cluster have version 2 (transaction.version, KIP-890)" in said


PERILS: list[tuple[Seen, str, str, tuple[str | None, str | None]]] = [
    (
        with_topic(cleanup_policy="compact,delete"),
        "of each key only the last message is kept",
        "cleanup.policy=delete, or declare the topic at-most-once",
        ("orders", None),
    ),
    (
        with_topic("duly.again.sub", retention_ms="604800000"),
        "retention.ms=604800000 of topic 'duly.again.sub': what is to be tried again",
        "retention.ms=-1",
        (None, "sub"),
    ),
    (
        with_topic("duly.again.sub", cleanup_policy="compact"),
        "cleanup.policy=compact of topic 'duly.again.sub'",
        "cleanup.policy=delete",
        (None, "sub"),
    ),
    (
        with_topic("duly.dead", cleanup_policy="compact,delete"),
        "dead letters would be deleted by time or size",
        "cleanup.policy=compact",
        (None, None),
    ),
    (
        with_brokers(offset_metadata_max_bytes="4095"),
        "offset.metadata.max.bytes=4095 of the brokers",
        "set offset.metadata.max.bytes=4096",
        (None, "sub"),
    ),
    (
        with_brokers(group_min_session_timeout_ms="20000"),
        "session.timeout.ms is 15000, and the brokers take 20000 to 1800000",
        "session.timeout.ms=20000 in the URL",
        (None, "sub"),
    ),
]


@pytest.mark.parametrize(("seen", "found", "remedy", "whose"), PERILS, ids=lambda each: "")
def test_what_breaks_a_promise_is_a_peril(
    seen: Seen, found: str, remedy: str, whose: tuple[str | None, str | None]
):
    survey = judged(seen)
    [peril] = survey.perils
    assert found in peril.found
    assert remedy in peril.remedy
    assert (peril.topic, peril.subscription) == whose
    assert list(survey.limits) == []


LIMITS: list[tuple[Seen, str, str, tuple[str | None, str | None]]] = [
    (
        with_topic(min_insync_replicas="4"),
        "has 3 copies and min.insync.replicas=4: some brokers go by the copies that there are",
        "--entity-name orders --add-config min.insync.replicas=2",
        ("orders", None),
    ),
    (
        with_topic("duly.records", min_insync_replicas="4"),
        "topic 'duly.records' has 3 copies and min.insync.replicas=4",
        "--entity-name duly.records",
        (None, None),
    ),
    (
        with_topic(min_insync_replicas="1"),
        "has 3 copies and min.insync.replicas=1",
        "min.insync.replicas=2",
        ("orders", None),
    ),
    (
        with_topic(unclean_leader_election_enable="true"),
        "unclean.leader.election.enable=true of topic 'orders'",
        "unclean.leader.election.enable=false",
        ("orders", None),
    ),
    (
        with_topic(retention_ms="3600000"),
        "Kafka deletes it 1 h after publishing, handled or not",
        "retention.ms=<longer than consumers may be away>",
        ("orders", None),
    ),
    (
        with_topic(retention_bytes="1073741824"),
        "beyond 1 GiB a partition (retention.bytes), handled or not",
        "retention.bytes=-1",
        ("orders", None),
    ),
    (
        with_topic(max_message_bytes="1048588"),
        "larger ones may be MessageTooLarge",
        "max_body_bytes=999588",
        ("orders", None),
    ),
    (
        with_brokers(offsets_retention_minutes="60"),
        "are forgotten after 1 h (offsets.retention.minutes)",
        "offsets.retention.minutes=10080",
        (None, None),
    ),
    (
        with_brokers(transaction_max_timeout_ms="5000"),
        "the brokers take 5000 ms (transaction.max.timeout.ms): nothing would be relayed",
        "transaction.timeout.ms=5000 in the URL",
        (None, None),
    ),
    (
        with_brokers(transaction_partition_verification_enable="false"),
        "does not verify that a record's transaction is open",
        "set transaction.partition.verification.enable=true",
        (None, None),
    ),
    (
        with_copies("__consumer_offsets", 1),
        "positions of consumers have one copy",
        "kafka-reassign-partitions.sh",
        (None, None),
    ),
]


@pytest.mark.parametrize(("seen", "found", "remedy", "whose"), LIMITS, ids=lambda each: "")
def test_what_weakens_a_promise_is_a_limit(
    seen: Seen, found: str, remedy: str, whose: tuple[str | None, str | None]
):
    survey = judged(seen)
    [limit] = survey.limits
    assert found in limit.found
    assert remedy in limit.remedy
    assert (limit.topic, limit.subscription) == whose
    assert list(survey.perils) == []


def test_one_copy_is_as_good_as_its_disk():
    alone = replace(with_topic(min_insync_replicas="1"), count=1)
    alone = replace(alone, layouts={**alone.layouts, "orders": Layout(1)})
    [limit] = judged(alone).limits
    assert "one copy: the loss of its broker's disk loses what is in it" in limit.found
    assert "a power failure may lose what was confirmed last" in limit.found
    assert "replication=3" in limit.remedy
    synced = replace(alone, topics={**alone.topics, "orders": {**TOPIC, "flush.messages": "1"}})
    synced = replace(
        synced, topics={**synced.topics, "orders": dict(synced.topics["orders"]) | MIN_ONE}
    )
    [limit] = judged(synced).limits
    assert "power" not in limit.found


MIN_ONE = {"min.insync.replicas": "1"}


def test_what_an_app_says_of_retention_is_held_against_the_cluster():
    declared = duly.Topic("orders", str, guarantee="at-least-once", retention_s=30 * 86400)
    [peril] = judged(SAFE, topic=declared).perils
    assert "retention_s=2592000, and Kafka deletes it 7 days after publishing" in peril.found
    assert "retention.ms=2592000000" in peril.remedy


def test_a_topic_that_is_not_there_is_judged_by_what_it_would_be_made_with():
    without = replace(
        SAFE,
        layouts={name: each for name, each in SAFE.layouts.items() if name != "orders"},
        topics={name: each for name, each in SAFE.topics.items() if name != "orders"},
    )
    found = judged(without)
    assert (list(found.perils), list(found.limits)) == ([], [])
    assert "orders: Kafka deletes it 7 days after" in found.seen[1]
    wrong, one = judged(without, "kafka://h?replication=1").limits
    assert "topic 'orders' has 1 copy and min.insync.replicas=2" in wrong.found
    assert "one copy" in one.found


def test_of_what_could_not_be_read_nothing_is_made():
    blind = replace(SAFE, topics={}, brokers={}, unseen=("the settings of broker '1' not",))
    found = judged(blind)
    assert (list(found.perils), list(found.limits)) == ([], [])
    assert list(found.unseen) == ["the settings of broker '1' not"]
    assert len(found.seen) == 1


def test_what_a_login_may_not_do_is_a_peril():
    reader = Layout(3, frozenset({"DESCRIBE", "READ"}))
    seen = replace(
        SAFE,
        layouts={**SAFE.layouts, "orders": Layout(3, frozenset({"DESCRIBE"})),
                 "duly.again.sub": reader},
        groups={"sub": frozenset({"DESCRIBE"})},
    )  # fmt: skip
    told = [(each.found, each.remedy) for each in judged(seen).perils]
    assert [found for found, _ in told] == [
        "this login has no right to read topic 'orders' (Read)",
        "this login has no right to write topic 'duly.again.sub' (Write)",
        "this login has no right to commit positions of group 'sub' (Read)",
    ]
    assert all("kafka-acls.sh --add" in remedy for _, remedy in told)


# --- on a node


def configure(url: str, name: str, **settings: str) -> None:
    """Set settings of a topic, and wait until they are seen."""
    entries = [
        KINDS.ConfigEntry(
            key.replace("_", "."), value, incremental_operation=KINDS.AlterConfigOpType.SET
        )
        for key, value in settings.items()
    ]
    resource = KINDS.ConfigResource(
        KINDS.ConfigResource.Type.TOPIC, name, incremental_configs=entries
    )
    client = KINDS.AdminClient({"bootstrap.servers": host_of(url)})
    for future in client.incremental_alter_configs([resource]).values():
        future.result(30)

    def seen() -> bool:
        [future] = client.describe_configs([resource]).values()
        told = future.result(30)
        return all(told[key.replace("_", ".")].value == value for key, value in settings.items())

    eventually(seen, "the settings are seen")


def contract(url: str, topic: Any = ORDERS) -> Contract:
    app = duly.App("shop", broker=url)

    @app.consumer(topic, name="sub", guarantee="at-least-once")
    def handle(order: str) -> None: ...

    with app:
        broker, store = app.backends()
        return contract_on(broker, store, app.topics, app.consumers)


def text(url: str, topic: Any = ORDERS) -> str:
    return " ".join(render(contract(url, topic)).split())


def survey(broker: KafkaBroker) -> Survey:
    return broker.survey([ORDERS], {"sub": [ORDERS.name]})


def test_a_node_alone_is_told_what_a_disk_is_worth(kafka_url: str):
    found = text(kafka_url)
    assert "1 broker: copies, settings and what this login may do were looked at" in found
    assert "orders' has one copy: the loss of its broker's disk loses what is in it" in found
    assert "orders: Kafka deletes it 7 days after publishing, handled or not" in found
    assert "has had no worker for 7 days is forgotten (offsets.retention.minutes)" in found


def test_what_a_topic_is_set_to_is_held_against_its_word(kafka_url: str):
    name = f"{namespace_of(kafka_url)}.orders"
    with broker_at(kafka_url) as broker:
        [limit] = [each for each in survey(broker).limits if each.topic == "orders"]
        assert "one copy" in limit.found
        configure(kafka_url, name, min_insync_replicas="2")
        assert "1 copy and min.insync.replicas=2: some brokers go by the copies" in text(kafka_url)
        assert isinstance(broker.publish([message("a", key="k")])[0], Published), "this one does"
        configure(kafka_url, name, min_insync_replicas="1", cleanup_policy="compact")
        with pytest.raises(ContractRefused, match=r"topic 'orders' \(at-least-once\)") as refusal:
            contract(kafka_url)
        assert "of each key only the last message is kept" in str(refusal.value)
        assert f"--entity-name {name} --add-config cleanup.policy=delete" in str(refusal.value)
        [outcome] = broker.publish([message("without a key")])
        assert isinstance(outcome, PublishFailed), "and so it is"
        configure(kafka_url, name, cleanup_policy="delete", retention_ms="60000")
        assert "Kafka deletes it 1 min after publishing, handled or not" in text(kafka_url)


def test_at_most_once_promises_nothing_that_compaction_breaks(kafka_url: str):
    readings: duly.Topic[str] = duly.Topic("readings", str, guarantee="at-most-once")
    with broker_at(kafka_url, readings):
        configure(kafka_url, f"{namespace_of(kafka_url)}.readings", cleanup_policy="compact,delete")
        assert (
            "one copy"
            not in text(kafka_url, readings)
            .partition("END TO END")[0]
            .partition("TOPICS")[2]
            .partition("CONSUMERS")[0]
        )


def test_where_nothing_answers_it_says_so(kafka_url: str):
    with broker_at(kafka_url) as broker:
        broker.close()
        elsewhere = KafkaBroker(f"kafka://127.0.0.1:{free_port()}")
        found = survey(elsewhere)
        elsewhere.close()
    assert list(found.perils) == []
    [unseen] = found.unseen
    assert "nothing was looked at" in unseen


# --- a node that asks who one is

_SASL = """
listeners=PLAINTEXT://127.0.0.1:{{port}},CONTROLLER://127.0.0.1:{{control}},SASL_PLAINTEXT://127.0.0.1:{0}
advertised.listeners=PLAINTEXT://127.0.0.1:{{port}},SASL_PLAINTEXT://127.0.0.1:{0}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SASL_PLAINTEXT:SASL_PLAINTEXT
sasl.enabled.mechanisms=PLAIN
listener.name.sasl_plaintext.plain.sasl.jaas.config=org.apache.kafka.common.security.plain.\
PlainLoginModule required user_shop="se/cret";
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:ANONYMOUS
"""


@pytest.fixture(scope="module")
def guarded() -> Iterator[tuple[KafkaNode, int]]:
    """A node on which the user ``shop`` may do nothing, and its port for logins."""
    port = free_port()
    with KafkaNode(*_SASL.format(port).splitlines()) as node:
        yield node, port


def allow(node: KafkaNode, start: str, *rights: tuple[Any, Any]) -> None:
    """What the user may do with everything whose name begins so."""
    client = confluent_kafka.admin.AdminClient({"bootstrap.servers": node.bootstrap})
    prefixed, allowed = KINDS.ResourcePatternType.PREFIXED, KINDS.AclPermissionType.ALLOW
    bindings = [
        KINDS.AclBinding(kind, start, prefixed, "User:shop", "*", operation, allowed)
        for kind, operation in rights
    ]
    for future in client.create_acls(bindings).values():
        future.result(30)


WORKS = (
    (KINDS.ResourceType.TOPIC, KINDS.AclOperation.READ),
    (KINDS.ResourceType.TOPIC, KINDS.AclOperation.WRITE),
    (KINDS.ResourceType.TOPIC, KINDS.AclOperation.DELETE),
    (KINDS.ResourceType.GROUP, KINDS.AclOperation.READ),
)


@pytest.mark.long
def test_a_login_works_with_what_it_may(
    guarded: tuple[KafkaNode, int], request: pytest.FixtureRequest
):
    node, port = guarded
    namespace = named_after(request.node.name)
    login = "kafka://shop:se%2Fcret@127.0.0.1:"
    url = (
        f"{login}{port}?namespace={namespace}&security.protocol=sasl_plaintext&sasl.mechanism=PLAIN"
    )
    with broker_at(f"{node.url}?namespace={namespace}") as other:
        other.subscribe([ORDERS], "sub", OPTIONS).close()
        allow(node, namespace, *WORKS)
        with broker_at(url) as broker:
            publish(broker, "a", "b")
            mine = broker.subscribe([ORDERS], "sub", OPTIONS)
            assert sorted(bodies(awaited(mine, 2))) == ["a", "b"]
            found = survey(broker)
        assert list(found.perils) == []
        blind = " ".join(found.unseen)
        assert f"the settings of topic '{namespace}.orders' not looked at" in blind
        assert "the settings of broker '1' not looked at" in blind
        assert "TOPIC_AUTHORIZATION_FAILED" in blind


@pytest.mark.long
def test_what_a_login_may_not_do_is_refused_at_the_start(
    guarded: tuple[KafkaNode, int], request: pytest.FixtureRequest
):
    node, port = guarded
    namespace = named_after(request.node.name)
    url = f"kafka://shop:se%2Fcret@127.0.0.1:{port}?namespace={namespace}"
    url += "&security.protocol=sasl_plaintext&sasl.mechanism=PLAIN"
    records = f"{namespace}.duly."
    with broker_at(f"{node.url}?namespace={namespace}"):
        allow(node, records, *WORKS)
        allow(node, f"{namespace}.orders", (KINDS.ResourceType.TOPIC, KINDS.AclOperation.DESCRIBE))
        with pytest.raises(ContractRefused, match="no right to read topic") as refusal:
            contract(url)
        assert "consumer 'sub' (at-least-once)" in str(refusal.value)
        assert "kafka-acls.sh --add" in str(refusal.value)
        assert "se/cret" not in str(refusal.value)

"""Exactly-once from Kafka to Kafka, without a database: workers die at every step of a
transaction, commits are not answered, and who was paused wakes up too late.
"""

from __future__ import annotations

import contextlib
import secrets
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import ConsumerGroupTopicPartitions, KafkaException
from confluent_kafka.admin import AdminClient

import duly
from duly.brokers.kafka import KafkaBroker
from duly.brokers.kafka.address import address_of
from duly.brokers.kafka.admin import COMPACTED, Admin, Wanted
from duly.brokers.kafka.names import Names
from duly.brokers.kafka.producer import Sending
from duly.brokers.kafka.producers import Producers
from duly.brokers.kafka.transactions import TransactionalProducer
from duly.errors import ConfigurationError, ContractRefused
from duly.worker import Worker
from tests.kafka.copier import HERE, RETRY, THERE, copier
from tests.kafka.copying import (
    HASTY,
    Onlooker,
    Process,
    check_copied,
    copy_all,
    is_done,
    publish,
    read,
    reading,
    working,
)
from tests.kafka.cutting import forget_the_end
from tests.kafka.work import host_of, namespace_of, open_in, settled
from tests.servers.kafka import KafkaNode, in_namespace
from tests.waiting import eventually


@pytest.fixture
def broker(kafka_url: str) -> str:
    return kafka_url + HASTY


@pytest.fixture
def dealt(dealt_url: str) -> str:
    """The same by each way in which groups are dealt out."""
    return dealt_url + "&transaction.timeout.ms=2000"


@pytest.fixture
def takes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the copier's handler takes: payloads are claimed and settled many at a time."""
    monkeypatch.setenv("COPIER_TAKES", request.param)


BOTH = pytest.mark.parametrize("takes", ["payloads", "messages"], indirect=True)
MOST = pytest.mark.parametrize(
    "takes", ["payloads", pytest.param("messages", marks=pytest.mark.long)], indirect=True
)


# --- what is copied


@BOTH
@pytest.mark.usefixtures("takes")
def test_what_is_published_goes_with_the_positions(broker: str):
    """As by ordinary publishing: to the same partition, with the same headers."""
    publish(broker, 200)
    copy_all(broker, 200)
    seen = read(broker)
    check_copied(seen, 200)
    sources = {each.body: each for each in read(broker, HERE.name)}
    for each in seen:
        source = sources[each.body]
        assert (each.partition, each.key) == (source.partition, source.key)
        assert each.headers.keys() == source.headers.keys()
        assert each.headers["ce_type"] == b"there"
        assert each.headers["ce_id"] == source.headers["ce_id"]


def test_who_publishes_nothing_goes_on_all_the_same(broker: str):
    publish(broker, 60)
    app = duly.App("quiet", broker=broker)
    handled: list[int] = []

    @app.consumer(HERE, name="quiet", guarantee="exactly-once", batch=7)
    def see(order: int, tx: duly.Transaction[None]) -> None:
        handled.append(order)

    with working(app):
        eventually(lambda: len(handled) >= 60 and is_done(app), "all are handled")
    with working(app):
        eventually(lambda: is_done(app), "nothing is left")
    assert sorted(handled) == list(range(60))


def test_a_failure_leaves_nothing_and_is_tried_again_alone(broker: str):
    publish(broker, 50)
    app = duly.App("failing", broker=broker)
    failed: list[int] = []
    after: list[int] = []

    @app.consumer(HERE, name="copy", guarantee="exactly-once", batch=10, retry=RETRY)
    def copy(order: duly.Message[int], tx: duly.Transaction[None]) -> None:
        tx.publish(THERE, order.payload, key=order.key)
        tx.after_commit(lambda: after.append(order.payload))
        if order.payload % 10 == 3 and failed.count(order.payload) < 2:
            failed.append(order.payload)
            raise RuntimeError("twice")

    with working(app):
        eventually(lambda: len(read(broker)) >= 50 and is_done(app), "all are copied")
    check_copied(read(broker), 50)
    assert sorted(after) == list(range(50)), "once each, and only of what was committed"
    assert sorted(failed) == sorted([3, 13, 23, 33, 43] * 2)
    assert len(read(broker, committed=False)) == 50, "what failed has never left the process"


def test_a_dead_letter_is_in_the_transaction(broker: str, monkeypatch: pytest.MonkeyPatch):
    """And comes back from there."""
    publish(broker, 12)
    app = duly.App("rejecting", broker=broker)
    rejects = True

    @app.consumer(HERE, name="copy", guarantee="exactly-once", retry=RETRY)
    def copy(order: duly.Message[int], tx: duly.Transaction[None]) -> None:
        tx.publish(THERE, order.payload, key=order.key)
        if order.payload == 5 and rejects:
            raise duly.Reject("five")

    stored: list[set[str]] = []
    send = TransactionalProducer.send

    def seen(self: TransactionalProducer, sendings: Sequence[Sending]) -> None:
        stored.append({each.topic.rpartition(".")[2] for each in sendings})
        send(self, sendings)

    monkeypatch.setattr(TransactionalProducer, "send", seen)
    with working(app):
        eventually(lambda: len(read(broker)) >= 11 and is_done(app), "all but one are copied")
        assert sorted(int(each.body) for each in read(broker)) == [0, 1, 2, 3, 4, *range(6, 12)]
        eventually(app.dead_letters, "one is dead")
        [letter] = app.dead_letters()
        assert (letter.message.body, letter.attempts) == (b"5", 1)
        assert "five" in letter.error
        assert [each for each in stored if "dead" in each], "by a transaction"
        rejects = False
        assert app.replay([letter]) == 1
        eventually(lambda: len(read(broker)) >= 12, "it is copied, too")
    assert sorted(int(each.body) for each in read(broker)) == list(range(12))


def test_what_the_cluster_refuses_is_a_failure_of_its_message(broker: str):
    app = duly.App("large", broker=f"{broker}&message.max.bytes=1000000")
    texts = duly.Topic("texts", str, guarantee="at-least-once", max_body_bytes=900_000)
    small = duly.Topic("small", str, guarantee="at-least-once", max_body_bytes=900_000)

    @app.consumer(
        texts, name="copy", guarantee="exactly-once", retry=duly.RetryPolicy(attempts=2, first_s=0)
    )
    def copy(text: str, tx: duly.Transaction[None]) -> None:
        tx.publish(small, text * 2, id=text[:1])

    broker_, _ = app.backends()
    assert isinstance(broker_, KafkaBroker)
    with app:
        app.publish_many(texts, ["a", "b" * 400_000, "c"])
        broker_.declare([small])
        set_config(broker, "small", "max.message.bytes", "500000")
        with working(app):
            eventually(lambda: len(read(broker, "small")) >= 2 and is_done(app), "two are there")
            eventually(app.dead_letters, "one is dead")
    assert {each.body for each in read(broker, "small")} == {"aa", "cc"}


def set_config(broker: str, topic: str, name: str, value: str) -> None:
    from confluent_kafka import admin as driver

    admin: Any = driver
    name_of = f"{namespace_of(broker)}.{topic}"
    entry = admin.ConfigEntry(name, value, incremental_operation=admin.AlterConfigOpType.SET)
    resource = admin.ConfigResource(admin.ResourceType.TOPIC, name_of, incremental_configs=[entry])
    client = admin.AdminClient({"bootstrap.servers": host_of(broker)})
    for future in client.incremental_alter_configs([resource]).values():
        future.result(30)


# --- who dies, and who is late


@pytest.mark.slow
@MOST
@pytest.mark.usefixtures("takes")
def test_workers_die_at_every_step(dealt: str, tmp_path: Path):
    publish(dealt, 400)
    for step in ("begun", "sent", "placed", "committed"):
        with Process(dealt, tmp_path, f"{step}:2:SIGKILL") as worker:
            eventually(lambda w=worker: w.ended, step, lambda w=worker: w.told, 60)  # type: ignore[misc]
    before = len(read(dealt))
    assert before < 400, "they died in the middle"
    copy_all(dealt, 400)
    check_copied(read(dealt), 400)


@pytest.mark.slow
@MOST
@pytest.mark.usefixtures("takes")
@pytest.mark.parametrize("ended", [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "step", ["sent", *(pytest.param(each, marks=pytest.mark.long) for each in ("begun", "placed"))]
)
def test_who_was_paused_and_wakes_up_commits_nothing(
    dealt_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, ended: bool
):
    """Whether its transaction was ended by who took over, or not: then the group's generation
    refuses it, for its transaction lasts; or, where its positions are in, that the cluster has
    aborted it, which who takes over waits for.
    """
    lasts_ms = 6000 if step == "placed" else 40_000
    patient = f"{dealt_url}&transaction.timeout.ms={lasts_ms}"
    if not ended:
        monkeypatch.setattr(Producers, "end_those_of", lambda *_: None)
    publish(patient, 100)
    app = copier(patient)
    with Process(patient, tmp_path, f"{step}:2:SIGSTOP") as zombie:
        eventually(lambda: zombie.stopped, "it stands still", lambda: zombie.told, 60)
        with working(app):
            eventually(lambda: is_done(app), "another did it", timeout_s=60)
            zombie.go_on()
            eventually(lambda: "lost to others" in zombie.told, "it knows", lambda: zombie.told)
            eventually(lambda: len(read(patient)) >= 100, "all are read", timeout_s=60)
            publish(patient, 20, first=100)
            eventually(lambda: len(read(patient)) >= 120, "it goes on", timeout_s=60)
        zombie.end()
    check_copied(read(patient), 120)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "struck"),
    [(0, "placed:2:SIGKILL"), (20, "told:1:SIGKILL")],
    ids=["of a position of its own", "in its first transaction"],
)
def test_what_a_dead_worker_left_open_is_ended_by_who_takes_over(
    dealt_url: str, tmp_path: Path, before: int, struck: str
):
    """Long before the cluster would, and before nobody answers where the group stands."""
    patient = f"{dealt_url}&transaction.timeout.ms=40000"
    if before:
        publish(patient, before)
        copy_all(patient, before)
    publish(patient, 50 - before, first=before)
    with Process(patient, tmp_path, struck) as worker:
        eventually(lambda: worker.ended, "it dies", lambda: worker.told, 60)
    start = time.monotonic()
    copy_all(patient, 50)
    assert time.monotonic() - start < 15
    check_copied(read(patient), 50)


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("forgets", ["records", "positions"])
def test_what_kafka_forgets_to_end_of_a_living_process_is_ended(
    kafka_node: KafkaNode, tmp_path: Path, forgets: str
):
    """Readers of what is committed would stay before it for ever, or nobody be told where the group
    stands; and no tool of Kafka's lists a transaction that is open.
    """
    broker = in_namespace(f"forgotten{secrets.token_hex(4)}", kafka_node.url) + HASTY
    records = f"{namespace_of(broker)}.{THERE.name}"
    step, topic = ("stored", records) if forgets == "records" else ("placed", "__consumer_offsets")
    publish(broker, 100)
    with Process(broker, tmp_path, f"{step}:2:SIGSTOP") as worker:
        eventually(lambda: worker.stopped, "it stands still", lambda: worker.told, 60)
        eventually(lambda: ends(broker, committed=True) == ends(broker), "it is aborted")
        eventually(lambda: are_told(broker), "so are its positions")
        assert forget_the_end(kafka_node, topic)
        assert (ends(broker, committed=True) < ends(broker)) is (forgets == "records")
        assert are_told(broker) is (forgets == "records")
        worker.go_on()
        eventually(
            lambda: len(read(broker)) >= 100, "all are read",
            lambda: f"{len(read(broker))} {worker.told}", 120,
        )  # fmt: skip
        worker.end()
        assert "aborting again" in worker.told
    check_copied(read(broker), 100)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_what_a_dead_worker_left_and_kafka_forgets_to_end_is_ended(
    kafka_node: KafkaNode, tmp_path: Path
):
    """By any that publishes there: what became of it the coordinator has written down."""
    broker = in_namespace(f"forgotten{secrets.token_hex(4)}", kafka_node.url) + HASTY
    publish(broker, 100)
    with Process(broker, tmp_path, "stored:2:SIGKILL") as worker:
        eventually(lambda: worker.ended, "it is dead", lambda: worker.told, 60)
        eventually(lambda: ends(broker, committed=True) == ends(broker), "it is aborted")
    assert forget_the_end(kafka_node, f"{namespace_of(broker)}.{THERE.name}")
    assert ends(broker, committed=True) < ends(broker)
    with Process(broker, tmp_path) as worker:
        eventually(
            lambda: len(read(broker)) >= 100, "all are read",
            lambda: f"{len(read(broker))} {worker.told}", 90,
        )  # fmt: skip
        worker.end()
        assert "readers of" in worker.told
    check_copied(read(broker), 100)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_who_only_publishes_ends_what_kafka_forgot_also_among_dead_letters(kafka_node: KafkaNode):
    """It consumes nothing, and has no consumer to be given what the dead had."""
    broker = in_namespace(f"forgotten{secrets.token_hex(4)}", kafka_node.url) + HASTY
    names, address = Names(namespace_of(broker)), address_of(broker, "")
    topics = [names.topic(THERE.name), names.letters]
    with copier(broker) as app:
        app.backends()[0].declare([THERE])
        Admin(address).make([Wanted(names.letters, 1, COMPACTED)])
        dead = TransactionalProducer(address, f"{names.group('duly')}-dead-1")
        dead.begin()
        dead.send([Sending(name, b"0", b"0", [], partition=0) for name in topics])
        assert dead._producer.flush(30) == 0
        dead.close()
        for topic in (THERE.name, "duly.dead"):
            settled(broker, topic)
        for name in topics:
            assert forget_the_end(kafka_node, name)
        for topic in (THERE.name, "duly.dead"):
            assert open_in(broker, topic)
        with app.transaction() as tx:
            tx.publish(THERE, 1)
        for topic in (THERE.name, "duly.dead"):
            settled(broker, topic)


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("before", "struck", "fails"),
    [
        (0, "placed:2:SIGKILL", "0:-1"),
        (0, "placed:6:SIGKILL", "2:5"),
        (50, "told:1:SIGKILL", "0:-1"),
    ],
    ids=[
        "under the id that its position names",
        "behind others that failed",
        "in the first transaction after another process",
    ],
)
def test_positions_that_kafka_forgets_to_end_keep_nobody_waiting(
    kafka_node: KafkaNode, tmp_path: Path, before: int, struck: str, fails: str
):
    """Their worker is dead, and nobody would be told where its group stands, for ever."""
    broker = in_namespace(f"forgotten{secrets.token_hex(4)}", kafka_node.url) + HASTY
    if before:
        publish(broker, before)
        copy_all(broker, before)
    publish(broker, 100 - before, first=before)
    with Process(broker, tmp_path, struck, COPIER_FAILS=fails) as worker:
        eventually(lambda: worker.ended, "it is dead", lambda: worker.told, 60)
        eventually(lambda: ends(broker, committed=True) == ends(broker), "it is aborted")
        eventually(lambda: are_told(broker), "so are its positions")
    assert forget_the_end(kafka_node, "__consumer_offsets")
    with Process(broker, tmp_path) as worker:
        eventually(
            lambda: len(read(broker)) >= 100, "all are read",
            lambda: f"{len(read(broker))} {worker.told}", 120,
        )  # fmt: skip
        worker.end()
    check_copied(read(broker), 100)


def are_told(broker: str) -> bool:
    """Whether somebody who waits for the end of transactions is told where the group stands."""
    admin: Any = AdminClient({"bootstrap.servers": host_of(broker)})
    asked = ConsumerGroupTopicPartitions(f"{namespace_of(broker)}.copy")
    [told] = admin.list_consumer_group_offsets([asked], require_stable=True).values()
    try:
        return all(place.error is None for place in told.result(10).topic_partitions)
    except KafkaException:
        return False


def ends(broker: str, *, committed: bool = False) -> int:
    """Where readers of all partitions come to, together."""
    with reading(broker, committed=committed) as reader:
        return reader.ends()


@pytest.mark.long
@MOST
@pytest.mark.usefixtures("takes")
def test_thousands_are_copied_while_workers_die(dealt: str, tmp_path: Path):
    """Two at a time, killed and ended in turn; another program reads along."""
    count = 3000
    publish(dealt, count)
    copier(dealt).close()
    with copier(dealt) as app:
        app.backends()[0].declare([THERE])
    with Onlooker(dealt) as onlooker, contextlib.ExitStack() as stack:
        workers = [stack.enter_context(Process(dealt, tmp_path)) for _ in range(2)]
        for turn, share in enumerate((0.1, 0.3, 0.5, 0.7)):
            eventually(
                lambda s=share: len(onlooker.seen) >= count * s,  # type: ignore[misc]
                f"{share:.0%} are copied", lambda: workers[-1].told[-2000:], 60,
            )  # fmt: skip
            oldest = workers.pop(0)
            if turn % 2:
                oldest.end()
            else:
                oldest.kill()
            workers.append(stack.enter_context(Process(dealt, tmp_path)))
        eventually(
            lambda: len(onlooker.seen) >= count, "all are copied",
            lambda: f"{len(onlooker.seen)} {workers[-1].told[-2000:]}", 90,
        )  # fmt: skip
        for worker in workers:
            worker.end()
    check_copied(onlooker.seen, count)
    check_copied(read(dealt), count)


# --- what is said of it


def told_by(app: duly.App) -> str:
    from duly.contract import contract_on, render

    broker, store = app.backends()
    with app:
        return " ".join(render(contract_on(broker, store, app.topics, app.consumers)).split())


def test_the_contract_says_what_it_covers(broker: str):
    text = told_by(copier(broker))
    assert "store: Kafka's transactions" in text
    assert "fenced by the generation of the consumer's group" in text
    assert "isolation.level=read_committed" in text
    assert "for 2 s (transaction.timeout.ms)" in text
    assert "rows, files and requests of the handler may happen again" in text
    assert "outbox" not in text


def test_rows_are_refused_and_say_what_to_do(broker: str):
    app = duly.App("shop", broker=broker)

    @app.consumer(HERE, name="billing", guarantee="exactly-once")
    def charge(order: int, tx: duly.Transaction[sqlite3.Connection]) -> None: ...

    with pytest.raises(ContractRefused, match=r"(?s)writes through a Connection.*Remedy.*store="):
        told_by(app)


def test_a_topic_whose_repeats_nobody_drops_is_refused(broker: str):
    app = duly.App("shop", broker=broker)
    orders = duly.Topic("orders", int, guarantee="exactly-once")

    @app.consumer(orders, name="billing", guarantee="exactly-once")
    def charge(order: int, tx: duly.Transaction[None]) -> None: ...

    with pytest.raises(ContractRefused, match="admits by claim, which lets them pass"):
        told_by(app)


def test_a_handler_is_told_what_is_no_part_of_the_transaction(broker: str):
    publish(broker, 1)
    app = duly.App("wrong", broker=broker)
    errors: list[str] = []

    @app.consumer(HERE, name="wrong", guarantee="exactly-once")
    def handle(order: int, tx: duly.Transaction[Any]) -> None:
        for wrong in (
            lambda: tx.connection.execute("insert into charges values (1)"),
            lambda: app.publish(THERE, order),
        ):
            try:
                wrong()
            except ConfigurationError as error:
                errors.append(str(error))

    with working(app):
        eventually(lambda: len(errors) >= 2, "it was called")
    assert "there is no database here" in errors[0]
    assert "Use tx.publish" in errors[1]


def test_a_callers_own_transaction_publishes_all_or_nothing(broker: str):
    with copier(broker) as app:
        with app.transaction() as tx:
            tx.publish(THERE, 0, key="a")
            tx.publish(HERE, 0, key="a")
        with contextlib.suppress(LookupError), app.transaction() as tx:
            tx.publish(THERE, 1, key="a")
            raise LookupError
        with pytest.raises(ConfigurationError, match="within"):
            app.publish(THERE, 2, within=sqlite3.connect(":memory:"))
    assert [each.body for each in read(broker)] == ["0"]
    assert [each.body for each in read(broker, HERE.name)] == ["0"]


def test_what_a_database_remembers_is_not_forgotten(broker: str, tmp_path: Path):
    """A consumer that had a store goes on with a store, and the other way round."""
    stores = [None, f"sqlite:///{tmp_path}/effects.db"]
    for number, order in enumerate((stores, stores[::-1])):
        for turn, store in enumerate(order):
            app = duly.App("shop", broker=broker, store=store)

            @app.consumer(HERE, name=f"billing-{number}", guarantee="exactly-once")
            def charge(order: int, tx: duly.Transaction[Any]) -> None: ...

            with contextlib.ExitStack() as stack:
                stack.callback(app.close)
                if turn:
                    with pytest.raises(ConfigurationError, match="Give the consumer a new name"):
                        Worker(app).prepare()
                else:
                    stack.enter_context(working(app))

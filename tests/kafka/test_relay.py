"""What transactions publish is on Kafka once, whatever ends the relay, and wherever.

A reader of what is committed, which knows nothing of duly, is the judge.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition

import duly
from duly.broker import Published
from duly.brokers.kafka import KafkaBroker, leavings
from duly.brokers.kafka import transactions as room
from duly.brokers.kafka.producer import Sending
from duly.contract import contract_on, render
from duly.errors import CommitUnknown, Superseded
from duly.store import outbox_of
from tests.kafka.cutting import forget_the_end
from tests.kafka.relaying import ORDERS, STEPS, relay_of, shop_at
from tests.kafka.test_survey import configure
from tests.kafka.work import ends_in, host_of, namespace_of, open_in, settled
from tests.servers.kafka import KafkaNode, in_namespace
from tests.servers.postgres import PostgresServer, Schema
from tests.waiting import eventually

KEYS = 6
COUNT = 60


def read(url: str, isolation: str = "read_committed", topic: str = "orders") -> list[list[int]]:
    """What each partition holds, in its order."""
    reader = Consumer(
        {
            "bootstrap.servers": host_of(url),
            "group.id": "judge",
            "isolation.level": isolation,
            "enable.partition.eof": True,
            "auto.offset.reset": "earliest",
        }
    )
    name = f"{namespace_of(url)}.{topic}"
    places = [TopicPartition(name, number, 0) for number in range(ORDERS.partitions)]
    reader.assign(places)
    found: list[list[int]] = [[] for _ in places]
    ended: set[int] = set()

    def read_some() -> bool:
        for record in reader.consume(1000, 0.5):
            error, place = record.error(), record.partition()
            assert place is not None
            if error is None:
                found[place].append(int(record.value() or b"x"))
            elif error.code() == KafkaError._PARTITION_EOF:
                ended.add(place)
        return len(ended) == len(places)

    eventually(read_some, "it is read to its end")
    reader.close()
    return found


def check(url: str, count: int = COUNT) -> None:
    """Each once, and in order by key."""
    settled(url, "orders")
    partitions = read(url)
    times = Counter(number for partition in partitions for number in partition)
    assert {number: n for number, n in times.items() if n != 1} == {}
    assert sorted(times) == list(range(count))
    for partition in partitions:
        for key in range(KEYS):
            of_key = [number for number in partition if number % KEYS == key]
            assert of_key == sorted(of_key)


def fill(app: duly.App, numbers: Sequence[int] = range(COUNT)) -> None:
    """Five in one transaction."""
    for start in range(0, len(numbers), 5):
        with app.transaction() as tx:
            for number in numbers[start : start + 5]:
                tx.publish(ORDERS, number, id=str(number), key=str(number % KEYS))


def unsent(app: duly.App) -> int:
    _, store = app.backends()
    assert store is not None
    outbox = outbox_of(store)
    assert outbox is not None
    return outbox.backlog().unsent


def until_empty(app: duly.App, *relays: Any) -> None:
    def sent() -> bool:
        for relay in relays:
            relay.step()
        return unsent(app) == 0

    eventually(sent, "the outbox is empty", lambda: str(unsent(app)), 60.0)


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.long)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/effects.db"
    schema: Schema = request.getfixturevalue("pg_schema")
    return f"{schema.url}{'&' if '?' in schema.url else '?'}schema={schema.duly}"


@pytest.fixture
def shop(kafka_url: str, store: str) -> Iterator[duly.App]:
    with shop_at(kafka_url, store) as app:
        app.backends()
        yield app


def started(url: str, store: str, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.kafka.relaying", url, store, *more],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def test_what_transactions_publish_arrives_once_and_in_order(shop: duly.App, kafka_url: str):
    fill(shop)
    relay = relay_of(shop)
    until_empty(shop, relay)
    relay.close()
    assert (relay.counts.published, relay.counts.repeats, relay.counts.unknown) == (COUNT, 0, 0)
    check(kafka_url)


# How often, where it makes a difference: the batch is the first, or one that has a note before it.
DEATHS = [(step, 1 if step == "resumed" else 2) for step in STEPS if step != "committing"]
QUICKLY = ("sent", "committed")


@pytest.mark.parametrize(
    ("step", "nth"),
    [
        pytest.param(*death, marks=() if death[0] in QUICKLY else pytest.mark.long)
        for death in DEATHS
    ],
    ids=[step for step, _ in DEATHS],
)
def test_a_relay_that_dies_is_followed_by_one_that_repeats_nothing(
    shop: duly.App, kafka_url: str, store: str, step: str, nth: int
):
    fill(shop)
    with started(kafka_url, store, step, str(nth)) as dead:
        assert dead.wait(60) == -signal.SIGKILL
    assert unsent(shop) > 0, "it died in the middle"
    relay = relay_of(shop)
    until_empty(shop, relay)
    relay.close()
    check(kafka_url)
    undone = sum(map(len, read(kafka_url, "read_uncommitted"))) - COUNT
    assert (undone > 0) == (step in ("half sent", "sent")), "what it left open is undone"


@pytest.mark.long
@pytest.mark.parametrize("after_ms", range(0, 12, 2))
def test_a_relay_that_dies_while_it_commits_has_committed_or_not(
    shop: duly.App, kafka_url: str, store: str, after_ms: int
):
    fill(shop)
    with started(kafka_url, store, "committing", str(after_ms)) as dead:
        assert dead.wait(60) == -signal.SIGKILL
    relay = relay_of(shop)
    until_empty(shop, relay)
    relay.close()
    check(kafka_url)


@pytest.mark.long
def test_relays_that_are_killed_at_any_moment_repeat_nothing(
    shop: duly.App, kafka_url: str, store: str
):
    """One after the other, while it is filled."""
    seed = int(os.environ.get("DULY_RELAY_SEED") or random.randrange(1 << 32))
    print(f"replay: DULY_RELAY_SEED={seed}")  # noqa: T201 - shown where the test fails
    chance = random.Random(seed)
    done = 0
    for _ in range(12):
        with started(kafka_url, store) as relay:
            assert relay.stdout is not None
            assert relay.stdout.readline() == "at work\n"
            ends = threading.Timer(chance.random() * 0.6, relay.kill)
            ends.start()
            fill(shop, range(done, done + 50))
            done += 50
            assert relay.wait(60) == -signal.SIGKILL
    last = relay_of(shop)
    until_empty(shop, last)
    last.close()
    check(kafka_url, done)


# --- answers that get lost


class Mute:
    """A producer of the driver's, whose answers to commits get lost now and then."""

    left = 0
    stores = True

    def __init__(self, settings: Any) -> None:
        self._inner = PRODUCER(settings)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def commit_transaction(self, *given: Any) -> None:
        if Mute.left == 0:
            self._inner.commit_transaction(*given)
            return
        Mute.left -= 1
        if Mute.stores:
            self._inner.commit_transaction(*given)
        raise KafkaException(KafkaError(KafkaError._TIMED_OUT, "no answer", retriable=True))


PRODUCER = Producer


@pytest.mark.parametrize("stores", [True, False], ids=["stored", "not stored"])
def test_a_commit_without_an_answer_is_found_out_about(
    shop: duly.App, kafka_url: str, monkeypatch: pytest.MonkeyPatch, stores: bool
):
    monkeypatch.setattr(room, "Producer", Mute)
    monkeypatch.setattr(Mute, "left", 3)
    monkeypatch.setattr(Mute, "stores", stores)
    fill(shop)
    relay = relay_of(shop)
    until_empty(shop, relay)
    relay.close()
    assert Mute.left == 0
    assert relay.counts.published == COUNT
    check(kafka_url)


# --- several at once


class Everybodys:
    """An outbox whose relays all believe that they are the only one."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def hold(self, relay: str, lease_s: float) -> bool:
        return True


def test_relays_that_know_nothing_of_each_other_fence_each_other_off(
    shop: duly.App, kafka_url: str
):
    _, store = shop.backends()
    assert store is not None
    outbox = Everybodys(outbox_of(store))
    relays = [relay_of(shop, outbox=outbox) for _ in range(3)]
    stop = threading.Event()
    threads = [threading.Thread(target=relay.run, args=(stop,)) for relay in relays]
    for thread in threads:
        thread.start()
    fill(shop, range(300))
    eventually(lambda: unsent(shop) == 0, "all is sent", lambda: str(unsent(shop)), 90.0)
    stop.set()
    for thread in threads:
        thread.join(30)
    check(kafka_url, 300)


def test_whoever_resumes_ends_what_another_has_begun(kafka_url: str):
    broker = KafkaBroker(kafka_url)
    broker.declare([ORDERS])
    one, two, others = broker.entrance("a"), broker.entrance("a"), broker.entrance("b")
    messages = [ORDERS.message(number, source="tests") for number in range(3)]
    assert one.resume() is None
    assert one.publish(messages, bytes) == [Published(m.id) for m in messages]
    assert two.resume() == bytes([0, 1, 2])
    with pytest.raises((Superseded, CommitUnknown)):
        one.publish(messages, lambda _: b"never")
    assert others.resume() is None, "that is another outbox"
    assert others.publish(messages, lambda _: b"others")
    assert two.publish(messages[:1], lambda _: b"two") == [Published(messages[0].id)]
    assert one.resume() == b"two"
    assert one.publish([], lambda _: b"nothing") == []
    assert one.resume() == b"two"
    settled(kafka_url, "orders")
    assert [sorted(each) for each in read(kafka_url) if each]
    assert sum(map(len, read(kafka_url))) == 7
    broker.close()


def test_a_note_is_found_behind_much_that_was_rolled_back(kafka_url: str):
    broker = KafkaBroker(kafka_url)
    broker.declare([ORDERS])
    gate = broker.entrance("a")
    gate.resume()
    message = ORDERS.message(1, source="tests")
    gate.publish([message], lambda _: b"stands")
    note = gate._name
    for _ in range(30):
        producer = gate._producer
        assert producer is not None
        producer.begin()
        producer.send([Sending(note, b"undone", b"note", [], partition=0)])
        producer._producer.flush(10)
        producer.abort()
    assert gate.resume() == b"stands"
    broker.close()


# --- what is refused


def test_one_that_the_cluster_refuses_holds_up_no_other(shop: duly.App, kafka_url: str):
    _, store = shop.backends()
    assert store is not None
    configure(kafka_url, f"{namespace_of(kafka_url)}.orders", max_message_bytes="3000")
    fill(shop, range(20))
    with shop.transaction() as tx:
        tx.publish(ORDERS, 0, id="large", key="0", headers={"padding": "x" * 5000})
    fill(shop, range(20, COUNT))
    relay = relay_of(shop)
    until_empty(shop, relay)
    relay.close()
    outbox = outbox_of(store)
    assert outbox is not None
    [given_up] = outbox.given_up()
    assert (given_up.message.id, "MessageTooLarge" in given_up.error) == ("large", True)
    check(kafka_url)


def test_the_contract_says_for_whom_it_is_once(shop: duly.App):
    @shop.consumer(ORDERS, name="billing", guarantee="exactly-once")
    def charge(order: int, tx: duly.Transaction[Any]) -> None: ...

    broker, store = shop.backends()
    text = " ".join(render(contract_on(broker, store, [ORDERS], shop.consumers)).split())
    assert "outbox alone (tx.publish, within=) is stored once, for readers of what is" in text
    assert "sent after the commit, and stored once, for readers of what is committed" in text


# --- servers that are killed


@contextlib.contextmanager
def relaying(app: duly.App) -> Iterator[None]:
    """A relay of this process goes on meanwhile."""
    relay, stop = relay_of(app, wait_s=0.05), threading.Event()
    thread = threading.Thread(target=relay.run, args=(stop,))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(30)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_cluster_that_is_killed_in_the_middle(kafka_node: KafkaNode, store: str):
    url = in_namespace(f"relayed{random.randrange(1 << 32)}", kafka_node.url)
    with shop_at(url, store) as app:
        app.backends()
        with relaying(app):
            for round in range(3):
                fill(app, range(round * 100, round * 100 + 50))
                kafka_node.kill()
                fill(app, range(round * 100 + 50, round * 100 + 100))
                kafka_node.start()
            eventually(lambda: unsent(app) == 0, "all is sent", lambda: str(unsent(app)), 120.0)
        check(url, 300)


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("topics", [["orders"], ["orders", "duly.relayed.*"]], ids=len)
@pytest.mark.parametrize("heirs", [0, 2])
def test_what_a_dead_relay_left_and_kafka_forgets_to_end_is_ended(
    kafka_node: KafkaNode, tmp_path: Path, topics: Sequence[str], heirs: int
):
    """Readers would stay before it for ever. Those who took over first may have died, too, before
    they published anything.
    """
    namespace = f"relayed{random.randrange(1 << 32)}"
    url = in_namespace(namespace, kafka_node.url) + "&transaction.timeout.ms=2000"
    store = f"sqlite:///{tmp_path}/effects.db"
    with shop_at(url, store) as app:
        app.backends()
        fill(app)
        with started(url, store, "sent", "3") as dead:
            assert dead.wait(60) == -signal.SIGKILL
        settled(url, "orders")
        for topic in topics:
            assert forget_the_end(kafka_node, f"{namespace}.{topic}")
        assert open_in(url, "orders")
        for _ in range(heirs):
            with started(url, store, "begun", "2") as dead:
                assert dead.wait(60) == -signal.SIGKILL
        relay = relay_of(app)
        until_empty(app, relay)
        relay.close()
        check(url)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_what_a_dead_relay_left_behind_a_transaction_of_others_is_ended_when_that_is(
    kafka_node: KafkaNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """By then it is published, and its messages stand there twice."""
    monkeypatch.setattr(leavings, "_AGAIN_S", 0.1)
    namespace = f"relayed{random.randrange(1 << 32)}"
    url = in_namespace(namespace, kafka_node.url) + "&transaction.timeout.ms=2000"
    store = f"sqlite:///{tmp_path}/effects.db"
    with shop_at(url, store) as app:
        app.backends()
        others: Any = Producer(
            {"bootstrap.servers": host_of(url), "transactional.id": f"{namespace}.others"}
        )
        others.init_transactions(30)
        others.begin_transaction()
        for number in range(ORDERS.partitions):
            others.produce(f"{namespace}.orders", b"-1", partition=number)
        assert others.flush(30) == 0
        fill(app)
        with started(url, store, "sent", "3") as dead:
            assert dead.wait(60) == -signal.SIGKILL
        before = ends_in(url, "orders", "read_uncommitted")
        eventually(
            lambda: ends_in(url, "orders", "read_uncommitted") > before,
            "Kafka has ended it", timeout_s=60.0,
        )  # fmt: skip
        assert forget_the_end(kafka_node, f"{namespace}.orders")
        relay = relay_of(app)
        until_empty(app, relay)
        assert open_in(url, "orders") == ORDERS.partitions
        others.abort_transaction(30)
        fill(app, range(COUNT, COUNT + 5))

        def told() -> bool:
            relay.step()
            return not open_in(url, "orders")

        eventually(told, "nothing is open")
        relay.close()
        check(url, COUNT + 5)


@pytest.mark.long
def test_a_store_that_is_killed_in_the_middle(kafka_url: str):
    with (
        PostgresServer() as server,
        shop_at(kafka_url, f"{server.url}") as app,
    ):
        app.backends()
        with relaying(app):
            for round in range(3):
                fill(app, range(round * 100, round * 100 + 100))
                server.kill()
                server.start()
            eventually(lambda: _is_empty(app), "all is sent", timeout_s=120.0)
        check(kafka_url, 300)


def _is_empty(app: duly.App) -> bool:
    try:
        return unsent(app) == 0
    except duly.BrokerUnavailable:
        return False

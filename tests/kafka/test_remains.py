"""What a dead worker left open: whose it was, how it ended, and what is done about it."""

from __future__ import annotations

import logging
import struct
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import closing
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException
from hypothesis import given
from hypothesis import strategies as st

import duly
from duly.brokers.kafka import KafkaBroker, transactions
from duly.brokers.kafka.address import address_of
from duly.brokers.kafka.admin import COMPACTED, Admin, Wanted
from duly.brokers.kafka.ledger import ABORTED, COMMITTED, Entry, Ledger, read_key, read_value
from duly.brokers.kafka.names import Names
from duly.brokers.kafka.producer import Sending
from duly.brokers.kafka.remains import Remains
from duly.brokers.kafka.transactions import TransactionalProducer
from duly.errors import BrokerError, BrokerUnavailable, BrokerUnusable
from tests.kafka.work import ORDERS, namespace_of
from tests.waiting import eventually

Place = tuple[str, int]
EMPTY, ONGOING, COMMITTING, ABORTING = 0, 1, 2, 3
P: Place = ("copies", 0)


def key_of(id: str) -> bytes:
    return struct.pack(">hh", 0, len(id)) + id.encode()


def value_of(status: int, places: Iterable[Place], version: int, began_ms: int = 2) -> bytes:
    """As Kafka's own schema says, of either version."""
    topics: dict[str, list[int]] = {}
    for topic, partition in places:
        topics.setdefault(topic, []).append(partition)
    parts = [struct.pack(">hqhib", version, 4711, 3, 40_000, status)]
    if version:
        parts.append(varint(len(topics) + 1))
        for topic, numbers in topics.items():
            parts += [varint(len(topic) + 1), topic.encode(), varint(len(numbers) + 1)]
            parts += [struct.pack(f">{len(numbers)}i", *numbers), b"\0"]
    else:
        parts.append(struct.pack(">i", len(topics) or -1))
        for topic, numbers in topics.items():
            parts += [struct.pack(">h", len(topic)), topic.encode()]
            parts.append(struct.pack(f">i{len(numbers)}i", len(numbers), *numbers))
    return b"".join([*parts, struct.pack(">qq", 1, began_ms), b"\0" * version])


def varint(number: int) -> bytes:
    low, rest = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


names = st.text("abcz.-_", min_size=1, max_size=200)


@given(
    st.integers(0, 7), st.sets(st.tuples(names, st.integers(0, 999))), st.integers(0, 1),
    st.integers(-1, 1 << 62),
)  # fmt: skip
def test_what_coordinators_write_is_read(
    status: int, places: set[Place], version: int, began_ms: int
):
    value = value_of(status, places, version, began_ms)
    assert read_value(value) == Entry(status, frozenset(places), began_ms)


@given(st.binary(max_size=60))
def test_what_is_nothing_of_the_kind_is_nothing(data: bytes):
    for version in (b"", b"\0\0", b"\0\1"):
        read_key(version + data)
        read_value(version + data)
    assert read_value(b"\0\2" + data) is None
    assert read_key(b"\0\1" + data) is None


class Written(Ledger):
    """A ledger of these records."""

    def __init__(self, *records: tuple[str, int | None, Collection[Place]]) -> None:
        super().__init__(None, None, "shop-")  # type: ignore[arg-type]
        self.written = records
        self.began_ms = 2
        self.reads = 0

    def _records(self, goes_on: Callable[[], bool]) -> Any:
        del goes_on
        self.reads += 1
        for id, status, places in self.written:
            yield key_of(id), None if status is None else value_of(status, places, 1, self.began_ms)


def test_of_an_id_the_latest_transaction_counts():
    """Of another application's only what is open, which nobody is to be alarmed about."""
    entries = Written(
        ("shop-1", ONGOING, [P]), ("shop-1", ABORTING, [P]), ("shop-1", ABORTED, []),
        ("shop-1", EMPTY, []),
        ("shop-2", ONGOING, [P]), ("shop-2", COMMITTED, []),
        ("other-1", ABORTED, [P]),
        ("other-2", ONGOING, [P]), ("other-2", ABORTED, []),
        ("other-3", ONGOING, [P]), ("other-3", None, []),
        ("other-4", EMPTY, []), ("other-4", ONGOING, [P]), ("other-4", COMMITTING, [P]),
        ("shop-3", ABORTED, [P]), ("shop-3", None, []),
        ("shop-4", ABORTED, [P]), ("shop-4", ONGOING, [("else", 1)]),
    ).entries(lambda: True)  # fmt: skip
    assert entries == {
        "shop-1": Entry(ABORTED, frozenset([P]), 2),
        "shop-2": Entry(COMMITTED, frozenset([P]), 2),
        "shop-4": Entry(ONGOING, frozenset([("else", 1)]), 2),
        "other-4": Entry(COMMITTING, frozenset([P]), 2),
    }


class Cluster:
    """Partitions where readers stay until this id's records are ended there. ``fails`` says how
    the first tries of an id go: with an error, or without a record.
    """

    def __init__(self, ledger: Ledger, guilty: str = "", *others: Place) -> None:
        self.guilty = guilty
        self.at = dict.fromkeys([P, *others], 7)
        self.ended: list[str] = []
        self.last = ""
        self.fails: dict[str, list[BrokerError | bool]] = {}
        self.now = 0.0
        self.goes_on = True
        self.remains = Remains(
            self,  # type: ignore[arg-type]
            ledger,
            self._called,
            lambda each: each.startswith("shop-me"),
            lambda: self.goes_on,
            lambda: self.now,
        )

    def held_up(self, _: Iterable[str]) -> Mapping[Place, tuple[int, int]]:
        return {place: (at, 99) for place, at in self.at.items()}

    def standing(self, topics: Iterable[str]) -> Mapping[Place, int]:
        names = {*topics}
        return {place: at for place, at in self.at.items() if place[0] in names}

    def _called(self, id: str) -> Any:
        cluster = self

        class Dead:
            def end_records(self, places: Collection[Place]) -> bool:
                cluster.ended.append(id)
                cluster.goes_on = id != cluster.last
                if cluster.fails.get(id):
                    went = cluster.fails[id].pop(0)
                    if isinstance(went, BrokerError):
                        raise went
                    return went
                for place in places:
                    if id == cluster.guilty:
                        cluster.at.pop(place, None)
                return True

            def close(self) -> None: ...

        return Dead()

    def look(self, *after_s: float) -> list[str]:
        """What was ended by then, in looks after so many seconds each."""
        for seconds in after_s:
            self.now += seconds
            self.remains.look(["copies"])
        return self.ended


ABORTED_THERE = [(f"shop-{n}", ABORTED, [P]) for n in range(4)]


def test_who_is_quick_is_left_alone():
    cluster = Cluster(Written(*ABORTED_THERE))
    for _ in range(20):
        cluster.at[P] += 1
        assert cluster.look(5) == []


def test_of_those_that_were_aborted_the_latest_is_tried_first_and_each_once():
    cluster = Cluster(Written(*ABORTED_THERE), guilty="shop-1")
    assert cluster.look(0, 5) == []
    assert cluster.look(5) == ["shop-3", "shop-2", "shop-1"]
    assert cluster.look(30, 30, 30) == ["shop-3", "shop-2", "shop-1"]


@pytest.mark.parametrize("went", [BrokerUnavailable("it is loading"), False])
def test_an_id_whose_try_failed_is_tried_again(went: BrokerError | bool):
    """Its coordinator may just be loading, behind the restart that has caused all this."""
    cluster = Cluster(Written(*ABORTED_THERE[:1]), guilty="shop-0")
    cluster.fails = {"shop-0": [went]}
    assert cluster.look(0, 10) == ["shop-0"]
    assert P in cluster.at
    assert cluster.look(30) == ["shop-0", "shop-0"]
    assert P not in cluster.at


def test_an_id_that_fails_keeps_no_other_and_no_other_place_waiting():
    other = ("else", 1)
    there = [(f"shop-{n}", ABORTED, [P, other]) for n in range(3)]
    cluster = Cluster(Written(*there), "shop-1", other)
    cluster.fails = {"shop-2": [BrokerUnavailable("it is loading")] * 100}
    assert set(cluster.look(0, 10)) == {"shop-2", "shop-1"}
    assert not cluster.at


def test_those_that_fail_for_ever_come_behind_those_that_were_not_tried():
    there = [(f"shop-{n}", ABORTED, [P]) for n in range(40)]
    cluster = Cluster(Written(*there), guilty="shop-1")
    cluster.fails = {f"shop-{n}": [BrokerUnusable("not allowed")] * 100 for n in range(2, 40)}
    cluster.look(0, 10, 30, 30)
    assert not cluster.at


class Driver:
    """The driver's producer, which delivers so many records and no more."""

    delivers = 0

    def __init__(self, _: Any) -> None:
        self._reports: list[Any] = []

    def init_transactions(self, _: float) -> None: ...

    def begin_transaction(self) -> None: ...

    def produce(self, *_: Any, on_delivery: Any, **__: Any) -> None:
        self._reports.append(on_delivery)

    def flush(self, _: float) -> None:
        for report in self._reports[: self.delivers]:
            report(None, None)

    def poll(self, _: float) -> None: ...

    def purge(self) -> None: ...

    def abort_transaction(self, _: float) -> None:
        for report in self._reports[self.delivers :]:
            report(KafkaError(KafkaError._PURGE_QUEUE), None)


@pytest.mark.parametrize("delivers", [0, 1, 2])
def test_whether_records_were_ended_is_told(monkeypatch: pytest.MonkeyPatch, delivers: int):
    """An abort is about those partitions alone where a record was stored before it."""
    monkeypatch.setattr(transactions, "Producer", Driver)
    monkeypatch.setattr(Driver, "delivers", delivers)
    producer = TransactionalProducer(address_of("kafka://here", ""), "shop-1")
    assert producer.end_records([P, ("else", 1)]) == (delivers == 2)


def test_an_abort_that_is_not_answered_has_ended_nothing(monkeypatch: pytest.MonkeyPatch):
    def is_silent(_driver: Any, _timeout_s: float) -> None:
        raise KafkaException(KafkaError(KafkaError._TIMED_OUT))

    monkeypatch.setattr(transactions, "Producer", Driver)
    monkeypatch.setattr(Driver, "delivers", 1)
    monkeypatch.setattr(Driver, "abort_transaction", is_silent)
    producer = TransactionalProducer(address_of("kafka://here", ""), "shop-1")
    assert producer.end_records([P]) is False


def test_nothing_is_aborted_that_was_committed_or_wrote_elsewhere_or_is_ones_own(
    caplog: pytest.LogCaptureFixture,
):
    cluster = Cluster(
        Written(
            ("shop-1", COMMITTED, [P]), ("shop-2", ONGOING, [("x", 0)]),
            ("shop-3", ABORTED, [("x", 0)]), ("shop-me-1", ABORTED, [P]),
        )
    )  # fmt: skip
    with caplog.at_level(logging.ERROR):
        assert cluster.look(0, 10, 30, 60) == []
        assert "committed there last: shop-1" in caplog.text
        assert "kafka-transactions.sh find-hanging" in caplog.text
        assert len(caplog.records) == 1, "it is told once"
        cluster.at[P] += 1
        cluster.look(0, 30)
        assert len(caplog.records) == 2, "and where readers stay next"


@pytest.mark.parametrize("status", [ONGOING, COMMITTING, ABORTING])
@pytest.mark.parametrize("id", ["shop-2", "flink-2"])
def test_what_is_open_is_left_alone_and_alarms_nobody(
    status: int, id: str, caplog: pytest.LogCaptureFixture
):
    """Whoever's it is: its end comes, however late."""
    cluster = Cluster(Written(("shop-1", COMMITTED, [P]), (id, status, [P])))
    with caplog.at_level(logging.ERROR):
        assert cluster.look(0, 10, *[30] * 20) == []
    assert not caplog.records


def test_what_was_begun_later_does_not_explain_why_readers_stay(
    caplog: pytest.LogCaptureFixture,
):
    """Where much is published there is always something open."""
    ledger = Written(("shop-1", ONGOING, [P]))
    cluster = Cluster(ledger)
    with caplog.at_level(logging.ERROR):
        cluster.look(0, 10)
        assert not caplog.records
        ledger.began_ms += 1
        cluster.look(30)
    assert "kafka-transactions.sh find-hanging" in caplog.text


def test_what_nothing_can_be_done_about_is_looked_at_more_and_more_seldom():
    ledger = Written(("flink-1", ONGOING, [P]))
    cluster = Cluster(ledger)
    cluster.look(*[5] * 120)
    assert ledger.reads == 5  # after 15, 35, 75, 155, 315 s
    cluster.look(*[5] * 120)
    assert ledger.reads == 7
    cluster.at[P] += 1
    cluster.look(*[5] * 7)
    assert ledger.reads == 9, "readers have come on, and stay again"


def test_somewhere_else_readers_are_not_kept_waiting_for_that():
    ledger = Written(("flink-1", ONGOING, [P]), ("shop-1", ABORTED, [("else", 1)]))
    cluster = Cluster(ledger, guilty="shop-1")
    cluster.look(*[5] * 185)
    assert ledger.reads == 7  # the last just now
    cluster.at["else", 1] = 7
    cluster.look(*[5] * 4)
    assert ("else", 1) not in cluster.at


def test_as_long_as_there_is_something_to_be_tried_it_goes_on_soon():
    ledger = Written(*((f"shop-{n}", ABORTED, [P]) for n in range(100)))
    cluster = Cluster(ledger, guilty="shop-0")
    cluster.look(*[5] * 30)
    assert not cluster.at


def test_between_two_reads_there_is_time_however_long_they_last():
    """Of a ledger that is not read to its end in time the next read would begin at once."""

    class Slow(Written):
        def _records(self, goes_on: Callable[[], bool]) -> Any:
            del goes_on
            self.reads += 1
            cluster.now += 20
            raise BrokerUnavailable("it was not read to its end")

    ledger = Slow()
    cluster = Cluster(ledger)
    cluster.look(0, 10)
    assert ledger.reads == 1
    cluster.look(5, 5, 5)
    assert ledger.reads == 1
    cluster.look(5)
    assert ledger.reads == 2


def test_who_may_not_read_what_coordinators_write_is_told(caplog: pytest.LogCaptureFixture):
    class Denied(Written):
        def _records(self, goes_on: Callable[[], bool]) -> Any:
            del goes_on
            raise BrokerUnusable("__transaction_state: not allowed")

    with caplog.at_level(logging.WARNING):
        assert Cluster(Denied()).look(0, 10) == []
    assert "__transaction_state: not allowed" in caplog.text


# --- who looks, and where


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The topics where it is looked in this process, often."""
    seen: set[str] = set()
    monkeypatch.setattr(Remains, "look", lambda _, topics: seen.update(topics))
    monkeypatch.setattr("duly.brokers.kafka.broker.WATCH_S", 0.02)
    return seen


def test_who_only_publishes_by_transactions_looks_too_and_among_dead_letters(
    kafka_url: str, looked_at: set[str]
):
    orders, dead = (f"{namespace_of(kafka_url)}.{name}" for name in ("orders", "duly.dead"))
    with duly.App("shop", broker=kafka_url) as app:
        app.publish(ORDERS, "1")
        broker: Any = app.backends()[0]
        assert broker._watch is None, "nothing is published by a transaction of its own"
        for _ in range(2):
            with app.transaction() as tx:
                tx.publish(ORDERS, "2")
        eventually(lambda: orders in looked_at, "it is looked")
        admin = Admin(address_of(kafka_url, ""))
        assert dead not in looked_at
        assert not admin.find([dead]), "and it is not made"
        admin.make([Wanted(dead, 1, {})])
        eventually(lambda: dead in looked_at, "it is looked there, too")


def test_what_is_open_is_ended_also_in_a_compacted_topic(kafka_url: str):
    """As that of dead letters is: it takes no record without a key."""
    address = address_of(kafka_url, "")
    dead = Names(address.namespace).letters
    Admin(address).make([Wanted(dead, 1, COMPACTED)])
    with closing(TransactionalProducer(address, f"{address.namespace}.one")) as producer:
        assert producer.end_records([(dead, 0)])


def test_who_may_not_see_dead_letters_looks_at_the_rest(looked_at: set[str]):
    class Denied:
        def find(self, topics: Iterable[str]) -> Any:
            raise BrokerUnusable(f"{[*topics]}: not allowed")

    broker = KafkaBroker("kafka://127.0.0.1:1")
    with closing(broker):
        broker.own_store()
        broker._topics["orders"] = ORDERS
        broker._admin = Denied()  # type: ignore[assignment]
        broker._look_for_remains()
    assert looked_at == {"orders"}


def test_who_is_to_stop_tries_no_further_id_and_tells_nothing(caplog: pytest.LogCaptureFixture):
    cluster = Cluster(Written(*ABORTED_THERE))
    cluster.last = "shop-2"
    with caplog.at_level(logging.ERROR):
        assert cluster.look(0, 10) == ["shop-3", "shop-2"]
    assert not caplog.records


def test_who_is_to_stop_reads_no_further(kafka_url: str, caplog: pytest.LogCaptureFixture):
    """However much is written there."""
    address = address_of(kafka_url, "")
    admin = Admin(address)
    admin.make([Wanted(f"{address.namespace}.orders", 1, {})])
    producer = TransactionalProducer(address, f"{address.namespace}.one")
    with closing(producer):
        producer.begin()
        producer.send([Sending(f"{address.namespace}.orders", b"1", None, [])])
        producer.commit()
    ledger = Ledger(address, admin, f"{address.namespace}.")
    found = ledger.entries(lambda: True)[f"{address.namespace}.one"]
    assert abs(found.began_ms / 1000 - time.time()) < 100
    with pytest.raises(BrokerUnavailable, match="closed"):
        ledger.entries(lambda: False)
    cluster = Cluster(ledger)
    cluster.goes_on = False
    cluster.look(0, 10)
    assert not caplog.records, "nobody is told of that"


def test_a_broker_that_is_closed_looks_no_more(monkeypatch: pytest.MonkeyPatch):
    """What it would begin then under ids of the dead nobody ends."""
    looks, went_on = threading.Event(), list[bool]()

    def look(remains: Any, _topics: Collection[str]) -> None:
        looks.set()
        eventually(broker._stop.is_set, "it is closed")
        went_on.append(remains._goes_on())

    monkeypatch.setattr(Remains, "look", look)
    monkeypatch.setattr(Admin, "find", lambda *_: {})
    monkeypatch.setattr("duly.brokers.kafka.broker.WATCH_S", 0.01)
    broker = KafkaBroker("kafka://127.0.0.1:1")
    broker.own_store()
    broker.watch()
    assert looks.wait(30)
    broker.close()
    assert went_on == [False]
    assert broker._watch is not None
    eventually(lambda: broker._watch and not broker._watch.is_alive(), "and never again")

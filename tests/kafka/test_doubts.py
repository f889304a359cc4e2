"""Commits of Kafka's transactions that are not answered: until it is known what became of one,
nothing else of its partitions is committed or started, and nobody waits for it at full speed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
from confluent_kafka import TopicPartition

import duly
from duly.brokers.kafka import KafkaBroker, doubt, producers
from duly.brokers.kafka import broker as broker_module
from duly.brokers.kafka.intake import Intake
from duly.brokers.kafka.item import Item, Order
from duly.brokers.kafka.lane import Lane
from duly.brokers.kafka.notes import Notes
from duly.brokers.kafka.producer import Sending
from duly.brokers.kafka.receipt import Receipt
from duly.brokers.kafka.share import Share
from duly.brokers.kafka.store import KafkaSession
from duly.brokers.kafka.transacted import Transacted
from duly.brokers.kafka.transactions import TransactionalProducer
from duly.errors import BrokerUnavailable, CommitUnknown
from duly.guarantees import Done, Release, Settlement
from duly.store import Scope
from tests.kafka.copier import copier
from tests.kafka.copying import HASTY, check_copied, is_done, publish, read, working
from tests.waiting import eventually

TOKEN, LANE, NUMBER = 5, 1, 7


@pytest.fixture
def broker(kafka_url: str) -> str:
    return kafka_url + HASTY


@pytest.fixture
def takes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the copier's handler takes: payloads are claimed and settled many at a time."""
    monkeypatch.setenv("COPIER_TAKES", request.param)


BOTH = pytest.mark.parametrize("takes", ["payloads", "messages"], indirect=True)


# --- without a server


class Played:
    """A producer: ``commits`` is called in place of a commit, ``known`` says whether it can be
    asked what became of it.
    """

    id = "played"
    is_clean = True

    def __init__(self, commits: Callable[[], None]) -> None:
        self.commit = commits
        self.known = threading.Event()
        self.count = 0
        self.pending = False

    def begin(self) -> None:
        self.count += 1

    def prepare(self) -> None:
        if not self.known.is_set():
            raise BrokerUnavailable("its coordinator is away")

    def send(self, sendings: Sequence[Sending]) -> None: ...
    def send_offsets(self, places: Sequence[Any], group: bytes) -> None: ...
    def was_aborted(self) -> None: ...

    def end_positions(self, places: Sequence[TopicPartition], group: bytes) -> None:
        assert [(each.topic, each.partition) for each in places] == [("here", 0)]
        assert group == b"a member"
        self.pending = False


class Producing:
    """Every transaction is this one producer's."""

    owner = "played/1"

    def __init__(self, producer: Played) -> None:
        self._producer = producer

    def take(self) -> Played:
        return self._producer

    def give_back(self, producer: Played) -> None: ...


class Asked:
    """Where the group stands: at the first, where nothing of the producer's is pending."""

    def __init__(self, producer: Played) -> None:
        self._producer = producer

    def at_last(self, names: set[tuple[str, int]]) -> dict[tuple[str, int], tuple[int, str]]:
        if self._producer.pending:
            raise BrokerUnavailable("a transaction may change it")
        return dict.fromkeys(names, (0, ""))


class Claimed:
    """Four messages of one partition, claimed by a lane of a process that is one of its group."""

    def __init__(self, commits: Callable[[], None]) -> None:
        self.producer = Played(commits)
        self.changed = threading.Condition()
        share = Share(("here", 0), "log", NUMBER, Order.AS_LOGGED, 0, Notes())
        self.share = share
        shares = {NUMBER: share}
        self.transacted = Transacted(
            "copy", self.changed, shares, time.monotonic, lambda: 0,
            cast("Any", Producing(self.producer)), cast("Any", Asked(self.producer)),
        )  # fmt: skip
        self.transacted._group = b"a member"
        self.intake = object.__new__(Intake)
        self.intake.number, self.intake.subscription, self.intake.changed = 1, "copy", self.changed
        self.intake.by_generation, self.intake.commits = shares, self.transacted
        self.lane = object.__new__(Lane)
        self.lane.intake = self.intake
        self.lane._broker = cast("Any", SimpleNamespace(letters=lambda *_: ()))
        topic = duly.Topic("here", int, guarantee="at-least-once")
        lined: dict[str, int] = {}
        for offset in range(4):
            share.feed(Item(topic, offset, 0, b"1"), None)
        for _ in range(4):
            item = share.next_ready(time.monotonic(), lined)
            assert item is not None
            share.take(item, lined)
            item.token, item.lane, item.until = TOKEN, LANE, time.monotonic() + 60
        self.receipts = [Receipt(1, NUMBER, offset, TOKEN) for offset in range(4)]

    def session(self) -> KafkaSession:
        home = SimpleNamespace(
            intake=lambda _: self.intake, letters=lambda *_: (), look_for=lambda _: None
        )
        scope = cast("Scope", SimpleNamespace(consumer="copy"))
        return KafkaSession(cast("Any", home), cast("Any", Producing(self.producer)), scope)

    def commit(self, settlements: Sequence[Settlement]) -> None:
        session = self.session()
        session.settle(settlements, ())
        session.commit()


def unanswered() -> None:
    raise CommitUnknown("sent, and not answered")


def test_what_was_claimed_with_what_is_in_doubt_waits_for_it():
    """Whoever gives it back is told so, and neither tries on and on nor loses it."""
    claimed = Claimed(unanswered)
    with pytest.raises(CommitUnknown):
        claimed.commit([Done(each) for each in claimed.receipts[:2]])
    given_back = [Release(each, started=True) for each in claimed.receipts]
    for _ in range(3):
        with pytest.raises(BrokerUnavailable, match="is not known yet"):
            claimed.lane.settle(given_back)
    assert claimed.producer.count == 1, "nothing else was begun"
    claimed.producer.known.set()
    claimed.producer.commit = lambda: None
    assert claimed.lane.settle(given_back) == []
    assert not claimed.share.busy
    assert claimed.share.position == 0
    assert not claimed.share.claimed


def test_nothing_of_a_partition_is_started_while_a_commit_of_it_is_in_doubt():
    claimed = Claimed(unanswered)
    with pytest.raises(CommitUnknown):
        claimed.commit([Done(each) for each in claimed.receipts[:2]])
    deliveries = [SimpleNamespace(receipt=each) for each in claimed.receipts[2:]]
    with pytest.raises(BrokerUnavailable, match="is not known yet"):
        claimed.session().admit(cast("Any", deliveries))
    claimed.producer.known.set()
    assert len(claimed.session().admit(cast("Any", deliveries)).fresh) == 2


def test_positions_that_stay_pending_under_a_living_process_are_ended_by_itself(
    monkeypatch: pytest.MonkeyPatch,
):
    """Kafka may have forgotten them: then nobody is ever told what became of the commit."""
    claimed = Claimed(unanswered)
    claimed.producer.known.set()
    claimed.producer.pending = True
    with pytest.raises(CommitUnknown):
        claimed.commit([Done(each) for each in claimed.receipts[:2]])
    with pytest.raises(BrokerUnavailable, match="may change it"):
        claimed.transacted.decide()
    assert claimed.producer.pending, "it may be over any moment"
    monkeypatch.setattr(doubt, "_UNTOLD_S", 0.0)
    with pytest.raises(BrokerUnavailable, match="may change it"):
        claimed.transacted.decide()
    claimed.transacted.decide()
    assert not claimed.share.busy


def test_a_commit_waits_for_another_of_its_own_process():
    """That is no claim lost to others, for which handlers would have to run again."""
    claimed = Claimed(lambda: None)
    with claimed.changed:
        claimed.share.busy = True  # as while it is announced who works here
    ended = threading.Event()

    def commit() -> None:
        claimed.commit([Done(each) for each in claimed.receipts[:2]])
        ended.set()

    thread = threading.Thread(target=commit)
    thread.start()
    assert not ended.wait(0.2)
    claimed.transacted._free([claimed.share])
    thread.join(30)
    assert ended.is_set()
    assert claimed.share.position == 2


# --- with one


def test_what_nobody_told_of_a_transaction_is_asked_again(
    kafka_url: str, monkeypatch: pytest.MonkeyPatch
):
    asked: list[str] = []

    def end_standing(self: TransactionalProducer, _: object) -> None:
        asked.append(self.id)
        if len(asked) < 3:
            raise BrokerUnavailable("a partition has no leader")

    monkeypatch.setattr(broker_module, "WATCH_S", 0.1)
    monkeypatch.setattr(TransactionalProducer, "end_standing", end_standing)
    topic = duly.Topic("one", str, guarantee="at-least-once", partitions=1)
    with duly.App("app", broker=kafka_url) as app:
        for _ in range(2):
            with app.transaction() as tx:
                tx.publish(topic, "a")
            broker, _ = app.backends()
            assert isinstance(broker, KafkaBroker)
            assert broker._producers is not None
            one = broker._producers.take()
            one.is_clean = False
            broker._producers.give_back(one)
        eventually(lambda: len(asked) >= 3, "it is asked again")
    assert len({*asked}) == 1


class Wrong(TransactionalProducer):
    """Whose transactions that store records go wrong as ``how`` says, as long as it says so."""

    how: list[str] = []  # noqa: RUF012 - of all of them
    unready = 0
    _stores = False

    def prepare(self) -> None:
        if Wrong.unready and not self._is_ready:
            Wrong.unready -= 1
            raise BrokerUnavailable("not yet")
        super().prepare()

    def send(self, sendings: Sequence[Sending]) -> None:
        self._stores = bool(sendings)
        super().send(sendings)

    def commit(self) -> None:
        how = Wrong.how.pop(0) if Wrong.how and self._stores else ""
        if how == "aborted":
            self._producer.flush(10)
            self.abort()
            raise duly.TransactionInterrupted("aborted")
        if how == "refused":
            self._producer.flush(10)
            self.abort()
            raise duly.Superseded("the generation before")
        if how == "not carried out":
            self._producer.flush(10)
            self._discard()
            raise CommitUnknown("no answer")
        super().commit()
        if how == "carried out":
            self._discard()
            raise CommitUnknown("no answer")


@BOTH
@pytest.mark.usefixtures("takes")
@pytest.mark.parametrize("unready", [pytest.param(0, marks=pytest.mark.long), 3])
@pytest.mark.parametrize("how", ["aborted", "refused", "not carried out", "carried out"])
def test_whatever_a_transaction_ends_with_each_is_copied_once(
    broker: str, monkeypatch: pytest.MonkeyPatch, how: str, unready: int
):
    """After a commit without an answer the positions tell, as soon as they can be asked."""
    monkeypatch.setattr(producers, "TransactionalProducer", Wrong)
    monkeypatch.setattr(Wrong, "how", ["", how, how, "", how])
    publish(broker, 120)
    app = copier(broker, batch=10)
    with working(app):
        eventually(lambda: len(read(broker)) >= 20, "some are copied")
        Wrong.unready = unready
        eventually(lambda: len(read(broker)) >= 120 and is_done(app), "all are copied")
    assert not Wrong.how, "it went wrong"
    check_copied(read(broker), 120)
    aborted = len(read(broker, committed=False)) - 120
    assert (aborted > 0) is (how != "carried out"), "and of what was aborted nothing is seen"


@BOTH
@pytest.mark.usefixtures("takes")
def test_of_a_batch_that_was_committed_in_part_each_is_copied_once(
    broker: str, monkeypatch: pytest.MonkeyPatch
):
    """The rest of it is claimed still when nobody can say what became of the commit."""
    monkeypatch.setattr(producers, "TransactionalProducer", Wrong)
    monkeypatch.setattr(Wrong, "how", ["", "not carried out", "carried out"])
    publish(broker, 60)
    app = copier(broker, batch=10, tx_s=0.02, takes_s=0.006)
    Wrong.unready = 0
    with working(app):
        eventually(lambda: len(Wrong.how) < 3, "it has begun")
        Wrong.unready = 3
        eventually(lambda: len(read(broker)) >= 60 and is_done(app), "all are copied")
    assert not Wrong.how, "it went wrong"
    check_copied(read(broker), 60)

"""Dead letters: brought to where they are kept, by duly and by the server, whatever dies."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

import duly
from duly.broker import SubscribeOptions
from duly.brokers.rabbitmq import RabbitMQBroker, burial
from duly.brokers.rabbitmq.link import content
from duly.brokers.rabbitmq.topology import Names, count, declare_queue
from duly.errors import BrokerError, BrokerUnavailable, CommitUnknown, ConfigurationError
from duly.guarantees import Dead, Done, Guarantee
from duly.inspection import DeadLetter, Selection
from duly.mending import Buried
from duly.stores.memory.graveyard import MemoryGraveyard
from tests.rabbitmq.test_faults import settled
from tests.rabbitmq.work import A_LOT, ORDERS, awaited, bodies, broker_at, lane_of, publish
from tests.servers.postgres import named_after
from tests.servers.rabbitmq import RabbitMQNode, channel, in_namespace
from tests.waiting import eventually

# On servers of its own, and minutes in all.
pytestmark = pytest.mark.long

EVERY = Selection()


def names(url: str) -> Names:
    return Names(url.partition("namespace=")[2])


def letters(broker: RabbitMQBroker) -> list[DeadLetter]:
    return list(broker.graveyard.select(EVERY, 100))[::-1]


def give_up(broker: RabbitMQBroker, *ids: str, error: str = "no") -> None:
    lane = lane_of(broker)
    publish(broker, *ids)
    held = awaited(lane, len(ids))
    assert list(lane.settle([Dead(each.receipt, error) for each in held])) == []
    lane.close()


def lying(broker: RabbitMQBroker, queue: str) -> int:
    """How many messages are in a queue."""
    told = broker.link.call(lambda connection: count(connection, [queue]))
    return told.get(queue, (0, 0))[0]


class Away(MemoryGraveyard):
    """A graveyard that fails as told."""

    def __init__(self, error: Exception | None = None, *, after: bool = False) -> None:
        super().__init__(threading.RLock())
        self.error = error
        self.after = after

    def bury(self, letters: Sequence[DeadLetter]) -> None:
        if self.error is not None and not self.after:
            raise self.error
        super().bury(letters)
        if self.error is not None:
            raise self.error


# --- what a consumer gave up on


def test_without_a_store_they_are_in_a_stream_and_survive(rabbit_url: str):
    with broker_at(rabbit_url) as broker:
        give_up(broker, "a", "b", error="ValueError: no such order")
    with broker_at(rabbit_url) as broker:
        first, second = letters(broker)
        assert {first.message.id, second.message.id} == {"a", "b"}
        assert (first.error, first.attempts) == ("ValueError: no such order", 1)
        assert 0 < first.number < second.number
        for _ in range(3):
            assert letters(broker) == [first, second], "looking changes nothing"
        Buried(broker).discard([first])
        assert letters(broker) == [second]
    with broker_at(rabbit_url) as broker:
        assert letters(broker) == [second]


def test_many_are_read_to_the_end(rabbit_url: str):
    ids = [f"{n}" for n in range(1500)]
    with broker_at(rabbit_url) as broker:
        lane = lane_of(broker)
        publish(broker, *ids)
        buried: list[str] = []
        while len(buried) < len(ids):
            held = lane.claim(500, A_LOT, 10.0)
            lane.settle([Dead(each.receipt, "no") for each in held])
            buried += bodies(held)
        found = broker.graveyard.select(EVERY, 10_000)
        assert sorted(each.message.id for each in found) == sorted(ids)
        numbers = [each.number for each in found]
        assert numbers == sorted(set(numbers), reverse=True)
        assert [each.number for each in broker.graveyard.select(EVERY, 2)] == numbers[:2]


def test_two_processes_see_the_same(rabbit_url: str):
    with broker_at(rabbit_url) as one, broker_at(rabbit_url) as other:
        give_up(one, "a")
        assert letters(one) == letters(other)
        [letter] = letters(other)
        Buried(other).replay([letter])
        assert letters(one) == []
        [again] = awaited(lane_of(one))
        assert (again.message.id, again.attempt, again.replays) == ("a", 1, 1)


def test_what_is_there_as_another_is_told(rabbit_url: str):
    with broker_at(rabbit_url) as broker:
        broker.link.call(lambda it: declare_queue(it, names(rabbit_url).letters, {}))
        with pytest.raises(ConfigurationError, match="x-queue-type"):
            lane_of(broker)
        broker.bury_in(Away())
        assert bodies(lane_of(broker).claim(1, A_LOT, 0.0)) == [], "who has a store needs none"


def test_a_lost_answer_of_the_store_is_asked_again(rabbit_url: str):
    with broker_at(rabbit_url) as broker:
        yard = Away(CommitUnknown("no answer"), after=True)
        broker.bury_in(yard)
        lane = lane_of(broker)
        publish(broker, "a")
        [held] = awaited(lane)
        with pytest.raises(BrokerUnavailable, match="nothing was settled"):
            lane.settle([Dead(held.receipt, "no")])
        yard.error = None
        assert list(lane.settle([Dead(held.receipt, "no")])) == []
        assert [letter.message.id for letter in letters(broker)] == ["a"]


def send(url: str, body: bytes, queue: str = "", **properties: Any) -> None:
    """Publish as a program without duly does."""
    with channel(url) as stranger:
        exchange = "" if queue else names(url).topic(ORDERS.name)
        stranger.basic_publish(content(body, properties), exchange, queue)


def test_what_has_no_identity_is_kept_and_says_so(rabbit_url: str):
    with broker_at(rabbit_url) as broker:
        lane = lane_of(broker)
        send(rabbit_url, b"who am I", content_type="text/plain")
        send(rabbit_url, b"and I", message_id="good", application_headers={"cloudEvents:Ä": "x"})
        publish(broker, "a")
        assert bodies(awaited(lane)) == ["a"]
        nameless, strange = letters(broker)
        assert "without identity" in nameless.error
        assert "'content_type': 'text/plain'" in nameless.error
        assert nameless.message.id.startswith("unidentified-")
        assert (nameless.message.body, strange.message.id) == (b"who am I", "good")
        Buried(broker).replay([nameless])
        [again] = awaited(lane)
        assert (bodies([again]), again.message.id) == (["who am I"], nameless.message.id)


def test_the_same_stranger_is_one_letter(rabbit_url: str):
    """However often it was written down before it was settled."""
    with broker_at(rabbit_url) as broker:
        yard = Away(BrokerUnavailable("away"), after=True)
        broker.bury_in(yard)
        lane = lane_of(broker)
        send(rabbit_url, b"who am I")
        with pytest.raises(BrokerError):
            awaited(lane)
        yard.error = None
        publish(broker, "a")
        assert bodies(awaited(lane)) == ["a"]
        assert [letter.message.body for letter in letters(broker)] == [b"who am I"]


# --- what the server gave up on


def exhaust(url: str) -> None:
    """Take a message back from a consumer until the server gives up on it."""
    with channel(url) as stranger:
        queue, dead = names(url).queue(ORDERS.name, "sub"), names(url).dead(ORDERS.name, "sub")

        def given_up() -> bool:
            for _ in range(100):
                message = stranger.basic_get(queue)
                if message is not None:
                    stranger.basic_reject(message.delivery_tag, requeue=True)
            return bool(stranger.queue_declare(dead, passive=True).message_count)

        eventually(given_up, "the server gives up", timeout_s=60.0)


def test_what_the_server_gave_up_on_is_brought_on(rabbit_url: str):
    with broker_at(rabbit_url) as broker:
        publish(broker, "a")
        exhaust(rabbit_url)
        assert letters(broker) == []
        assert broker.carry() == 1
        [letter] = letters(broker)
        assert (letter.message.id, letter.subscription) == ("a", "sub")
        assert "x-delivery-limit" in letter.error
        assert broker.carry() == 0
        Buried(broker).replay([letter])
        [again] = awaited(lane_of(broker))
        assert (again.message.id, again.attempt, again.repeated) == ("a", 1, False)


def moved_aside(url: str, *ids: str) -> None:
    """What lies where the server puts it."""
    for id in ids:
        send(url, id.encode(), names(url).dead(ORDERS.name, "sub"), message_id=id)


def test_a_worker_does_so_by_itself(rabbit_url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(burial, "EVERY_S", 0.05)
    with broker_at(rabbit_url) as broker:
        yard = Away()
        broker.bury_in(yard)
        lane_of(broker)
        moved_aside(rabbit_url, "a")
        eventually(lambda: letters(broker), "it was carried")
        queue = names(rabbit_url).dead(ORDERS.name, "sub")
        eventually(lambda: not lying(broker, queue), "and taken away there")


def test_while_the_store_is_away_it_stays_where_it_is(
    rabbit_url: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(burial, "EVERY_S", 0.05)
    with broker_at(rabbit_url) as broker:
        yard = Away(BrokerUnavailable("the store is away"))
        broker.bury_in(yard)
        moved_aside(rabbit_url, "a", "b")
        for _ in range(3):
            with pytest.raises(BrokerUnavailable, match="the store is away"):
                broker.carry()
        lane_of(broker)
        yard.error = None
        eventually(lambda: len(letters(broker)) == 2, "the thread goes on when it is back")


@pytest.mark.parametrize("after", [False, True])
def test_a_process_that_dies_while_it_carries_loses_nothing(rabbit_url: str, after: bool):
    yard = Away(BrokerUnavailable("it ends here"), after=after)
    with broker_at(rabbit_url) as broker:
        moved_aside(rabbit_url, "a", "b", "c")
        broker.bury_in(yard)
        with pytest.raises(BrokerUnavailable):
            broker.carry()
        broker.abandon()
    yard.error = None
    with broker_at(rabbit_url) as broker:
        broker.bury_in(yard)
        eventually(lambda: broker.carry() + len(letters(broker)) >= 3, "the server gives it back")
        eventually(lambda: lying(broker, names(rabbit_url).dead(ORDERS.name, "sub")) == 0, "all")
        assert sorted(each.message.id for each in letters(broker)) == ["a", "b", "c"]


def test_a_connection_that_is_lost_while_it_carries(rabbit_url: str):
    """What was taken on the old channel is not acknowledged on the new one."""
    with broker_at(rabbit_url) as broker:

        class Cuts(MemoryGraveyard):
            cut = True

            def bury(self, letters: Sequence[DeadLetter]) -> None:
                super().bury(letters)
                if Cuts.cut:
                    Cuts.cut = False
                    broker.link.cut()
                    eventually(lambda: not broker.link.is_up, "the link has noticed")

        broker.bury_in(Cuts(threading.RLock()))
        moved_aside(rabbit_url, "a", "b")
        with pytest.raises(BrokerError, match="lost while"):
            broker.carry()
        eventually(lambda: broker.carry() == 2, "they came back, and are carried again")
        assert sorted(each.message.id for each in letters(broker)) == ["a", "b"]


def test_a_subscription_that_nobody_made_has_none(rabbit_url: str):
    with broker_at(rabbit_url) as broker:
        broker._known[ORDERS.name, "nobody"] = 0
        assert broker.carry() == 0
        publish(broker, "a")
        assert bodies(awaited(lane_of(broker))) == ["a"], "the connection is as before"


# --- the server dies


def test_a_stream_that_does_not_answer_is_not_taken_for_an_empty_one(
    rabbit_node: RabbitMQNode, node_url: str
):
    """Killed right after the stream was first made, the node comes back without it."""
    with broker_at(node_url) as broker:
        settled(rabbit_node, node_url)
        give_up(broker, "a")
        with restarted(rabbit_node):
            eventually(lambda: not broker.link.is_up, "it is noticed")

        def told() -> str:
            try:
                return ",".join(letter.message.id for letter in letters(broker))
            except BrokerError as error:
                return str(error)

        eventually(lambda: told() == "a" or "does not answer" in told(), "one or the other", told)


@pytest.fixture
def node_url(rabbit_node: RabbitMQNode, request: pytest.FixtureRequest) -> str:
    rabbit_node.start_again()
    return in_namespace(named_after(request.node.name), rabbit_node.url)


@contextmanager
def restarted(node: RabbitMQNode) -> Iterator[None]:
    node.kill()
    yield
    node.start()


def coordinates(node: RabbitMQNode) -> bool:
    """Whether what leads the streams of a node is on disk; see `RabbitMQNode.remembers`."""
    files = [path.read_bytes() for path in node.folder.glob("mnesia/*/coordination/*/*.dets")]
    whole = all(int.from_bytes(file[8:12]) == 1 for file in files)
    return whole and any(b"rabbit_stream_coordinator" in file for file in files)


def test_the_stream_survives_the_server(rabbit_node: RabbitMQNode, node_url: str):
    with broker_at(node_url) as broker:
        give_up(broker, "a", "b")
        settled(rabbit_node, node_url)
        eventually(lambda: coordinates(rabbit_node), "the stream is on disk, too")
        before = letters(broker)
        Buried(broker).discard(before[:1])
        with restarted(rabbit_node):
            eventually(lambda: not broker.link.is_up, "it is noticed")
        found: list[DeadLetter] = []

        def back() -> bool:
            try:
                found[:] = letters(broker)
            except BrokerError:
                return False
            return bool(found)

        eventually(back, "the stream is back", timeout_s=60.0)
        assert found == before[1:]


# --- in order by key


def test_a_replay_goes_to_the_partition_of_its_key(rabbit_url: str):
    topic = duly.Topic("rides", str, guarantee="at-least-once", partitions=4)
    options = SubscribeOptions(Guarantee.AT_LEAST_ONCE, order_by_key=True)
    with broker_at(rabbit_url) as broker:
        broker.declare([topic])
        broker.prepare([topic], "board", options)
        keys = [f"ride-{n}" for n in range(8)]
        broker.publish([topic.message(key, source="tests", id=key, key=key) for key in keys])
        assert [(each.backlog, each.workers) for each in broker.queued()] == [(8, 0), (0, 0)]
        lane = broker.subscribe([topic], "board", options)
        died: set[str] = set()

        def all_die() -> bool:
            held = lane.claim(10, A_LOT, 1.0)
            lane.settle([Dead(each.receipt, "no") for each in held])
            died.update(bodies(held))
            return len(died) == len(keys)

        eventually(all_die, "all are given up on")
        assert broker.queued()[0].workers == 1
        assert list(Buried(broker).replay(letters(broker))) == []
        again: dict[str, tuple[int, int]] = {}

        def all_come() -> bool:
            held = lane.claim(10, A_LOT, 1.0)
            again.update({each.message.id: (each.attempt, each.replays) for each in held})
            lane.settle([Done(each.receipt) for each in held])
            return len(again) == len(keys)

        eventually(all_come, "all come again")
        assert set(again.values()) == {(1, 1)}
        lane.close()


def test_what_the_server_gave_up_on_says_why(rabbit_url: str):
    """Its producer let it expire, another program rejected it, or somebody put it there."""
    queue = names(rabbit_url).queue(ORDERS.name, "sub")
    with broker_at(rabbit_url) as broker:
        with channel(rabbit_url) as stranger:
            for expiration in ({"expiration": "50"}, {}):
                id = "expires" if expiration else "rejected"
                stranger.basic_publish(
                    content(id.encode(), {"message_id": id, **expiration}),
                    names(rabbit_url).topic(ORDERS.name),
                )
                eventually(
                    lambda: gave_up(broker, stranger, queue), f"{id} is with the dead letters"
                )
            put = content(b"put", {"message_id": "put"})
            stranger.basic_publish(put, "", names(rabbit_url).dead(ORDERS.name, "sub"))
            eventually(lambda: broker.carry() == 1, "it is carried")
        errors = {
            letter.message.id: letter.error for letter in broker.graveyard.select(Selection(), 10)
        }
    assert "message-ttl" in errors["expires"]
    assert "rejected it" in errors["rejected"]
    assert "nothing says why" in errors["put"]
    assert queue in errors["expires"]
    assert "x-delivery-limit" not in "".join(errors.values())


def gave_up(broker: RabbitMQBroker, stranger: Any, queue: str) -> bool:
    """Whether something was carried; what has not expired is rejected."""
    if message := stranger.basic_get(queue):
        expires = "expiration" in message.properties
        stranger.basic_reject(message.delivery_tag, requeue=expires)
    return broker.carry() == 1

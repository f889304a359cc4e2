"""Order by key: whoever dies, hangs or hands over, each key is handled in order, and completely."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from duly.broker import Delivery, Published, SubscribeOptions
from duly.brokers.rabbitmq import RabbitMQBroker
from duly.brokers.rabbitmq.lane import Lane
from duly.brokers.rabbitmq.link import content
from duly.brokers.rabbitmq.ordered_lane import OrderedLane
from duly.brokers.rabbitmq.partition import AHEAD, Partition
from duly.brokers.rabbitmq.topology import Names
from duly.errors import BrokerError, BrokerUnavailable, CommitUnknown, ConfigurationError
from duly.guarantees import Dead, Done, Guarantee, Release, Retry
from duly.inspection import DeadLetter, Selection
from duly.message import Topic, partition_of
from tests.postgres.proxy import Proxy
from tests.rabbitmq.ordered import (
    PARTITIONS,
    RIDES,
    Crowd,
    board,
    bodies,
    is_published,
    publish,
    rides_at,
)
from tests.rabbitmq.work import A_LOT
from tests.servers.postgres import named_after
from tests.servers.rabbitmq import RabbitMQNode, channel, in_namespace
from tests.waiting import eventually

_never = threading.Event()
KEYS = [f"r-{number}" for number in range(12)]


def names_at(url: str) -> Names:
    return Names(url.partition("namespace=")[2].partition("&")[0])


def claimed(lane: OrderedLane, limit: int = 100) -> list[Delivery]:
    """What can be claimed, once there is something."""
    got: list[Delivery] = []

    def come() -> bool:
        got.extend(lane.claim(limit, A_LOT, 0.5))
        return bool(got)

    eventually(come, "something comes")
    return got


def drained(*lanes: OrderedLane, count: int, into: list[str] | None = None) -> list[str]:
    """Handle what comes, whatever fails meanwhile, until so many different ones were, with those
    that were before: all of them.
    """
    handled: list[str] = [] if into is None else into

    def some() -> bool:
        for lane in lanes:
            try:
                deliveries = lane.claim(50, A_LOT, 0.05)
                handled.extend(bodies(deliveries))
                lane.settle([Done(delivery.receipt) for delivery in deliveries])
            except (BrokerError, CommitUnknown):
                continue
        return len(set(handled)) >= count

    eventually(some, f"{count} are handled", lambda: f"{len(set(handled))} were", 90.0)
    return handled


def in_order(handled: list[str]) -> bool:
    """Whether each key was handled in order, as far as it was for the first time."""
    first: dict[str, list[int]] = {}
    for body in dict.fromkeys(handled):
        key, _, number = body.partition(":")
        first.setdefault(key, []).append(int(number))
    return all(numbers == list(range(len(numbers))) for numbers in first.values())


def die(broker: RabbitMQBroker) -> None:
    """The connections end without a word; returns when the server gives all of it to others."""
    queues = [queue for intake in broker._ordered() for queue in intake.queues]
    url = broker_url[broker]
    broker.abandon()
    with channel(url) as operator:
        eventually(
            lambda: (
                not any(
                    operator.queue_declare(queue, passive=True).consumer_count for queue in queues
                )
            ),
            "the server has noticed",
        )


broker_url: dict[RabbitMQBroker, str] = {}


@pytest.fixture
def process(rabbit_url: str) -> Iterator[Callable[[], RabbitMQBroker]]:
    """Brokers, each as a process of its own has it."""
    with ExitStack() as stack:

        def another(url: str = rabbit_url) -> RabbitMQBroker:
            broker = stack.enter_context(rides_at(url))
            broker_url[broker] = url
            return broker

        yield another


# --- what stands in its place


def test_who_dies_again_and_again_loses_no_place(process: Callable[[], RabbitMQBroker]):
    """More than is with a process at once: what was taken back comes before the rest, each time."""
    dying = process()
    for start in range(0, 2 * AHEAD + 100, 100):
        numbers = range(start, start + 100)
        assert is_published(
            dying,
            *(RIDES.message(f"k:{n}", source="t", id=str(n), key="k") for n in numbers),
        )
    lane = board(dying)
    handled: list[str] = []
    for limit in (30, 7, 1, 1, 90):
        got = claimed(lane, limit)
        handled += bodies(got)
        # Half of it is settled; with the rest in hand the process dies.
        lane.settle([Done(delivery.receipt) for delivery in got[: len(got) // 2]])
        die(dying)
        dying = process()
        lane = board(dying)
    assert in_order(drained(lane, count=2 * AHEAD + 100, into=handled))


def test_what_a_process_died_with_is_alone_and_counted(process: Callable[[], RabbitMQBroker]):
    """Three more die with it, and nothing of its key passes it; other keys go on."""
    dying = process()
    publish(dying, "poison", 0, 1)
    publish(dying, "mate", 0)
    lane, attempts = board(dying), []
    for _ in range(4):
        got = claimed(lane)
        if bodies(got) == ["mate:0"]:
            assert got[0].attempt == 1, "it was not alone when others died"
            lane.settle([Done(got[0].receipt)])
            got = claimed(lane)
        attempts.append((bodies(got)[0], got[0].attempt, got[0].alone))
        die(dying)
        dying = process()
        lane = board(dying)
    assert [each for each in attempts if each[0] == "poison:0"][-3:] == [
        ("poison:0", 1, True),
        ("poison:0", 2, True),
        ("poison:0", 3, True),
    ]


def test_a_charge_outlives_who_made_it(process: Callable[[], RabbitMQBroker]):
    """A retry stays in its place, and who comes next knows of it, and how long it waits."""
    dying = process()
    publish(dying, "k", 0, 1)
    lane = board(dying)
    first, second = claimed(lane)
    assert list(lane.settle([Retry(first.receipt, 0.0, "no"), Release(second.receipt)])) == []
    first, second = claimed(lane)
    assert (first.attempt, second.attempt) == (2, 1)
    assert list(lane.settle([Retry(first.receipt, 4.0, "no"), Release(second.receipt)])) == []
    die(dying)
    lane = board(process())
    assert list(lane.claim(10, A_LOT, 0.3)) == [], "it waits, and its key with it"
    [first] = claimed(lane, limit=1)
    assert (bodies([first]), first.attempt, first.repeated, first.alone) == (
        ["k:0"],
        3,
        True,
        False,
    )
    lane.settle([Done(first.receipt)])
    [second] = claimed(lane)
    # That one was given back unstarted, but nobody says so.
    assert (bodies([second]), second.attempt) == (["k:1"], 1)


def test_who_leaves_leaves_nobody_suspect(process: Callable[[], RabbitMQBroker]):
    leaving = process()
    publish(leaving, "k", *range(5))
    lane = board(leaving)
    held = claimed(lane, limit=2)
    assert bodies(held) == ["k:0", "k:1"]
    leaving.close()
    got = claimed(board(process()))
    assert bodies(got) == [f"k:{number}" for number in range(5)]
    assert {(delivery.attempt, delivery.alone) for delivery in got} == {(1, False)}
    assert [delivery.repeated for delivery in got] == [True, True, False, False, False]


def test_other_keys_of_a_partition_go_on_beside_a_retry(process: Callable[[], RabbitMQBroker]):
    broker = process()
    other = next(
        key
        for key in map(str, range(100))
        if partition_of(RIDES.message("x", source="t", key=key), PARTITIONS)
        == partition_of(RIDES.message("x", source="t", key="k"), PARTITIONS)
    )
    publish(broker, "k", 0, 1)
    publish(broker, other, 0)
    lane = board(broker)
    first, *rest = claimed(lane, limit=1)
    assert rest == []
    lane.settle([Retry(first.receipt, 30.0, "later")])
    assert bodies(claimed(lane)) == [f"{other}:0"]


def test_a_dead_letter_lets_its_key_go_on(process: Callable[[], RabbitMQBroker]):
    broker = process()
    publish(broker, "k", 0, 1)
    lane = board(broker)
    [first] = claimed(lane, limit=1)
    assert list(lane.settle([Dead(first.receipt, "ValueError: no")])) == []
    assert drained(lane, count=1) == ["k:1"]
    [letter] = broker.graveyard.select(Selection(), 10)
    assert (letter.message.key, letter.error) == ("k", "ValueError: no")


def test_notes_that_cannot_be_written_settle_nothing(
    process: Callable[[], RabbitMQBroker], rabbit_url: str
):
    """Their queue is gone: the retry is told as not settled, and the next one makes it again."""
    broker = process()
    publish(broker, "k", 0)
    lane = board(broker)
    [held] = claimed(lane)
    lane.settle([Retry(held.receipt, 0.0, "no")])
    [held] = claimed(lane)
    number = partition_of(held.message, PARTITIONS)
    with channel(rabbit_url) as operator:
        operator.queue_delete(names_at(rabbit_url).notes(RIDES.name, "board", number))
    with pytest.raises(BrokerUnavailable, match="nothing was settled"):
        lane.settle([Retry(held.receipt, 0.0, "no")])
    assert list(lane.extend([held.receipt], 30.0)) == []
    assert list(lane.settle([Retry(held.receipt, 0.0, "no")])) == []
    [again] = claimed(lane)
    assert again.attempt == 3


# --- many processes


@pytest.mark.long
def test_workers_are_killed_in_the_middle_of_batches(rabbit_url: str, tmp_path: Path):
    with rides_at(rabbit_url) as broker, Crowd(rabbit_url, tmp_path / "records") as crowd:
        crowd.start(3)
        eventually(crowd.are_in_line, "all stand in line")
        published = publishing(broker, 60, crowd.done)
        for _ in range(6):
            crowd.some_more(40)
            crowd.kill(crowd.someone_at_work())
            crowd.start()
        published.join(60)
        expected = dict.fromkeys(KEYS, 60)
        eventually(
            lambda: crowd.done() == sum(expected.values()),
            "everything is handled",
            lambda: f"{crowd.done()} are",
            120.0,
        )
        crowd.records.check(expected, crowd.gone)


@pytest.mark.long
def test_a_worker_stands_still_for_longer_than_its_heartbeat(rabbit_url: str, tmp_path: Path):
    """Its queues are given to another; when it goes on, what it does is refused, or a repeat."""
    url = f"{rabbit_url}&heartbeat=2"
    with rides_at(rabbit_url) as broker, Crowd(url, tmp_path / "records", 0.01) as crowd:
        crowd.start(2)
        eventually(crowd.are_in_line, "both stand in line")
        published = publishing(broker, 40, crowd.done)
        crowd.some_more(50)
        still = crowd.someone_at_work()
        crowd.stop(still)
        crowd.some_more(150)
        still.send_signal(18)  # SIGCONT
        published.join(60)
        expected = dict.fromkeys(KEYS, 40)
        eventually(lambda: crowd.done() == 40 * len(KEYS), "everything is handled", timeout_s=90.0)
        crowd.records.check(expected, crowd.gone)


def publishing(
    broker: RabbitMQBroker, count: int, done: Callable[[], int] = lambda: 1 << 30
) -> threading.Thread:
    """So many of each key, in turns, on a thread, and not far ahead of what is done."""

    def run() -> None:
        for number in range(count):
            while done() < (number - 8) * len(KEYS):
                _never.wait(0.01)
            messages = [
                RIDES.message(f"{key}:{number}", source="t", id=f"{key}:{number}", key=key)
                for key in KEYS
            ]
            sent = partial(is_published, broker, *messages)
            eventually(sent, "they are confirmed", timeout_s=120.0)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_partitions_are_shared_out_among_processes(process: Callable[[], RabbitMQBroker]):
    """The first is given all of them; it hands over its share, in order, and nobody is suspect."""
    one, two = process(), process()
    lanes = [board(one)]
    # More than is with the first at once: nobody may be given what stands behind that.
    count = 2 * AHEAD * PARTITIONS // len(KEYS)
    publishing(one, count).join(60)
    early = claimed(lanes[0], limit=4)
    lanes.append(board(two))
    assert list(lanes[1].claim(10, A_LOT, 0.1)) == []
    one.look()
    # What is held stays where it is until it is settled.
    (intake,) = one._ordered()
    intake.hand_over(one)
    assert list(lanes[0].extend([delivery.receipt for delivery in early], 30.0)) == []
    handled = bodies(early)
    lanes[0].settle([Done(delivery.receipt) for delivery in early])
    intake.hand_over(one)
    by: list[set[str]] = [set(), set()]

    def some() -> bool:
        for number, lane in enumerate(lanes):
            deliveries = lane.claim(20, A_LOT, 0.05)
            assert not any(delivery.alone or delivery.attempt > 1 for delivery in deliveries)
            handled.extend(bodies(deliveries))
            by[number] |= {delivery.message.key or "" for delivery in deliveries}
            lane.settle([Done(delivery.receipt) for delivery in deliveries])
        return len(set(handled)) == count * len(KEYS)

    eventually(some, "all is handled", lambda: f"{len(handled)} are", 60.0)
    assert in_order(handled)
    assert all(by), "both have worked"
    assert len(handled) == len(set(handled))


# --- the server


@pytest.fixture
def node_url(rabbit_node: RabbitMQNode, request: pytest.FixtureRequest) -> str:
    rabbit_node.start_again()  # a test that failed may have left it dead
    return in_namespace(named_after(request.node.name), rabbit_node.url)


@pytest.mark.parametrize("how", ["kill", "stop"])
@pytest.mark.long
def test_order_outlives_the_server(rabbit_node: RabbitMQNode, node_url: str, how: str):
    with rides_at(node_url) as broker:
        lanes = [board(broker), board(broker)]
        names = names_at(node_url)
        for number in range(PARTITIONS):
            queue = names.partition(RIDES.name, "board", number)
            eventually(partial(rabbit_node.remembers, queue), "the queues are on disk")
        published = publishing(broker, 30)
        handled = drained(*lanes, count=60)
        held = lanes[0].claim(5, A_LOT, 5.0)
        getattr(rabbit_node, how)()
        rabbit_node.start()
        handled = drained(*lanes, count=30 * len(KEYS), into=handled)
        published.join(60)
        stale = [delivery.receipt for delivery in held]
        assert list(lanes[0].settle([Done(receipt) for receipt in stale])) == stale
        assert set(handled) == {f"{key}:{n}" for key in KEYS for n in range(30)}
        assert in_order(handled)


def test_a_cut_link_changes_no_order(rabbit_node: RabbitMQNode, node_url: str):
    with Proxy(rabbit_node.port) as proxy, rides_at(proxy.url(node_url)) as broker:
        lane = board(broker)
        for number in range(4):
            for key in KEYS:
                publish(broker, key, number)
        held = claimed(lane, limit=10)
        broker.link.cut()
        receipts = [delivery.receipt for delivery in held]
        eventually(lambda: list(lane.extend(receipts, 30.0)) == receipts, "the claims are lost")
        assert list(lane.settle([Done(receipt) for receipt in receipts])) == receipts
        again = claimed(lane)
        assert {(delivery.attempt, delivery.alone) for delivery in again} <= {(1, True), (1, False)}
        lane.settle([Done(delivery.receipt) for delivery in again])
        handled = drained(lane, count=4 * len(KEYS), into=bodies(again))
        assert in_order(handled)


def test_what_was_not_handed_out_before_the_link_was_cut_is_not_suspect(
    process: Callable[[], RabbitMQBroker],
):
    """The server counts both, and this process knows better."""
    broker = process()
    publish(broker, "a", 0)
    publish(broker, "k", *range(4))
    lane = board(broker)
    held = claimed(lane, limit=1)
    broker.link.cut()
    receipts = [delivery.receipt for delivery in held]
    eventually(lambda: list(lane.extend(receipts, 30.0)) == receipts, "the claims are lost")
    seen: dict[str, bool] = {}

    def some() -> bool:
        deliveries = lane.claim(10, A_LOT, 0.2)
        seen.update({bodies([delivery])[0]: delivery.alone for delivery in deliveries})
        lane.settle([Done(delivery.receipt) for delivery in deliveries])
        return len(seen) == 5

    eventually(some, "all come", lambda: str(seen))
    assert [body for body, alone in seen.items() if alone] == bodies(held)


def test_one_suspect_at_a_time_until_it_has_run_for_a_while(rabbit_url: str):
    now = [1000.0]
    with rides_at(rabbit_url, clock=lambda: now[0]) as broker:
        for key in KEYS:
            publish(broker, key, 0)
        one, two = board(broker), board(broker)
        assert len(claimed(one)) == len(KEYS)
        now[0] += 31.0  # their leases are over
        [first] = claimed(one)
        assert first.alone
        assert list(two.claim(10, A_LOT, 0.1)) == []
        now[0] += 1.5
        [second] = claimed(two)
        assert second.alone


def test_a_queue_that_is_deleted_is_made_again(rabbit_url: str):
    """Its consumer is cancelled by the server. What was in it is gone, as its operator wanted."""
    with rides_at(rabbit_url) as broker:
        lane = board(broker)
        publish(broker, "k", 0)
        assert drained(lane, count=1) == ["k:0"]
        number = partition_of(RIDES.message("x", source="t", key="k"), PARTITIONS)
        with channel(rabbit_url) as operator:
            operator.queue_delete(names_at(rabbit_url).partition(RIDES.name, "board", number))
        publish(broker, "k", 1, 2, 3)
        handled = drained(lane, count=3)
        assert list(dict.fromkeys(handled)) == ["k:1", "k:2", "k:3"]


def stop_on_link(broker: RabbitMQBroker, partition: Partition) -> None:
    broker.link.call(lambda _: partition.stop())


def test_a_consumer_that_the_server_does_not_see_stands_in_line_again(rabbit_url: str):
    with rides_at(rabbit_url) as broker:
        lane = board(broker)
        publish(broker, "k", 0)
        assert drained(lane, count=1) == ["k:0"]
        keys = {
            partition_of(RIDES.message("x", source="t", key=key), PARTITIONS): key for key in KEYS
        }
        assert len(keys) == PARTITIONS
        stop_on_link(broker, lane.intake.partitions[0])
        broker.look()
        for key in keys.values():
            publish(broker, key, 1)
        assert set(drained(lane, count=PARTITIONS)) == {f"{key}:1" for key in keys.values()}


@pytest.mark.parametrize("how", ["deleted", "cancelled"])
def test_what_is_held_of_other_partitions_stays_held_while_all_lanes_are_busy(
    rabbit_url: str, how: str
):
    """Nobody claims meanwhile, and the broker itself looks whether each queue is consumed."""
    with rides_at(rabbit_url) as broker:
        lane = board(broker, lease_s=600.0)
        publish(broker, "k", 0)
        [held] = claimed(lane)
        [entry] = lane.intake.held.values()
        gone = next(each for each in lane.intake.partitions if each is not entry.partition)
        before = gone.generation
        if how == "deleted":
            with channel(rabbit_url) as operator:
                operator.queue_delete(gone.queue)
        else:
            stop_on_link(broker, gone)

        def mended() -> bool:
            broker.look()
            assert list(lane.extend([held.receipt], 600.0)) == []
            is_new = gone.generation > before and not gone.is_out
            return is_new and bool(broker.link.call(lane.intake.is_consumed))

        eventually(mended, "each queue is consumed again")
        assert list(lane.settle([Done(held.receipt)])) == []


def test_what_is_held_of_a_queue_that_is_deleted_is_told_as_lost(rabbit_url: str):
    with rides_at(rabbit_url) as broker:
        lane = board(broker, lease_s=600.0)
        publish(broker, "k", 0)
        [held] = claimed(lane)
        [entry] = lane.intake.held.values()
        with channel(rabbit_url) as operator:
            operator.queue_delete(entry.partition.queue)

        def told() -> bool:
            broker.look()
            return list(lane.extend([held.receipt], 600.0)) == [held.receipt]

        eventually(told, "the claim is lost")
        assert list(lane.settle([Done(held.receipt)])) == [held.receipt]
        publish(broker, "k", 1)
        assert drained(lane, count=1) == ["k:1"]


# --- other consumers, other programs


def test_without_order_a_subscription_has_one_queue(process: Callable[[], RabbitMQBroker]):
    broker = process()
    broker.prepare([RIDES], "notify", SubscribeOptions(Guarantee.AT_LEAST_ONCE))
    for number in range(3):
        for key in KEYS:
            publish(broker, key, number)
    lane = broker.subscribe([RIDES], "notify", SubscribeOptions(Guarantee.AT_LEAST_ONCE))
    assert isinstance(lane, Lane)
    got: set[str] = set()
    while len(got) < 3 * len(KEYS):
        deliveries = lane.claim(50, A_LOT, 5.0)
        assert deliveries
        got |= set(bodies(deliveries))
        lane.settle([Done(delivery.receipt) for delivery in deliveries])
    assert in_order(drained(board(broker), count=3 * len(KEYS)))


@pytest.mark.parametrize("first", [True, False])
def test_whether_in_order_is_fixed(process: Callable[[], RabbitMQBroker], first: bool):
    broker = process()
    here = SubscribeOptions(Guarantee.AT_LEAST_ONCE, order_by_key=first)
    options = SubscribeOptions(Guarantee.AT_LEAST_ONCE, order_by_key=not first)
    broker.prepare([RIDES], "mail", here)
    with pytest.raises(ConfigurationError, match=f"there with order_by_key={first}"):
        broker.prepare([RIDES], "mail", options)
    with pytest.raises(ConfigurationError, match="new name"):
        broker.subscribe([RIDES], "mail", options)


def test_how_many_partitions_is_fixed(process: Callable[[], RabbitMQBroker]):
    broker = process()
    for partitions in (0, 8):
        other: Topic[str] = Topic(RIDES.name, str, guarantee="at-least-once", partitions=partitions)
        with pytest.raises(ConfigurationError, match=f"there with partitions={PARTITIONS}"):
            broker.declare([other])


def send(url: str, key: str, body: bytes, **properties: Any) -> None:
    """Publish to the topic's exchange, as a program without duly does."""
    with channel(url) as stranger:
        exchange = names_at(url).topic(RIDES.name)
        stranger.basic_publish(content(body, properties), exchange, key)


def test_a_stranger_finds_the_partition_of_a_key(rabbit_url: str):
    """As the page says, with nothing but zlib: what it sends stands behind what duly sent."""
    from zlib import crc32

    with rides_at(rabbit_url) as broker:
        lane = board(broker)
        publish(broker, "r-7", 0)
        headers = {"cloudEvents:partitionkey": "r-7"}
        partition = str(crc32(b"r-7") % PARTITIONS)
        send(rabbit_url, partition, b"r-7:1", message_id="one", application_headers=headers)
        publish(broker, "r-7", 2)
        handled: list[str] = []
        while len(handled) < 3:
            got = claimed(lane)
            handled += bodies(got)
            lane.settle([Done(delivery.receipt) for delivery in got])
        assert handled == ["r-7:0", "r-7:1", "r-7:2"]


@pytest.mark.parametrize("key", ["", "r-7", "99", "-1"])
def test_what_names_no_partition_goes_to_the_first(rabbit_url: str, key: str):
    with rides_at(rabbit_url) as broker:
        lane = board(broker)
        broker.prepare([RIDES], "notify", SubscribeOptions(Guarantee.AT_LEAST_ONCE))
        for number in range(3):
            send(rabbit_url, key, f"x:{number}".encode(), message_id=str(number))
        assert in_order(drained(lane, count=3))
        other = broker.subscribe([RIDES], "notify", SubscribeOptions(Guarantee.AT_LEAST_ONCE))
        assert len(other.claim(10, A_LOT, 10.0) or other.claim(10, A_LOT, 10.0)) >= 1


def test_what_cannot_be_read_holds_up_nothing(rabbit_url: str):
    with rides_at(rabbit_url) as broker:
        lane = board(broker)
        send(rabbit_url, "0", b"who am I")
        publish(broker, "k", 0)
        assert drained(lane, count=1) == ["k:0"]
        letters: list[DeadLetter] = []

        def comes() -> bool:
            lane.claim(10, A_LOT, 0.0)
            letters.extend(broker.graveyard.select(Selection(), 10))
            return bool(letters)

        eventually(comes, "it is a dead letter")
        assert "without identity" in letters[-1].error


def test_what_cannot_be_read_is_given_up_on_by_its_channel_alone(rabbit_url: str):
    """A tag is another message's after the connection was lost."""
    with rides_at(rabbit_url) as broker:
        lane = board(broker)
        send(rabbit_url, "0", b"who am I")
        [partition] = [each for each in lane.intake.partitions if each.number == 0]
        move = broker.move
        lost: list[bool] = []

        def then_lost(moves: Any) -> None:
            move(moves)
            if any(each.error for each in moves) and not lost:
                lost.append(True)
                broker.link.call(partial(lane.intake.rejoin, partitions=[partition]))
                eventually(lambda: bool(partition.entries), "it comes again")

        broker.move = then_lost  # type: ignore[method-assign]
        eventually(lambda: not lane.claim(10, A_LOT, 0.0) and bool(lost), "it is given up on")
        eventually(
            lambda: not lane.claim(10, A_LOT, 0.1) and not len(partition._tags), "and settled"
        )


def test_nobody_listens_is_told_here_too(rabbit_url: str):
    broker = RabbitMQBroker(rabbit_url)
    try:
        broker.declare([RIDES])
        [outcome] = broker.publish([RIDES.message("x", source="t", key="k")])
        assert not isinstance(outcome, Published)
        assert "no subscription takes it" in str(outcome)
    finally:
        broker.close()

"""At-most-once, strictly: whatever dies, no message is handed out a second time."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import duly
from duly.broker import Delivery, Published, SubscribeOptions, Subscription
from duly.brokers.rabbitmq import RabbitMQBroker
from duly.brokers.rabbitmq.once import OnceLane
from duly.errors import BrokerError, ConfigurationError
from duly.guarantees import Done, Guarantee
from duly.inspection import Selection
from duly.message import Topic
from tests.postgres.proxy import Proxy
from tests.rabbitmq.test_app import running
from tests.rabbitmq.test_topology import names, send
from tests.rabbitmq.work import A_LOT, ORDERS, bodies
from tests.servers.postgres import named_after
from tests.servers.rabbitmq import RabbitMQNode, channel, in_namespace
from tests.waiting import eventually

READINGS: Topic[int] = Topic("readings", int, guarantee="at-least-once")
ONCE = SubscribeOptions(Guarantee.AT_MOST_ONCE)


def opened(url: str) -> tuple[RabbitMQBroker, OnceLane]:
    broker = RabbitMQBroker(url)
    broker.declare([READINGS])
    lane = broker.subscribe([READINGS], "alarm", ONCE)
    assert isinstance(lane, OnceLane)
    return broker, lane


def publish(broker: RabbitMQBroker, numbers: Sequence[int]) -> None:
    messages = [READINGS.message(n, source="tests", id=str(n)) for n in numbers]
    assert {type(outcome) for outcome in broker.publish(messages)} <= {Published}


def came(lane: Subscription, count: int, limit: int = 100) -> list[Delivery]:
    got: list[Delivery] = []

    def all_came() -> bool:
        got.extend(lane.claim(limit, A_LOT, 0.2))
        return len(got) >= count

    eventually(all_came, f"{count} messages come")
    return got


def test_a_claim_takes_what_it_asks_for_and_no_more(rabbit_url: str):
    broker, lane = opened(rabbit_url)
    try:
        publish(broker, range(250))
        assert len(lane.claim(100, A_LOT, 5.0)) == 100
        with channel(rabbit_url) as stranger:
            queue = names(rabbit_url).queue("readings", "alarm")
            told = stranger.queue_declare(queue, passive=True)
        assert (told.message_count, told.consumer_count) == (150, 0)
        assert sorted(bodies(came(lane, 150)), key=int) == [str(n) for n in range(100, 250)]
    finally:
        broker.close()


def test_of_large_ones_it_takes_no_more_than_bytes_allow(rabbit_url: str):
    """What it has taken is lost with it."""
    large: Topic[bytes] = Topic("large", bytes, guarantee="at-least-once")
    broker = RabbitMQBroker(rabbit_url)
    try:
        broker.declare([large])
        lane = broker.subscribe([large], "alarm", ONCE)
        body = bytes(1024 * 1024)
        broker.publish([large.message(body, source="tests", id=f"{n}") for n in range(40)])
        assert len(lane.claim(40, 2 * len(body), 5.0)) == 2
        [state] = broker.queued()
        assert state.backlog >= 40 - 16
        assert len(came(lane, 38)) == 38
    finally:
        broker.close()


def test_each_process_that_works_it_is_seen_once(rabbit_url: str):
    """However many lanes it has, also after its connection was lost; and not when it has ended."""
    broker, lane = opened(rabbit_url)
    other, _ = opened(rabbit_url)
    lanes = [lane, *(broker.subscribe([READINGS], "alarm", ONCE) for _ in range(2))]

    def workers() -> int | None:
        [state] = other.queued()
        return state.workers

    try:
        assert workers() == 2
        broker.link.cut()
        eventually(lambda: workers() == 1, "the connection is lost")
        eventually(lambda: workers() == 2, "it is there again")
        for each in lanes[:-1]:
            each.close()
        assert workers() == 2
        lanes[-1].close()
        eventually(lambda: workers() == 1, "it works no more")
        assert broker.subscribe([READINGS], "alarm", ONCE).claim(1, A_LOT, 0.0) == ()
        eventually(lambda: workers() == 2, "it works again")
    finally:
        other.close()
        broker.close()


def test_a_waiting_claim_is_given_what_comes(rabbit_url: str):
    broker, lane = opened(rabbit_url)
    other = RabbitMQBroker(rabbit_url)
    try:
        other.declare([READINGS])
        assert list(lane.claim(10, A_LOT, 0.1)) == []
        publish(other, [1])
        assert bodies(lane.claim(10, A_LOT, 20.0)) == ["1"]
    finally:
        other.close()
        broker.close()


def test_it_is_another_queue_than_that_of_other_guarantees(rabbit_url: str):
    broker = RabbitMQBroker(rabbit_url)
    try:
        broker.declare([READINGS])
        broker.prepare([READINGS], "alarm", SubscribeOptions(Guarantee.AT_LEAST_ONCE))
        with pytest.raises(ConfigurationError, match=r"duly|durable|x-queue-type"):
            broker.subscribe([READINGS], "alarm", ONCE)
    finally:
        broker.close()


def test_what_has_no_identity_is_a_dead_letter_here_too(rabbit_url: str):
    broker = RabbitMQBroker(rabbit_url)
    try:
        broker.declare([ORDERS])
        lane = broker.subscribe([ORDERS], "sub", ONCE)
        send(rabbit_url, b"who am I")
        send(rabbit_url, b"a", message_id="a")
        assert bodies(came(lane, 1)) == ["a"]
        [letter] = broker.graveyard.select(Selection(), 100)
        assert "without identity" in letter.error
    finally:
        broker.close()


def test_a_queue_that_is_deleted_is_made_again(rabbit_url: str):
    broker, lane = opened(rabbit_url)
    try:
        with channel(rabbit_url) as operator:
            operator.queue_delete(names(rabbit_url).queue("readings", "alarm"))

        def is_back() -> bool:
            try:
                lane.claim(1, A_LOT, 0.0)
            except BrokerError:
                return False
            return True

        eventually(is_back, "it can be claimed from")
        publish(broker, [1])
        assert bodies(came(lane, 1)) == ["1"]
    finally:
        broker.close()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_connection_cut_at_a_fetch_repeats_nothing(rabbit_node: RabbitMQNode, when: Any):
    rabbit_node.start_again()
    basic_get = b"\x00\x3c\x00\x46"
    with Proxy(rabbit_node.port) as proxy:
        url = in_namespace(named_after(f"cut_{when}"), f"amqp://127.0.0.1:{proxy.port}/")
        broker, lane = opened(url)
        started: list[str] = []

        def some() -> int:
            got = lane.claim(20, A_LOT, 0.3)
            lane.settle([Done(delivery.receipt) for delivery in got])
            started.extend(bodies(got))
            return len(got)

        def ended() -> bool:
            try:
                return some() == 0
            except BrokerError:
                return False

        try:
            publish(broker, range(200))
            for cut in range(1, 6):
                some()
                proxy.cut_at(basic_get, when)
                ended()
                assert proxy.cuts == cut
                eventually(lambda: broker.link.is_up, "it is connected again")
            eventually(ended, "all of it came")
        finally:
            broker.close()
        assert max(Counter(started).values()) == 1
        assert len(started) >= (200 if when == "before" else 100)


@pytest.mark.long
def test_a_server_that_is_killed_brings_nothing_back(rabbit_node: RabbitMQNode):
    rabbit_node.start_again()
    broker, lane = opened(in_namespace(named_after("killed"), rabbit_node.url))
    try:
        publish(broker, range(60))
        before = bodies(came(lane, 20, limit=20))
        rabbit_node.kill()
        rabbit_node.start()

        def is_back() -> bool:
            try:
                publish(broker, [1000])
            except AssertionError:
                return False
            return True

        eventually(is_back, "it publishes again", timeout_s=60)
        after: list[str] = []

        def last_came() -> bool:
            try:
                got = lane.claim(20, A_LOT, 0.2)
            except BrokerError:
                return False
            after.extend(bodies(got))
            return "1000" in after

        eventually(last_came, "what was published last comes", timeout_s=60)
        assert set(before) & set(after) == set()
    finally:
        broker.close()


SHOP = """
import os
import duly

app = duly.App("shop", broker=os.environ["SHOP_BROKER"])
readings = duly.Topic("readings", int, guarantee="at-least-once")


@app.consumer(readings, name="alarm", guarantee="at-most-once", batch=5)
def watch(number: int) -> None:
    with open("started", "a") as file:
        file.write(f"{number}\\n")
"""


@pytest.mark.long
def test_workers_are_killed_and_nothing_starts_twice(
    tmp_path: Path, rabbit_url: str, monkeypatch: pytest.MonkeyPatch
):
    """A death costs at most what the contract says: a batch."""
    (tmp_path / "shop.py").write_text(SHOP)
    monkeypatch.setenv("SHOP_BROKER", rabbit_url)
    scope: dict[str, object] = {}
    exec(SHOP, scope)
    app, readings = scope["app"], scope["readings"]
    assert isinstance(app, duly.App)
    assert isinstance(readings, duly.Topic)
    total, deaths, batch = 3000, 3, 5
    with app:
        app.publish_many(readings, list(range(total)))

    def started() -> list[str]:
        file = tmp_path / "started"
        return file.read_text().split() if file.exists() else []

    def have(enough: int) -> bool:
        return len(started()) >= enough

    with running(tmp_path, rabbit_url) as log:
        for death in range(1, deaths + 1):
            eventually(partial(have, death * 200), "some have started", log.read_text)
            pids = re.findall(r"worker.*?pid (\d+)", log.read_text())
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pids[-1]), signal.SIGKILL)
        eventually(partial(have, total - deaths * batch), "the others too", log.read_text, 90.0)
    assert max(Counter(started()).values()) == 1

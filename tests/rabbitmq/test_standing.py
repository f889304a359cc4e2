"""One topic, queue or message that is wrong takes nothing else of its process along."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from duly.broker import Published, SubscribeOptions
from duly.brokers.rabbitmq.link import content
from duly.brokers.rabbitmq.ordered_lane import OrderedLane
from duly.brokers.rabbitmq.topology import Names, count
from duly.errors import BrokerError, BrokerUnavailable, ConfigurationError, PublishFailed
from duly.guarantees import Done, Guarantee, Retry
from duly.inspection import Selection
from duly.message import Topic
from tests.rabbitmq.work import (
    A_LOT,
    OPTIONS,
    ORDERS,
    awaited,
    bodies,
    broker_at,
    lane_of,
    message,
    publish,
)
from tests.servers.postgres import named_after
from tests.servers.rabbitmq import RabbitMQNode, channel, in_namespace
from tests.waiting import eventually

# On a server, and some of it waits.
pytestmark = pytest.mark.long

WELL: Topic[str] = Topic("well", str, guarantee="at-least-once")
LINES: Topic[str] = Topic("lines", str, guarantee="at-least-once", partitions=2)
IN_ORDER = SubscribeOptions(Guarantee.AT_LEAST_ONCE, order_by_key=True)


@pytest.fixture
def names(request: pytest.FixtureRequest) -> Names:
    return Names(named_after(request.node.name))


@pytest.fixture
def url(rabbit_node: RabbitMQNode, names: Names) -> str:
    return in_namespace(names.namespace, rabbit_node.url)


# --- what somebody else made


@pytest.mark.parametrize("what", ["queue", "exchange"])
def test_what_somebody_else_made_is_its_own_topics_matter(url: str, names: Names, what: str):
    with broker_at(url, deadline_s=5.0) as broker:
        broker.declare([WELL])
        broker.prepare([WELL], "well", OPTIONS)
        lane, well = lane_of(broker), broker.subscribe([WELL], "well", OPTIONS)
        publish(broker, "before")
        assert bodies(awaited(lane)) == ["before"]
        queue, exchange = names.queue(ORDERS.name, "sub"), names.topic(ORDERS.name)
        with channel(url) as operator:
            if what == "queue":
                operator.queue_delete(queue)
                operator.queue_declare(queue, durable=True, auto_delete=False)
            else:
                operator.exchange_delete(exchange)
                operator.exchange_declare(exchange, "topic", durable=True, auto_delete=False)
        broker.link.cut()
        broker._publisher.link.cut()

        def goes_on() -> bool:
            id = str(time.monotonic())
            return isinstance(broker.publish([WELL.message("x", source="t", id=id)])[0], Published)

        eventually(goes_on, "the other topic is published to")
        eventually(lambda: well.claim(10, A_LOT, 0.5), "and worked")
        [outcome] = broker.publish([message("refused", id="refused")])
        assert isinstance(outcome, PublishFailed)
        wrong = queue if what == "queue" else exchange
        assert f"the {what} {wrong!r} cannot be declared" in str(outcome)

        # And when that is mended, without a restart.
        with channel(url) as operator:
            if what == "queue":
                operator.queue_delete(queue)
            else:
                operator.exchange_delete(exchange)
        eventually(
            lambda: isinstance(broker.publish([message("mended", id="mended")])[0], Published),
            "it is made as it was",
        )
        came: list[str] = []

        def comes() -> bool:
            try:
                came.extend(bodies(lane.claim(10, A_LOT, 0.5)))
            except (BrokerError, ConfigurationError):
                return False
            return "mended" in came

        eventually(comes, "it is worked again")


def test_without_a_connection_its_reason_is_told(rabbit_node: RabbitMQNode):
    with RabbitMQNode() as node, broker_at(node.url, deadline_s=1.0) as broker:
        node.kill()
        eventually(lambda: not broker._publisher.link.is_up, "it is lost")
        [outcome] = broker.publish([message("a", id="a")])
        assert "there is no connection (the last one was lost: " in str(outcome)


# --- headers that nearly fill a frame


def test_what_cannot_be_published_again_is_a_dead_letter(url: str, names: Names):
    """Its headers have room in a frame, and what a retry adds to them has not."""
    with broker_at(url, deadline_s=5.0) as broker:
        lane = lane_of(broker)
        with channel(url) as stranger:
            headers = {"trace": "x" * (stranger.connection.frame_max - 100)}
            properties = {"message_id": "big", "application_headers": headers}
            stranger.basic_publish(content(b"big", properties), names.topic(ORDERS.name), "")
        publish(broker, "small")
        claimed = awaited(lane, 2)
        connection = broker._publisher.link._connection
        assert list(lane.settle([Retry(each.receipt, 0.1, "fails") for each in claimed])) == []
        [letter] = broker.graveyard.select(Selection(), 10)
        assert (letter.message.id, letter.attempts) == ("big", 1)
        assert "its headers leave no room in a frame" in letter.error
        assert bodies(awaited(lane)) == ["small"]
        assert broker._publisher.link._connection is connection, "who publishes was cut off"


# --- one that does not answer


def _stuck(*_: Any) -> Any:
    raise BrokerUnavailable("the queue does not answer")


def test_one_that_cannot_be_looked_at_keeps_nobody_from_the_others(
    url: str, monkeypatch: pytest.MonkeyPatch
):
    with broker_at(url) as broker:
        lane = lane_of(broker)
        lane.claim(1, A_LOT, 0.1)
        broker.declare([LINES, WELL])
        ordered = broker.subscribe([LINES], "lines", IN_ORDER)
        assert isinstance(ordered, OrderedLane)
        well = broker.subscribe([WELL], "well", OPTIONS)
        looked: list[str] = []
        monkeypatch.setattr(lane.intake, "is_consumed", _stuck)
        monkeypatch.setattr(lane, "reap", _stuck)
        monkeypatch.setattr(lane, "put_back", _stuck)
        monkeypatch.setattr(ordered.intake, "balance", lambda _: looked.append("balanced"))
        monkeypatch.setattr(ordered.intake, "hand_over", lambda _: looked.append("handed over"))
        monkeypatch.setattr(well, "reap", lambda: looked.append("reaped"))
        broker.look()
        eventually(lambda: {"balanced", "handed over", "reaped"} <= set(looked), "all are")


def test_one_stuck_queue_of_dead_letters_keeps_no_other(url: str, monkeypatch: pytest.MonkeyPatch):
    with broker_at(url) as broker:
        carried: list[str] = []

        def carry(topic: str, subscription: str) -> int:
            if topic == "stuck":
                _stuck()
            carried.append(subscription)
            return 3

        monkeypatch.setattr(broker._burial, "_carry", carry)
        with pytest.raises(BrokerUnavailable, match="does not answer"):
            broker._burial.carry([("stuck", "a"), ("well", "b"), ("stuck", "c"), ("well", "d")])
        assert carried == ["b", "d"]


def test_who_cannot_be_counted_is_unknown_and_all_else_is_told(
    url: str, names: Names, monkeypatch: pytest.MonkeyPatch
):
    """As on a cluster while the node of the queue that counts them is down."""

    def count_or_not(connection: Any, queues: Any) -> Any:
        return (
            _stuck() if names.present(ORDERS.name, "sub") in queues else count(connection, queues)
        )

    monkeypatch.setattr("duly.brokers.rabbitmq.health.count", count_or_not)
    with broker_at(url) as broker:
        publish(broker, "a")
        eventually(lambda: broker.queued()[0].backlog == 1, "it waits")
        assert broker.queued()[0].workers is None
        found = {finding.what: finding for finding in broker.examine()}
        assert found["consumer sub"].level == "warning"
        assert "cannot be seen" in found["consumer sub"].found
        assert {"RabbitMQ", "publishing", "clock"} <= set(found)


# --- more partitions than channels


def test_more_partitions_than_channels_are_refused():
    with RabbitMQNode("channel_max = 16") as node, broker_at(node.url) as broker:
        many: Topic[str] = Topic("many", str, guarantee="at-least-once", partitions=20)
        some: Topic[str] = Topic("some", str, guarantee="at-least-once", partitions=4)
        broker.declare([many, some])
        with pytest.raises(ConfigurationError, match=r"20 partitions.*channel_max"):
            broker.subscribe([many], "many", IN_ORDER)
        # It is the consumers of the process together that count; those before it go on.
        lane = broker.subscribe([some], "one", IN_ORDER)
        with pytest.raises(ConfigurationError, match="the other consumers of this process take 5"):
            broker.subscribe([some], "two", IN_ORDER)
        broker.publish([some.message("a", source="t", id="a", key="k")])
        [held] = awaited(lane)
        assert list(lane.settle([Done(held.receipt)])) == []


# --- a delay's queue that is gone


def test_a_delays_queue_that_is_deleted_is_made_again(url: str, names: Names):
    """Until somebody looks, what names it comes at once; then it waits again."""
    with broker_at(url) as broker:
        lane = lane_of(broker)
        for body in ("makes it", "waits"):
            publish(broker, body)
            [held] = awaited(lane)
            lane.settle([Retry(held.receipt, 4.096, "later")])
            began = time.monotonic()
            if body == "makes it":
                with channel(url) as operator:
                    operator.queue_delete(names.delay(4096))
                broker.look()
        assert bodies(awaited(lane)) == ["waits"]
        assert time.monotonic() - began >= 4.0


# --- a line that is slow, and healthy


class SlowLine:
    """Passes so many bytes a second on to a port, in either direction."""

    def __init__(self, port: int, bytes_per_s: float) -> None:
        self._port = port
        self._rate = bytes_per_s
        self._closed = threading.Event()
        self._listening = socket.create_server(("127.0.0.1", 0))
        # Of those that it accepts: or the system would take megabytes at once.
        self._listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        self.port: int = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._port))
            for way in ((client, server), (server, client)):
                threading.Thread(target=self._pass, args=way, daemon=True).start()

    def _pass(self, one: socket.socket, other: socket.socket) -> None:
        try:
            while not self._closed.is_set() and (some := one.recv(65_536)):
                other.sendall(some)
                self._closed.wait(len(some) / self._rate)
        except OSError:
            pass
        finally:
            one.close()
            other.close()

    def close(self) -> None:
        self._closed.set()
        self._listening.close()


@pytest.fixture
def slow(rabbit_node: RabbitMQNode) -> Iterator[SlowLine]:
    line = SlowLine(rabbit_node.port, 1.5 * 2**20)
    yield line
    line.close()


def test_a_line_that_is_slow_is_no_hang(
    rabbit_node: RabbitMQNode, url: str, slow: SlowLine, caplog: pytest.LogCaptureFixture
):
    """A message takes longer to leave than two heartbeats."""
    large: Topic[str] = Topic("large", str, guarantee="at-least-once", max_body_bytes=2**26)
    through = url.replace(f":{rabbit_node.port}", f":{slow.port}") + "&heartbeat=2"
    with broker_at(through, deadline_s=60.0) as broker:
        broker.declare([large])
        broker.prepare([large], "large", OPTIONS)
        began = time.monotonic()
        [outcome] = broker.publish([large.message("x" * (20 * 2**20), source="t", id="large")])
        took_s = time.monotonic() - began
        assert isinstance(outcome, Published), str(outcome)
        assert took_s > 8, "the line is not slow"
        assert "hangs" not in caplog.text


def test_nor_is_one_by_which_a_message_comes_slowly(
    rabbit_node: RabbitMQNode, url: str, slow: SlowLine, caplog: pytest.LogCaptureFixture
):
    """Who asks something of the server meanwhile is answered behind it."""
    large: Topic[str] = Topic("large", str, guarantee="at-least-once", max_body_bytes=2**26)
    through = url.replace(f":{rabbit_node.port}", f":{slow.port}") + "&heartbeat=2"
    with broker_at(url) as fast, broker_at(through) as broker:
        for each in (fast, broker):
            each.declare([large])
            each.prepare([large], "large", OPTIONS)
        lane = broker.subscribe([large], "large", OPTIONS)
        assert lane.claim(1, A_LOT, 0.1) == ()
        fast.publish([large.message("x" * (20 * 2**20), source="t", id="large")])
        claimed: list[Any] = []

        def comes() -> bool:
            assert [each.subscription for each in broker.queued()] == ["large", "sub"]
            claimed.extend(lane.claim(1, A_LOT, 0.1))
            return bool(claimed)

        eventually(comes, "it comes", timeout_s=60.0)
        assert list(lane.settle([Done(claimed[0].receipt)])) == []
        assert "hangs" not in caplog.text

"""What the contract knows of the server: its version, its policies, how long it lets one hold."""

from __future__ import annotations

import base64
import http.client
import json
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import pytest

import duly
from duly.broker import Published
from duly.brokers.rabbitmq import RabbitMQBroker
from duly.brokers.rabbitmq.survey import version_of
from duly.brokers.rabbitmq.topology import Names
from duly.contract import Contract, contract_on, render
from duly.errors import BrokerUnusable, ConfigurationError, ContractRefused
from duly.inspection.survey import Survey
from tests.rabbitmq.work import ORDERS, broker_at, lane_of, message, publish, work_off
from tests.servers.postgres import free_port, named_after
from tests.servers.rabbitmq import RabbitMQNode, channel, in_namespace
from tests.waiting import eventually

# On servers of its own, and minutes in all.
pytestmark = pytest.mark.long

READINGS: duly.Topic[float] = duly.Topic("readings", float, guarantee="at-most-once")


@pytest.fixture(scope="module")
def node() -> Iterator[RabbitMQNode]:
    with RabbitMQNode(managed=True) as node:
        yield node


@pytest.fixture
def namespace(request: pytest.FixtureRequest) -> str:
    return named_after(request.node.name)


@pytest.fixture
def url(node: RabbitMQNode, namespace: str) -> str:
    return f"{in_namespace(namespace, node.url)}&management={node.management_port}"


def ask(node: RabbitMQNode, method: str, path: str, **body: Any) -> None:
    """Tell the management interface something: rabbitmqctl takes a second."""
    assert node.management_port is not None
    connection = http.client.HTTPConnection("127.0.0.1", node.management_port, timeout=30)
    login = base64.b64encode(b"guest:guest").decode()
    headers = {"Authorization": f"Basic {login}", "Content-Type": "application/json"}
    connection.request(method, f"/api/{path}", json.dumps(body) if body else None, headers)
    response = connection.getresponse()
    told = response.read()
    connection.close()
    assert response.status < 300, told


@contextmanager
def policy(
    node: RabbitMQNode,
    pattern: str,
    definition: Mapping[str, Any],
    *,
    kind: str = "policies",
    to: str = "queues",
    priority: int = 0,
) -> Iterator[None]:
    """A policy on what a pattern finds."""
    path = f"{kind}/%2F/{quote(f'p-{priority}', safe='')}"
    said = {"pattern": pattern, "definition": definition, "apply-to": to, "priority": priority}
    ask(node, "PUT", path, **said)
    try:
        yield
    finally:
        ask(node, "DELETE", path)


def contract(url: str, max_run_s: float = 60.0, topic: Any = ORDERS) -> Contract:
    app = duly.App("shop", broker=url)

    @app.consumer(topic, name="sub", guarantee="at-least-once", max_run_s=max_run_s)
    async def handle(order: str) -> None: ...

    with app:
        broker, store = app.backends()
        return contract_on(broker, store, app.topics, app.consumers)


def text(url: str, **more: Any) -> str:
    return " ".join(render(contract(url, **more)).split())


def survey(broker: RabbitMQBroker) -> Survey:
    return broker.survey([ORDERS], {"sub": [ORDERS.name]})


# --- policies


def test_without_policies_it_says_that_it_looked(url: str, namespace: str):
    found = text(url)
    assert f"policies on {namespace}/ were looked at" in found
    assert "RabbitMQ 3." in found


LOSING: list[tuple[str, dict[str, Any], str]] = [
    ("", {"message-ttl": 60_000}, "what is not handled by then is given up"),
    ("", {"expires": 3_600_000}, "deleted with all that is in it"),
    ("", {"max-length": 10, "overflow": "drop-head"}, "the oldest are dropped"),
    ("", {"overflow": "drop-head"}, "may be lost on its way"),
    ("/alone", {"overflow": "drop-head"}, "may be lost on its way"),
    ("/alone", {"message-ttl": 60_000}, "given up"),
    ("/dead", {"message-ttl": 60_000}, "given up"),
    ("/dead", {"max-length": 10}, "the oldest are dropped"),
    ("/dead", {"max-length-bytes": 1000}, "the oldest are dropped"),
    ("/dead", {"max-length": 10, "overflow": "drop-head"}, "the oldest are dropped"),
    ("/dead", {"delivery-limit": 3}, "dead letters that were looked at so often are dropped"),
]


@pytest.mark.parametrize("there", [True, False], ids=["declared before", "not yet"])
@pytest.mark.parametrize(
    ("queue", "definition", "why"), LOSING, ids=[f"{q}{'+'.join(d)}" for q, d, _ in LOSING]
)
def test_a_policy_that_loses_messages_is_refused(
    node: RabbitMQNode,
    url: str,
    namespace: str,
    queue: str,
    definition: dict[str, Any],
    why: str,
    there: bool,
):
    if there:
        with broker_at(url):
            pass
    with policy(node, f"^{namespace}/orders/sub{queue}$", definition):
        with pytest.raises(ContractRefused, match="consumer 'sub'") as refusal:
            contract(url)
        told = str(refusal.value)
        assert why in told
        assert "the policy 'p-0' sets " in told
        assert (
            f"Remedy: remove it, or let its pattern leave out what begins with '{namespace}/'"
            in told
        )
    assert "looked at" in text(url), "and without it the app starts"


def test_a_policy_goes_before_what_the_queue_was_declared_with(
    node: RabbitMQNode, url: str, namespace: str
):
    """Of ``overflow`` alone: it turns a queue that refuses what is too much into one that drops."""
    dropping, names = {"max-length": 3, "overflow": "drop-head"}, [str(n) for n in range(20)]
    with policy(node, f"^{namespace}/orders/sub$", dropping), broker_at(url) as broker:
        publish(broker, *names)
        left = set(work_off(lane_of(broker), {names[-1]}.issubset))
        assert "0" not in left
        assert "the oldest are dropped" in survey(broker).perils[0].found


def test_an_operators_policy_is_seen(node: RabbitMQNode, url: str, namespace: str):
    with (
        policy(node, f"^{namespace}/", {"expires": 3_600_000}, kind="operator-policies"),
        pytest.raises(ContractRefused, match="sets expires = 3600000"),
    ):
        contract(url)


def test_of_policies_the_strongest_counts(node: RabbitMQNode, url: str, namespace: str):
    """As on the server: one policy for a queue, that of the highest priority."""
    strong = {"max-length": 100_000, "overflow": "reject-publish"}
    with (
        policy(node, f"^{namespace}/", strong, priority=9),
        policy(node, f"^{namespace}/", {"expires": 1000}),
    ):
        assert "'p-9' sets max-length = 100000" in text(url)


def test_a_limit_that_refuses_publishing_is_told_and_loses_nothing(
    node: RabbitMQNode, url: str, namespace: str
):
    """A queue of duly's refuses what is too much."""
    pattern = f"^{namespace}/orders/sub$"
    with policy(node, pattern, {"max-length": 2}), broker_at(url, deadline_s=5.0) as broker:
        confirmed: set[str] = set()

        def refused() -> bool:
            """The server is in no hurry to refuse."""
            batch = [message(one := str(len(confirmed) + n), id=one) for n in range(50)]
            outcomes = list(zip(batch, broker.publish(batch), strict=True))
            confirmed.update(m.id for m, each in outcomes if isinstance(each, Published))
            return not all(isinstance(each, Published) for _, each in outcomes)

        eventually(refused, "publishing is refused")
        assert "max-length = 2" in text(url)
        assert "beyond which publishing is refused" in text(url)
        lane = lane_of(broker)
        assert confirmed <= set(work_off(lane, confirmed.issubset))
        eventually(
            lambda: isinstance(broker.publish([message("then", id="then")])[0], Published),
            "with room again it is taken",
        )


def test_an_alternate_exchange_would_swallow_what_nobody_takes(
    node: RabbitMQNode, url: str, namespace: str
):
    pattern = f"^{namespace}/orders/_due$"
    swallow = {"alternate-exchange": "amq.fanout"}
    refused = pytest.raises(ContractRefused, match=r"topic 'orders'.*\n?.*alternate-exchange")
    with policy(node, pattern, swallow, to="exchanges"), refused:
        contract(url)


def test_what_may_be_lost_anyway_is_not_refused(node: RabbitMQNode, url: str, namespace: str):
    swallow = {"alternate-exchange": "amq.fanout"}
    with policy(node, f"^{namespace}/readings", swallow, to="exchanges"):
        app = duly.App("shop", broker=url)
        with app:
            broker, _ = app.backends()
            assert contract_on(broker, None, [READINGS], []).topics


def test_the_queues_of_delays_too(node: RabbitMQNode, url: str, namespace: str):
    with channel(url) as stranger:
        stranger.queue_declare(
            f"{namespace}/_delay/1024",
            durable=True,
            auto_delete=False,
            arguments={"x-queue-type": "quorum", "x-message-ttl": 1024},
        )
    refused = pytest.raises(ContractRefused, match=r"expires = 5000 on the queue .*_delay/1024")
    with policy(node, f"^{namespace}/_delay/", {"expires": 5000}), refused:
        contract(url)


@pytest.mark.parametrize("limit", [{"max-age": "1h"}, {"max-length-bytes": 1_000_000}])
def test_the_stream_of_dead_letters_too(
    node: RabbitMQNode, url: str, namespace: str, limit: dict[str, Any]
):
    stream = Names(namespace).letters
    with channel(url) as stranger:
        stranger.queue_declare(
            stream, durable=True, auto_delete=False, arguments={"x-queue-type": "stream"}
        )
    refused = pytest.raises(ContractRefused, match="older dead letters are dropped")
    with policy(node, f"^{stream}$", limit), refused:
        contract(url)


def test_a_queue_that_is_no_quorum_queue(url: str, namespace: str):
    """A server may be told not to compare what is declared again."""
    with channel(url) as stranger:
        stranger.queue_declare(f"{namespace}/orders/sub/more", durable=True, auto_delete=False)
    broker = RabbitMQBroker(url)
    try:
        [peril] = survey(broker).perils
    finally:
        broker.close()
    assert "no quorum queue" in peril.found


# --- who may look


@pytest.fixture
def ann(node: RabbitMQNode) -> Iterator[str]:
    """A user who may look at queues, and not at policies."""
    ask(node, "PUT", "users/ann", password="canary-41d8", tags="management")
    ask(node, "PUT", "permissions/%2F/ann", configure=".*", write=".*", read=".*")
    yield "ann:canary-41d8"
    ask(node, "DELETE", "users/ann")


def test_with_fewer_rights_it_sees_what_is_there(
    node: RabbitMQNode, url: str, namespace: str, ann: str
):
    url = url.replace("guest:guest", ann)
    assert "may not look at it" in text(url)
    with (
        policy(node, f"^{namespace}/", {"message-ttl": 60_000}),
        pytest.raises(ContractRefused, match="message-ttl"),
    ):
        contract(url)


def test_another_user_may_look(node: RabbitMQNode, url: str, ann: str):
    place = f"http://{ann}@127.0.0.1:{node.management_port}"
    assert "were looked at" in text(
        url.replace(f"management={node.management_port}", f"management={place}")
    )


def test_a_wrong_password_is_an_error_and_shown_nowhere(
    node: RabbitMQNode, url: str, caplog: pytest.LogCaptureFixture
):
    place = f"http://guest:canary-41d8@127.0.0.1:{node.management_port}/api/"
    wrong = url.replace(f"management={node.management_port}", f"management={place}")
    with pytest.raises(ConfigurationError, match="refuses user 'guest'") as refusal:
        contract(wrong)
    assert "canary-41d8" not in str(refusal.value) + caplog.text


def test_nobody_answers(url: str, node: RabbitMQNode):
    """An interface that is away for a moment is not to keep workers from starting."""
    away = url.replace(f"management={node.management_port}", f"management={free_port()}")
    assert "policies were not looked at: http://127.0.0.1" in text(away)


@pytest.mark.parametrize("answer", [b"HTTP/1.1 200 OK\r\n\r\nhello", b"what?", b""])
def test_something_else_answers(node: RabbitMQNode, url: str, answer: bytes):
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                client, _ = listening.accept()
            except OSError:
                return
            with client:
                client.recv(65536)
                client.sendall(answer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    port = listening.getsockname()[1]
    try:
        other = url.replace(f"management={node.management_port}", f"management={port}")
        assert "policies were not looked at" in text(other)
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join(10)


def test_without_the_option_it_says_what_was_not_looked_at(node: RabbitMQNode, namespace: str):
    found = text(in_namespace(namespace, node.url))
    assert "policies were not looked at" in found
    assert "management=15672" in found


# --- how long a message may be held


def test_a_handler_that_may_run_longer_than_the_server_waits(url: str):
    assert "started again" not in text(url)
    found = text(url, max_run_s=3600.0)
    assert (
        "a handler that runs for over 30 min is started again unless the server was told" in found
    )
    assert "consumer_timeout" in found


def test_who_says_how_the_server_is_configured_is_believed(url: str):
    longer = f"{url}&consumer_timeout=7200000"
    assert "started again" not in text(longer, max_run_s=3600.0)
    with pytest.raises(ContractRefused, match=r"max_run_s=7201.*takes a message back after 2 h"):
        contract(longer, max_run_s=7201.0)


# --- what it is


def test_an_older_server_and_another_product_are_refused():
    able = {"publisher_confirms": True}
    told = {"product": "RabbitMQ", "version": "3.10.8", "capabilities": able}
    assert version_of(told, "here") == (3, 10, 8)
    assert version_of(told | {"version": "4.1.0-rc.2"}, "here") == (4, 1, 0)
    for wrong, why in (
        ({"version": "3.9.29"}, "3.10 or newer"),
        ({"product": "LavinMQ"}, "LavinMQ"),
        ({"capabilities": {}}, "confirms no publishing"),
    ):
        with pytest.raises(BrokerUnusable, match=why):
            version_of(told | wrong, "here")

"""Messages of other programs: what names them, and what becomes of those that nothing names."""

from __future__ import annotations

import contextlib
import re
import sqlite3
from collections.abc import Iterator
from functools import partial
from typing import Any

import amqp
import msgspec
import pytest

import duly
from duly.broker import Delivery
from duly.brokers.rabbitmq import RabbitMQBroker
from duly.brokers.rabbitmq.link import content
from duly.errors import BrokerUnavailable, ContractRefused, InvalidMessage
from duly.guarantees import Dead, Done, Retry
from duly.inspection import DeadLetter, Selection
from duly.message import Topic
from duly.worker.process import Worker
from tests.rabbitmq.test_app import contract
from tests.rabbitmq.test_topology import names
from tests.rabbitmq.work import OPTIONS, awaited, bodies
from tests.servers.rabbitmq import RabbitMQNode, channel, in_namespace
from tests.waiting import eventually


class Order(msgspec.Struct):
    number: str
    cents: int = 0


BY_HEADER: Topic[Order] = Topic(
    "orders", Order, guarantee="at-least-once", dedup_by="x-order-number"
)
BY_PAYLOAD: Topic[Order] = Topic(
    "orders", Order, guarantee="at-least-once", dedup_by=lambda order: order.number
)
PLAIN: Topic[Order] = Topic("orders", Order, guarantee="at-least-once")
ACCEPTING: Topic[Order] = Topic(
    "orders", Order, guarantee="at-least-once", without_identity="accept"
)


def send(url: str, *sent: tuple[bytes, dict[str, Any]]) -> None:
    """Publish these as a program without duly does that wants to be sure. What goes without a
    confirmation to a queue that was made just now a busy server may drop.
    """
    with channel(url) as stranger:
        stranger.confirm_select()
        for body, properties in sent:
            eventually(partial(is_taken, stranger, url, content(body, properties)), "it is taken")


def is_taken(stranger: Any, url: str, message: Any) -> bool:
    """Whether the server has it."""
    try:
        stranger.basic_publish_confirm(message, names(url).topic("orders"), "")
    except amqp.exceptions.MessageNacked:
        return False
    return True


def delivered(url: str, topic: Topic[Order], *sent: tuple[bytes, dict[str, Any]]) -> list[Delivery]:
    """What a consumer of the topic is given of them."""
    broker = RabbitMQBroker(url)
    try:
        broker.declare([topic])
        lane = broker.subscribe([topic], "sub", OPTIONS)
        send(url, *sent, (b'{"number":"last"}', {"message_id": "last", **header("last")}))
        got: list[Delivery] = []

        def last_came() -> bool:
            got.extend(lane.claim(10, 1 << 30, 1.0))
            return any(delivery.message.body == b'{"number":"last"}' for delivery in got)

        eventually(last_came, "the last comes")
        return got[:-1]
    finally:
        broker.close()


def with_headers(**headers: Any) -> dict[str, Any]:
    return {"message_id": "1", "application_headers": headers}


STRANGE: dict[str, dict[str, Any]] = {
    "an id that is no text": {"message_id": b"\xff\xfe"},
    "a source that is no text": {"message_id": "1", "app_id": b"Caf\xe9"},
    "a source that no database keeps": {"message_id": "1", "app_id": "a\0b"},
    "a source that is a number": with_headers(**{"cloudEvents:source": 42}),
    "a source without end": with_headers(**{"cloudEvents:source": "x" * 300}),
    "a source that needs a header": with_headers(**{"cloudEvents:source": "\u00e9" * 200}),
    "the server's count, by somebody else": with_headers(**{"x-delivery-count": "often"}),
    "a header's name that is no text": {
        "message_id": "1",
        "application_headers": {b"\xff": "?", "cloudEvents:source": "s"},
    },
}
BYTES: Topic[bytes] = Topic("orders", bytes, guarantee="at-least-once")


@pytest.fixture
def lane(rabbit_url: str) -> Iterator[Any]:
    broker = RabbitMQBroker(rabbit_url)
    try:
        broker.declare([BYTES])
        yield broker.subscribe([BYTES], "sub", OPTIONS)
    finally:
        broker.close()


@pytest.mark.parametrize("what", STRANGE)
def test_whatever_a_stranger_writes_the_next_message_is_handled(
    rabbit_url: str, lane: Any, what: str
):
    send(rabbit_url, (b"strange", STRANGE[what]), (b"next", {"message_id": "next"}))
    handled: list[str] = []
    letters: list[DeadLetter] = []

    def both_ended() -> bool:
        for each in lane.claim(10, 1 << 30, 0.5):
            handled.extend(bodies([each]))
            lane.settle([Dead(each.receipt, error="enough")])
        letters[:] = lane._broker.graveyard.select(Selection(), 10)
        return len(letters) == 2

    eventually(both_ended, "both are dead letters", lambda: str(handled))
    assert "next" in handled
    assert {letter.message.body for letter in letters} == {b"strange", b"next"}


def test_what_is_claimed_beside_a_message_that_cannot_be_buried_is_handed_out(
    rabbit_url: str, lane: Any, monkeypatch: pytest.MonkeyPatch
):
    """Otherwise nobody holds it until its lease is over."""
    graveyard = lane._broker.graveyard

    def away(_letters: object) -> None:
        raise BrokerUnavailable("the store is away")

    monkeypatch.setattr(graveyard, "bury", away)
    send(rabbit_url, (b"strange", {}), (b"sound", {"message_id": "sound"}))
    got: list[Delivery] = []

    def sound_came() -> bool:
        # As a worker does: a broker that cannot be used is tried again.
        with contextlib.suppress(BrokerUnavailable):
            got.extend(lane.claim(10, 1 << 30, 0.5))
        return bool(got)

    eventually(sound_came, "the sound one is handed out", timeout_s=60.0)
    assert not got[0].alone, "it came when its lease was over"
    assert list(lane.settle([Done(delivery.receipt) for delivery in got])) == []
    monkeypatch.undo()
    assert list(lane.claim(10, 1 << 30, 0.5)) == []
    [letter] = graveyard.select(Selection(), 10)
    assert (bodies(got), letter.message.body) == (["sound"], b"strange")


def test_a_routing_key_that_is_no_text(rabbit_url: str, lane: Any):
    with channel(rabbit_url) as stranger:
        sent = content(b"x", {"message_id": "1"})
        stranger.basic_publish(sent, names(rabbit_url).topic("orders"), b"\xff\xfe")
    assert bodies(awaited(lane)) == ["x"]


def test_a_body_is_as_it_was_sent_whatever_its_encoding(rabbit_url: str, lane: Any):
    latin = {"message_id": "1", "content_encoding": "iso-8859-1"}
    send(rabbit_url, ("\u00e9".encode("iso-8859-1"), latin))
    for _ in range(2):
        [delivery] = awaited(lane)
        assert delivery.message.body == b"\xe9"
        lane.settle([Retry(delivery.receipt, delay_s=0.0, error="again")])


def test_what_another_user_sent_is_moved_like_any(rabbit_node: RabbitMQNode):
    """Who sends says who it is, and no copies of a retry go to where the first was copied."""
    rabbit_node.control("add_user", "alice", "secret")
    rabbit_node.control("set_permissions", "alice", ".*", ".*", ".*")
    url = in_namespace("alices", rabbit_node.url)
    broker = RabbitMQBroker(url, deadline_s=5.0)
    try:
        broker.declare([BYTES])
        lane = broker.subscribe([BYTES], "sub", OPTIONS)
        with channel(f"amqp://alice:secret@127.0.0.1:{rabbit_node.port}") as alice:
            alice.queue_declare("audit", durable=True, auto_delete=False)
            hers = {"user_id": "alice", "expiration": "600000", **with_headers(CC=["audit"])}
            alice.basic_publish(content(b"x", hers), names(url).topic("orders"), "")
            [first] = awaited(lane)
            assert list(lane.settle([Retry(first.receipt, delay_s=0.1, error="again")])) == []
            [again] = awaited(lane)
            assert again.attempt == 2
            assert alice.basic_get("audit") is None
    finally:
        broker.close()


def header(number: Any) -> dict[str, Any]:
    return {"application_headers": {"x-order-number": number}}


def test_a_header_names_them(rabbit_url: str):
    got = delivered(
        rabbit_url,
        BY_HEADER,
        (b"{}", {"message_id": "one attempt", **header("o-1")}),
        (b"{}", {"message_id": "another attempt", **header("o-1")}),
        (b"{}", header(7)),
    )
    assert [delivery.message_id for delivery in got] == ["o-1", "o-1", "7"]


def test_their_payload_names_them(rabbit_url: str):
    got = delivered(
        rabbit_url,
        BY_PAYLOAD,
        (b'{"number":"o-1"}', {"message_id": "one attempt"}),
        (b'{"number":"o-1"}', {}),
    )
    assert [delivery.message_id for delivery in got] == ["o-1", "o-1"]


@pytest.mark.parametrize(
    ("topic", "body", "properties", "why"),
    [
        (BY_HEADER, b"{}", {"message_id": "an id that says nothing"}, "without identity.*x-order"),
        (BY_HEADER, b"{}", header("x" * 300), "an id is a non-empty str"),
        (BY_PAYLOAD, b"no json", {}, "cannot be decoded, so dedup_by names no event"),
        (BY_PAYLOAD, b'{"number":""}', {}, "without identity"),
    ],
)
def test_what_nothing_names_is_a_dead_letter(
    rabbit_url: str, topic: Topic[Order], body: bytes, properties: dict[str, Any], why: str
):
    assert delivered(rabbit_url, topic, (body, properties)) == []
    broker = RabbitMQBroker(rabbit_url)
    try:
        broker.declare([topic])
        [letter] = broker.graveyard.select(Selection(), 100)
    finally:
        broker.close()
    assert letter.message.body == body
    assert re.search(why, letter.error)


def test_what_duly_publishes_has_its_id(rabbit_url: str):
    broker = RabbitMQBroker(rabbit_url)
    try:
        broker.declare([BY_PAYLOAD])
        lane = broker.subscribe([BY_PAYLOAD], "sub", OPTIONS)
        order = Order("o-1")
        broker.publish([BY_PAYLOAD.message(order, source="tests")])
        broker.publish([BY_PAYLOAD.message(order, source="tests", id="another name")])
        assert [delivery.message_id for delivery in awaited(lane, 2)] == ["o-1", "another name"]
    finally:
        broker.close()


def test_what_nothing_names_may_be_accepted_and_keeps_the_id_it_is_given(rabbit_url: str):
    broker = RabbitMQBroker(rabbit_url)
    try:
        broker.declare([ACCEPTING])
        lane = broker.subscribe([ACCEPTING], "sub", OPTIONS)
        send(rabbit_url, (b"{}", {}), (b"{}", {}))
        first, second = awaited(lane, 2)
        assert first.message_id != second.message_id
        lane.settle([Retry(first.receipt, 0.1, "not yet")])
        [again] = awaited(lane)
        assert (again.message_id, again.attempt) == (first.message_id, 2)
        assert bodies([again]) == ["{}"]
    finally:
        broker.close()


def test_it_keeps_the_id_it_is_given_as_a_dead_letter_too(rabbit_url: str):
    broker = RabbitMQBroker(rabbit_url)
    try:
        broker.declare([ACCEPTING])
        lane = broker.subscribe([ACCEPTING], "sub", OPTIONS)
        send(rabbit_url, (b"{}", {}))
        [held] = awaited(lane)
        lane.settle([Dead(held.receipt, "no")])
        [letter] = broker.graveyard.select(Selection(), 100)
        assert letter.message.id == held.message_id
    finally:
        broker.close()


def test_a_repeat_of_another_program_takes_effect_once(rabbit_url: str, tmp_path: Any):
    """It was sent twice, each time with a message-id of its own."""
    app = duly.App("shop", broker=rabbit_url, store=f"sqlite:///{tmp_path}/effects.db")
    charged: list[str] = []

    @app.consumer(BY_HEADER, name="billing", guarantee="exactly-once")
    def charge(order: Order, tx: duly.Transaction[sqlite3.Connection]) -> None:
        charged.append(order.number)

    first, second = ((b'{"number":"o-1"}', {"message_id": id, **header("o-1")}) for id in "ab")
    with app, Worker(app):
        send(rabbit_url, first, second, (b'{"number":"o-2"}', {"message_id": "c", **header("o-2")}))
        eventually(lambda: "o-2" in charged, "the last is charged")
    assert charged == ["o-1", "o-2"]


def test_exactly_once_cannot_be_promised_of_what_nothing_names(rabbit_url: str, tmp_path: Any):
    app = duly.App("shop", broker=rabbit_url, store=f"sqlite:///{tmp_path}/effects.db")

    @app.consumer(ACCEPTING, name="billing", guarantee="exactly-once")
    def charge(order: Order, tx: duly.Transaction[sqlite3.Connection]) -> None: ...

    with pytest.raises(ContractRefused, match=r"cannot be known again.*\n.*dedup_by"):
        contract(app)


A_LATIN_NAME = "caf\xe9".encode("latin-1")


@pytest.mark.parametrize(
    ("properties", "id"),
    [
        ({"user_id": "guest"}, "w"),
        ({"content_encoding": "latin-1"}, "w"),
        ({"application_headers": {A_LATIN_NAME: "x"}}, "w"),
        ({"application_headers": {"x-delivery-count": "many"}}, "w"),
        ({"application_headers": {"CC": ["nowhere"]}}, "w"),
        ({"timestamp": 2**63}, "w"),
    ],
)
def test_odd_properties_hold_up_nothing(rabbit_url: str, properties: dict[str, Any], id: str):
    """Each is tried again, which publishes it as somebody else, and is then given up on."""
    body = "caf\xe9".encode("latin-1")
    broker = RabbitMQBroker(rabbit_url)
    try:
        broker.declare([PLAIN])
        lane = broker.subscribe([PLAIN], "sub", OPTIONS)
        send(rabbit_url, (body, {"message_id": id, **properties}))
        [first] = awaited(lane)
        assert (first.message_id, first.message.body) == (id, body)
        lane.settle([Retry(first.receipt, 0.1, "not yet")])
        [again] = awaited(lane)
        assert (again.message_id, again.message.body, again.attempt) == (id, body, 2)
        lane.settle([Dead(again.receipt, "no")])
        [letter] = broker.graveyard.select(Selection(), 100)
        assert (letter.message.id, letter.message.body) == (id, body)
    finally:
        broker.close()


@pytest.mark.parametrize("source", [5, "a\0b", "s" * 300])
def test_a_source_that_no_store_could_keep_makes_a_dead_letter(rabbit_url: str, source: Any):
    headers = {"application_headers": {"cloudEvents:source": source}}
    assert delivered(rabbit_url, PLAIN, (b"{}", {"message_id": "w", **headers})) == []
    broker = RabbitMQBroker(rabbit_url)
    try:
        broker.declare([PLAIN])
        [letter] = broker.graveyard.select(Selection(), 100)
    finally:
        broker.close()
    assert "a source is a non-empty str" in letter.error


@pytest.mark.parametrize("body", [b"", b"{}"])
def test_properties_that_are_no_text_make_a_dead_letter(rabbit_url: str, body: bytes):
    assert delivered(rabbit_url, PLAIN, (body, {"message_id": A_LATIN_NAME})) == []
    broker = RabbitMQBroker(rabbit_url)
    try:
        broker.declare([PLAIN])
        [letter] = broker.graveyard.select(Selection(), 100)
    finally:
        broker.close()
    assert letter.message.body == body
    assert re.search("UnicodeDecodeError", letter.error)


def test_publishing_without_what_names_it_is_refused():
    with pytest.raises(InvalidMessage, match=r"x-order-number.*no such header"):
        BY_HEADER.message(Order("o-1"), source="tests")

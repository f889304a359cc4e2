"""Versions of a payload: how older ones are read, and what becomes of those from the future."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pydantic
import pytest

import duly
from duly import Topic, Upcast
from duly.contract import Run, contract_of
from duly.errors import ConfigurationError, DecodeError, InvalidMessage, UnknownType
from duly.testing import Running, running
from duly.worker import Worker
from tests.waiting import eventually


@dataclass
class OrderV1:
    order: str
    euros: float


@dataclass
class OrderV2:
    order: str
    cents: int


@dataclass
class OrderV3:
    order: str
    cents: int
    currency: str


def v2_of_v1(old: OrderV1) -> OrderV2:
    return OrderV2(old.order, round(old.euros * 100))


def v3_of_v2(old: OrderV2) -> OrderV3:
    return OrderV3(old.order, old.cents, "EUR")


def orders_v1(guarantee: Any = "at-least-once") -> Topic[OrderV1]:
    return Topic("orders", OrderV1, guarantee=guarantee)


def orders_v2(guarantee: Any = "at-least-once", unknown: Any = "wait") -> Topic[OrderV2]:
    return Topic("orders", OrderV2, guarantee=guarantee).versioned(
        "order.v2",
        upcast={"orders": Upcast(OrderV1, v2_of_v1)},
        unknown_type=unknown,
        look_again_s=0.02,
    )


def orders_v3(guarantee: Any = "at-least-once") -> Topic[OrderV3]:
    return Topic("orders", OrderV3, guarantee=guarantee).versioned(
        "order.v3",
        upcast={
            "orders": Upcast(OrderV1, v2_of_v1).then(v3_of_v2),
            "order.v2": Upcast(OrderV2, v3_of_v2),
        },
        unknown_type="dead",
    )


wrong_upcast: Any = Upcast

# --- what a topic makes of one message


def test_what_is_published_names_its_type():
    topic = orders_v2()
    message = topic.message(OrderV2("o", 1), source="shop", headers={"tenant": "a"})
    assert message.headers == {"type": "order.v2", "tenant": "a"}
    assert message.attributes()["type"] == "order.v2"
    [one] = topic.messages([OrderV2("o", 1)], source="shop")
    assert one.headers == {"type": "order.v2"}
    assert orders_v1().message(OrderV1("o", 1.0), source="shop").attributes()["type"] == "orders"


def test_versioning_makes_another_value():
    plain = Topic("orders", OrderV2, guarantee="at-least-once")
    assert plain.versioned("order.v2", unknown_type="dead") is not plain
    assert plain.versions is None
    assert plain.message(OrderV2("o", 1), source="shop").headers == {}


def test_each_older_type_is_read_as_todays():
    today = orders_v3()
    old = orders_v1().message(OrderV1("o", 42.0), source="shop")
    middle = orders_v2().message(OrderV2("o", 4200), source="shop")
    new = today.message(OrderV3("o", 4200, "EUR"), source="shop")
    assert [today.read(m) for m in (old, middle, new)] == [OrderV3("o", 4200, "EUR")] * 3
    assert orders_v1().read(old) == OrderV1("o", 42.0)


def test_another_type_by_hand_is_refused():
    with pytest.raises(InvalidMessage, match=r"header type='order.v9'.*versioned\('order.v2'\)"):
        orders_v2().message(OrderV2("o", 1), source="shop", headers={"type": "order.v9"})


@pytest.mark.parametrize(
    "named", ["os.system", "builtins.eval", "tests.api.test_versions.OrderV1", "order.v3"]
)
def test_a_type_is_looked_up_and_never_imported(named: str):
    message: duly.Message[Any] = duly.Message("orders", "s", "i", b"{}", 0, headers={"type": named})
    with pytest.raises(UnknownType, match=r"this code knows 'order.v2', 'orders'"):
        orders_v2().read(message)


def test_a_body_that_is_not_of_its_type():
    message: duly.Message[Any] = duly.Message("orders", "s", "i", b'{"order": 1}', 0)
    with pytest.raises(DecodeError, match="of type 'orders': the body is not a OrderV1"):
        orders_v2().read(message)


def test_a_failing_upcast_does_not_tell_the_data():
    def fail(old: OrderV1) -> OrderV2:
        raise ValueError(f"secret {old.order}")

    topic = Topic("orders", OrderV2, guarantee="at-least-once").versioned(
        "order.v2", upcast={"orders": Upcast(OrderV1, fail)}, unknown_type="dead"
    )
    message = orders_v1().message(OrderV1("canary", 1.0), source="shop")
    with pytest.raises(DecodeError, match="upcast from 'orders' failed with ValueError") as raised:
        topic.read(message)
    assert "canary" not in str(raised.value)


@pytest.mark.parametrize(
    ("declare", "said"),
    [
        (lambda t: t.versioned("", unknown_type="dead"), "non-empty str"),
        (lambda t: t.versioned("a\nb", unknown_type="dead"), "printable"),
        (lambda t: t.versioned(7, unknown_type="dead"), "non-empty str"),
        (lambda t: t.versioned("x" * 129, unknown_type="dead"), "at most 128"),
        (lambda t: t.versioned("v2", unknown_type="drop"), 'can "wait".*or be "dead"'),
        (lambda t: t.versioned("v2", unknown_type="wait", look_again_s=0), "look_again_s"),
        (lambda t: t.versioned("v2", unknown_type="wait", look_again_s=True), "look_again_s"),
        (lambda t: t.versioned("v2", upcast={"v1": v2_of_v1}, unknown_type="dead"), "duly.Upcast"),
        (
            lambda t: t.versioned(
                "v2", upcast={"v2": Upcast(OrderV1, v2_of_v1)}, unknown_type="dead"
            ),
            "the present type",
        ),
        (lambda _: wrong_upcast(OrderV1, "v2_of_v1"), "give a function"),
        (lambda _: wrong_upcast(OrderV1, v2_of_v1).then(None), "give a function"),
        (lambda _: wrong_upcast(object(), v2_of_v1), "cannot carry payloads"),
    ],
)
def test_a_wrong_declaration_is_refused(declare: Callable[[Any], Any], said: str):
    with pytest.raises(ConfigurationError, match=said):
        declare(Topic("orders", OrderV2, guarantee="at-least-once"))


@pytest.mark.parametrize(
    ("broker", "unknown", "said"),
    [
        ("memory://", "wait", "any other type waits, looked at every 0.02 s"),
        ("memory://?kind=log", "wait", "looked at every 0.02 s, holding up its partition"),
        ("memory://", "dead", "any other type is a dead letter"),
    ],
)
def test_the_contract_says_it(broker: str, unknown: Any, said: str):
    app = duly.App("shop", broker)
    app.declare(orders_v2(unknown=unknown))
    consume(app, orders_v2(unknown=unknown), "at-least-once", "one")
    opened, store = app.backends()
    assert store is not None
    terms = contract_of(
        opened.capabilities, store.capabilities, app.topics, app.consumers, Run()
    ).topics[0]
    assert "published as type order.v2; orders are read as it" in terms.limits
    assert any(said in limit for limit in terms.limits), terms.limits
    app.close()


def test_one_app_has_one_declaration_of_a_topic():
    app = duly.App("shop", "memory://")
    app.declare(orders_v2())
    with pytest.raises(ConfigurationError, match="two topics named 'orders': versions="):
        app.declare(Topic("orders", OrderV2, guarantee="at-least-once"))


# --- at work

SHAPES = ["one", "message", "batch", "async", "many at once"]


def consume(app: duly.App, topic: Topic[Any], guarantee: Any, shape: str) -> list[Any]:
    """A consumer of the shape, and what it is called with."""
    got: list[Any] = []
    exactly = guarantee == "exactly-once"

    def plain(payload: Any) -> None:
        got.append(payload)

    def within(payload: Any, tx: duly.Transaction[Any]) -> None:
        got.append(payload)

    def whole(message: duly.Message[Any]) -> None:
        got.append(message.payload)

    def whole_within(message: duly.Message[Any], tx: duly.Transaction[Any]) -> None:
        got.append(message.payload)

    def many(payloads: list[Any]) -> None:
        got.extend(payloads)

    def many_within(payloads: list[Any], tx: duly.Transaction[Any]) -> None:
        got.extend(payloads)

    async def later(payload: Any) -> None:
        got.append(payload)

    async def later_within(payload: Any, tx: duly.Transaction[Any]) -> None:
        got.append(payload)

    handlers: dict[str, tuple[Any, Any]] = {
        "one": (plain, within),
        "message": (whole, whole_within),
        "batch": (many, many_within),
        "async": (later, later_within),
        "many at once": (later, later_within),
    }
    declare: Any = app.batch_consumer if shape == "batch" else app.consumer
    options = {"concurrency": 9} if shape == "many at once" else {}
    retry = duly.RetryPolicy(attempts=2)
    declare(topic, name="billing", guarantee=guarantee, retry=retry, **options)(
        handlers[shape][exactly]
    )
    return got


@pytest.fixture(params=["sqlite", "memory"])
def broker(request: pytest.FixtureRequest, db_path: Path) -> Iterator[Any]:
    from duly.connect import open_broker

    broker = open_broker(f"sqlite:///{db_path}" if request.param == "sqlite" else "memory://")
    yield broker
    broker.close()


@pytest.mark.parametrize(
    ("guarantee", "shape"),
    [
        (guarantee, shape)
        for guarantee in ("at-most-once", "at-least-once", "exactly-once")
        for shape in SHAPES
        if (guarantee, shape) != ("exactly-once", "many at once")  # in turn, always
    ],
)
def test_what_newer_code_published_waits_for_newer_code(
    broker: Any, guarantee: Any, shape: str, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.WARNING)
    old, new = duly.App("shop", broker), duly.App("shop", broker)
    got = consume(old, orders_v2(guarantee), guarantee, shape)
    got_later = consume(new, orders_v3(guarantee), guarantee, shape)
    waiting = [
        orders_v3(guarantee).message(OrderV3(f"v3-{n}", n, "USD"), source="shop") for n in (1, 2)
    ]
    known = [
        orders_v1(guarantee).message(OrderV1("v1", 1.0), source="shop"),
        orders_v2(guarantee).message(OrderV2("v2", 200), source="shop"),
    ]
    broker.declare([orders_v2(guarantee)])
    broker.publish([waiting[0], *known, waiting[1]])
    with Worker(old):
        eventually(lambda: len(got) == 2, "what this code knows is handled")
        looks = [0]

        def has_looked_often() -> bool:
            looks[0] += 1
            [state] = broker.subscriptions()
            return bool(looks[0] > 30 and state.parked + state.in_flight + state.backlog == 2)

        eventually(has_looked_often, "more looks than there are attempts")
    assert sorted(got, key=lambda o: o.order) == [OrderV2("v1", 100), OrderV2("v2", 200)]
    [state] = broker.subscriptions()
    assert state.dead == 0
    warned = [r for r in caplog.records if "waits for newer code" in r.getMessage()]
    assert 1 <= len(warned) <= 2, "once for each worker that meets the type, not at each look"
    with Worker(new):
        eventually(lambda: len(got_later) == 2, "newer code reads it")
    assert sorted(o.order for o in got_later) == ["v3-1", "v3-2"]
    kinds = {kind for _, kind in broker.incident_counts()}
    assert "dead-letter" not in kinds
    assert "retry" not in kinds, "nobody failed"


def from_elsewhere(t: Running, message: duly.Message[Any]) -> None:
    """Published by another process, whose code is another."""
    t.broker.declare(t.app.topics)
    [outcome] = t.broker.publish([message])
    assert isinstance(outcome, duly.Published)


@pytest.mark.parametrize("shape", SHAPES)
def test_or_it_is_a_dead_letter(shape: str):
    app = duly.App("shop", "memory://")
    got = consume(app, orders_v2(unknown="dead"), "at-least-once", shape)
    with running(app, failures="expected") as t:
        from_elsewhere(t, orders_v3().message(OrderV3("o", 1, "USD"), source="shop"))
        t.publish(t.app.consumers[0].topics[0], OrderV2("o", 2))
        t.drain()
        [letter] = t.dead("billing")
    assert "its type is 'order.v3'; this code knows 'order.v2', 'orders'" in letter.error
    assert got == [OrderV2("o", 2)]


@pytest.mark.parametrize("kind", ["sqlite:///a.db", "memory://", "memory://?kind=log"])
def test_in_order_by_key_the_later_ones_of_its_key_wait_too(kind: str):
    app = duly.App("shop", kind)
    topic = Topic("orders", OrderV2, guarantee="at-least-once", partitions=1).versioned(
        "order.v2", unknown_type="wait", look_again_s=60
    )
    newer = Topic("orders", OrderV3, guarantee="at-least-once", partitions=1).versioned(
        "order.v3", unknown_type="dead"
    )
    got: list[int] = []

    @app.consumer(topic, name="billing", guarantee="at-least-once", order_by_key=True)
    def charge(order: OrderV2) -> None:
        got.append(order.cents)

    with running(app) as t:
        t.publish(topic, OrderV2("a", 1), key="a")
        from_elsewhere(t, newer.message(OrderV3("a", 2, "EUR"), source="shop", key="a"))
        t.publish(topic, OrderV2("a", 3), key="a")
        t.drain()
        assert got == [1]
        for _ in range(20):  # more often than there are attempts
            t.advance(61)
            t.drain()
        assert got == [1]
        assert t.dead("billing") == []
        assert t.waiting("billing").backlog + t.waiting("billing").parked == 2


# --- fields that a type does not have: what the payload's own type says


class Loose(msgspec.Struct):
    order: str


class Strict(msgspec.Struct, forbid_unknown_fields=True):
    order: str


class Keeping(pydantic.BaseModel, extra="allow"):
    order: str


class StrictModel(pydantic.BaseModel, extra="forbid"):
    order: str


BODY = b'{"order": "o-1", "colour": "red"}'


@pytest.mark.parametrize("type_", [OrderV2, Loose])
def test_unknown_fields_are_ignored(type_: Any):
    body = BODY.replace(b"}", b', "cents": 1}')
    read = Topic("t", type_, guarantee="at-least-once").decode(body)
    assert read.order == "o-1"
    assert not hasattr(read, "colour")


@pytest.mark.parametrize("type_", [Keeping, dict])
def test_unknown_fields_are_kept_where_the_type_keeps_them(type_: Any):
    topic: Topic[Any] = Topic("t", type_, guarantee="at-least-once")
    payload = topic.decode(BODY)
    again = topic.message(payload, source="s").body
    assert msgspec.json.decode(again) == msgspec.json.decode(BODY)


@pytest.mark.parametrize("type_", [Strict, StrictModel])
def test_unknown_fields_are_refused_where_the_type_forbids_them(type_: Any):
    app = duly.App("shop", "memory://")
    topic: Topic[Any] = Topic("t", type_, guarantee="at-least-once")
    got: list[Any] = []
    app.consumer(topic, name="c", guarantee="at-least-once")(got.append)
    with running(app, failures="expected") as t:
        from_elsewhere(t, duly.Message("t", "shop", "i", BODY, 1))
        t.drain()
        [letter] = t.dead("c")
    assert "colour" in letter.error
    assert "red" not in letter.error
    assert got == []

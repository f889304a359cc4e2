"""An expectation of what is not there, in a test, fails that test: it does not hold by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import duly
from duly import Topic
from duly.brokers.memory import MemoryDatabase, MemoryQueue
from duly.errors import ConfigurationError
from duly.testing import Faults, NotHit, Running, running
from duly.testing.faulty import FaultyBroker
from tests.harness import shop

elsewhere: Topic[int] = Topic("elsewhere", int, guarantee="at-least-once")


@pytest.fixture
def t() -> Iterator[Running]:
    with running(shop.app, broker="memory://") as opened:
        yield opened


@pytest.mark.parametrize(
    ("ask", "complaint"),
    [
        (lambda t: t.dead("biling"), "no consumer 'biling' is worked here; there are 'billing',"),
        (lambda t: t.waiting("biling"), "no consumer 'biling'"),
        (lambda t: t.counts("biling"), "no consumer 'biling'"),
        (lambda t: t.published(elsewhere), "nothing to do with a topic 'elsewhere'"),
        (lambda t: t.payloads(elsewhere), "no consumer reads it, and nothing was published to it"),
        (lambda t: t.publish(elsewhere, 1), "there are 'orders', 'receipts', 'views'"),
        (lambda t: t.publish_many(elsewhere, [1]), "app.declare"),
        (lambda t: t.incidents("retries"), "'retries' is no kind of incident; there are"),
        (
            lambda t: t.payloads(Topic("views", str, guarantee="at-most-once")),
            "two topics named 'views'",
        ),
    ],
)
def test_asking_for_what_is_not_there(t: Running, ask: Callable[[Running], Any], complaint: str):
    with pytest.raises(ConfigurationError, match=complaint):
        ask(t)


def test_a_consumer_that_the_test_leaves_out_has_no_dead_letters_to_ask_for():
    with (
        running(shop.app, broker="memory://", consumers=["mail"]) as t,
        pytest.raises(ConfigurationError, match="no consumer 'billing' is worked here"),
    ):
        t.dead("billing")


def test_what_the_app_only_publishes_to():
    """In sight as soon as somebody tried, and from the beginning where it is declared."""
    app = duly.App("theirs", "memory://")
    topic: Topic[int] = Topic("t", int, guarantee="exactly-once")
    outputs: Topic[int] = Topic("outputs", int, guarantee="at-least-once")
    declared: Topic[int] = Topic("declared", int, guarantee="at-least-once")
    app.declare(declared)

    @app.consumer(topic, name="c", guarantee="exactly-once")
    def handle(n: int, tx: duly.Transaction[Any]) -> None:
        tx.publish(outputs, n)
        raise duly.Reject("rolled back")

    with running(app) as t:
        assert t.payloads(declared) == []
        with pytest.raises(ConfigurationError, match="'outputs'"):
            t.payloads(outputs)
        app.publish(outputs, 1)
        assert t.payloads(outputs) == [1]


def test_what_only_transactions_publish_to():
    app = duly.App("theirs", "memory://?kind=queue", "memory://")
    topic: Topic[int] = Topic("t", int, guarantee="exactly-once")
    outputs: Topic[int] = Topic("outputs", int, guarantee="at-least-once")

    @app.consumer(topic, name="c", guarantee="exactly-once")
    def handle(n: int, tx: duly.Transaction[Any]) -> None:
        tx.publish(outputs, n)

    with running(app) as t:
        t.publish(topic, 1)
        t.drain()
        assert t.payloads(outputs) == [1]


# --- overrides


def unused() -> int:
    return 1


def test_an_override_of_what_nobody_uses():
    with (
        pytest.raises(ConfigurationError, match=r"overrides has \S*unused, .* they use \S*prices"),
        running(shop.app, overrides={unused: unused}),
    ):
        pass


def inner() -> int:
    return 1


def outer(*, part: int = duly.use(inner)) -> int:
    return part


def deeper(*, part: int = duly.use(unused)) -> int:
    return part


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        ({inner: lambda: 7}, 7),
        ({outer: lambda: 8}, 8),
        ({outer: lambda: 8, inner: lambda: 7}, 8),
        ({outer: deeper, unused: lambda: 9}, 9),
    ],
)
def test_an_override_of_what_is_used_through_another(overrides: Any, found: int):
    app = duly.App("theirs", "memory://")
    handled: list[int] = []

    @app.consumer(elsewhere, name="c", guarantee="at-least-once")
    def handle(n: int, *, part: int = duly.use(outer)) -> None:
        handled.append(part)

    with running(app, overrides=overrides) as t:
        t.publish(elsewhere, 1)
        t.drain()
    assert handled == [found]


# --- faults


def plain(broker: str = "memory://") -> duly.App:
    app = duly.App("theirs", broker)
    app.consumer(elsewhere, name="c", guarantee="at-least-once")(lambda n: None)
    return app


@pytest.mark.parametrize(
    ("at", "complaint"),
    [
        (
            {("settle", 9): "cut after"},
            "'cut after' at 'settle' call 9 has not hit: that call was never made. There were",
        ),
        ({("commit", 1): OSError("full")}, r"OSError\('full'\) at 'commit' call 1 has not hit"),
        ({900: "unavailable"}, "'unavailable' at call 900 has not hit: that call was never made"),
        ({1: "cut before"}, "at call 1 has not hit: a 'claim' call cannot go wrong in that way"),
    ],
)
def test_a_fault_that_has_not_hit(at: Any, complaint: str):
    faults = Faults(rate=0.0, at=at)
    with pytest.raises(NotHit, match=complaint), running(plain(), faults=faults) as t:  # noqa: PT012
        t.publish(elsewhere, 1)
        t.drain(failures="expected")


def test_a_fault_that_has_not_hit_in_an_async_test():
    async def test() -> None:
        async with running(plain(), faults=Faults(rate=0.0, at={("commit", 1): "cut after"})):
            pass

    with pytest.raises(NotHit):
        asyncio.run(test())


def test_a_test_that_failed_is_told_its_own_failure():
    faults = Faults(rate=0.0, at={900: "unavailable"})
    with pytest.raises(KeyError), running(plain(), faults=faults):
        raise KeyError


def test_all_of_them_have_to_hit():
    faults = Faults(rate=0.0, at={("settle", 1): "die before", ("settle", 2): "cut after"})
    with running(plain(), faults=faults) as t:
        t.publish(elsewhere, 1)
        t.drain()
    assert [kind for _, _, kind in faults.hits] == ["die before", "cut after"]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"at": {("settle", 1): "reorder"}}, "'reorder' cannot hit a 'settle' call, only"),
        ({"at": {("rollback", 1): "cut after"}}, "'rollback' call, only an exception can"),
        ({"at": {0: "cut after"}}, "counted from 1"),
        ({"at": {("settle", 0): "cut after"}}, "counted from 1"),
        ({"rate": 1.5}, "a probability"),
        ({"rate": -0.1}, "a probability"),
        ({"most": -1}, "0 or more"),
    ],
)
def test_faults_that_make_no_sense(options: Any, complaint: str):
    with pytest.raises(ConfigurationError, match=complaint):
        Faults(**options)


def test_at_one_call_too_a_broker_is_not_shown_breaking_its_promises():
    with pytest.raises(ConfigurationError, match="'duplicate' cannot hit: in-memory database"):
        FaultyBroker(MemoryDatabase(), Faults(at={("publish", 1): "duplicate"}))


def test_a_pause_that_nobody_makes():
    broker = FaultyBroker(MemoryQueue(), faults := Faults(rate=0.0, at={1: "pause"}))
    broker.declare([elsewhere])
    broker.publish([elsewhere.message(1, source="app")])
    with pytest.raises(NotHit, match="nobody lets the process pause"):
        faults.check()

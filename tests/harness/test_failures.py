"""What fails surfaces in `drain`, and time passes when the test says so."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

import duly
from duly import Message, Topic
from duly.brokers.memory import MemoryDatabase
from duly.errors import ConfigurationError
from duly.testing import Running, running
from tests.harness import shop
from tests.harness.shop import charged, deciding

Make = Callable[..., Running]


def test_a_handlers_exception_surfaces_where_it_was_raised(shopping: Running):
    t = shopping
    t.publish(shop.orders, {"cents": -1}, id="o-1")
    t.publish(shop.orders, {"cents": 5})
    with pytest.raises(ValueError, match="nobody is charged -1") as raised:
        t.drain()
    frames = traceback.extract_tb(raised.value.__traceback__)
    assert frames[-1].name == "bill"
    assert any("'billing' failed on message 'o-1'" in note for note in raised.value.__notes__)
    t.drain()
    assert charged(t) == [5], "what is left is handled"
    assert t.waiting("billing").parked == 1, "and the failed one waits for its retry"


def test_expected_failures_go_all_the_way(shopping: Running):
    t = shopping
    began = t.clock.now
    t.publish(shop.orders, {"cents": -1}, id="o-1")
    t.drain(advance=True, failures="expected")
    assert [(f.attempt, f.retry_in_s) for f in t.failures] == [(1, 10.0), (2, 20.0), (3, None)]
    assert timedelta(seconds=30) <= t.clock.now - began < timedelta(seconds=60)
    [letter] = t.dead("billing")
    assert letter.message.payload == {"cents": -1}
    assert (letter.attempts, letter.error) == (3, "ValueError: nobody is charged -1")
    assert [incident.kind for incident in t.incidents()] == ["retry", "retry", "dead-letter"]
    assert charged(t) == t.payloads(shop.receipts) == []
    t.drain()  # it is not told of again


def test_what_a_handler_decides_is_no_accident():
    app = duly.App("theirs", "memory://")
    topic = deciding(app, duly.Reject("not for us"))
    with running(app) as t:
        t.publish(topic, 1)
        t.drain()
        assert [letter.error for letter in t.dead()] == ["Reject: not for us"]
    app = duly.App("theirs", "memory://")
    topic = deciding(app, duly.Retry("later", in_s=60))
    with running(app) as t:
        t.publish(topic, 1)
        t.drain()
        assert t.waiting("c").parked == 1


def test_what_cannot_be_decoded_is_told(shopping: Running):
    t = shopping
    damaged: Message[Any] = Message("orders", "shop", "o-1", b"no json", 1)
    t.broker.publish([damaged])
    with pytest.raises(AssertionError, match=r"gave up on message 'o-1'.*cannot be decoded"):
        t.drain()
    t.drain()
    assert len(t.dead("billing")) == 1


def test_failures_may_be_expected_throughout():
    app = duly.App("theirs", "memory://")
    topic = deciding(app, KeyError("k"))
    with running(app, failures="expected") as t:
        t.publish(topic, 1)
        t.drain(advance=True)
        assert len(t.failures) == 10
    with pytest.raises(ConfigurationError, match="expected"):
        running(app, failures="never")  # type: ignore[arg-type]


def test_what_is_no_exception_ends_the_lane_and_surfaces():
    app = duly.App("theirs", "memory://")
    topic: Topic[int] = Topic("t", int, guarantee="at-least-once")

    @app.consumer(topic, name="c", guarantee="at-least-once")
    def leave(n: int) -> None:
        raise SystemExit(3)

    with running(app) as t:
        t.publish(topic, 1)
        with pytest.raises(SystemExit):
            t.drain()


def test_what_never_comes_to_rest_is_told():
    app = duly.App("theirs", "memory://")
    topic: Topic[int] = Topic("t", int, guarantee="at-least-once")
    app.consumer(topic, name="c", guarantee="at-least-once")(lambda n: app.publish(topic, n))
    with running(app) as t:
        t.publish(topic, 1)
        with pytest.raises(AssertionError, match=r"does not come to rest.*c handled"):
            t.drain(timeout_s=0.2)


def test_publishing_in_a_transaction_is_refused_as_ever():
    app = duly.App("theirs", "memory://")
    topic: Topic[int] = Topic("t", int, guarantee="exactly-once")

    @app.consumer(topic, name="c", guarantee="exactly-once")
    def handle(n: int, tx: duly.Transaction[Any]) -> None:
        app.publish(topic, n)

    with running(app) as t:
        t.publish(topic, 1)
        with pytest.raises(ConfigurationError, match=r"tx\.publish"):
            t.drain()


# --- time


@pytest.mark.parametrize("broker", ["memory://", "memory://?kind=log", "sqlite"])
def test_time_stands_still_until_it_is_moved(tmp_path: Path, broker: str):
    app = duly.App("theirs", f"sqlite:///{tmp_path / 'x.db'}" if broker == "sqlite" else broker)
    topic: Topic[int] = Topic("t", int, guarantee="at-least-once")
    handled: list[int] = []
    app.consumer(topic, name="c", guarantee="at-least-once")(handled.append)
    with running(app, folder=tmp_path) as t:
        if t.broker.capabilities.delays:
            app.publish(topic, 1, delay_s=3600)
            app.publish(topic, 2, delay_s=7200)
            t.drain()
            assert handled == []
            assert [message.payload for message in t.published(topic)] == [1, 2]
            t.advance(3601)
            t.drain()
            assert handled == [1]
            app.publish(topic, 3, delay_s=60)
            t.drain()
            assert handled == [1], "a delay begins with the clock as it is now"
            began = t.clock.now
            t.drain(advance=True)
            assert handled == [1, 3, 2]
            assert t.clock.now - began < timedelta(hours=1)
            assert t.payloads(topic) == [1, 2, 3]


def test_a_retry_that_was_there_before_is_found_by_looking(tmp_path: Path):
    """Its time was told to nobody who is still there."""
    path = tmp_path / "shared.db"
    app = duly.App("theirs", "memory://")
    topic = deciding(app, duly.Retry("later", in_s=1000))
    with running(app, broker=f"sqlite:///{path}") as t:
        t.publish(topic, 1)
        t.drain()
    with running(app, broker=f"sqlite:///{path}", failures="expected") as t:
        t.drain(advance=True)
        assert len(t.dead()) == 1


def test_a_broker_that_came_open_goes_by_the_machines_clock():
    app = duly.App("theirs", "memory://")
    topic: Topic[int] = Topic("t", int, guarantee="at-least-once")
    handled: list[int] = []
    app.consumer(topic, name="c", guarantee="at-least-once")(handled.append)
    broker = MemoryDatabase()
    with running(app, broker=broker) as t:
        t.publish(topic, 1, delay_s=0.05)
        with pytest.raises(ConfigurationError, match="machine's clock"):
            t.advance(1)
        t.drain(advance=True)
    assert handled == [1]
    broker.publish([])

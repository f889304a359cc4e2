"""At-most-once publishing: never waits, never raises for the broker, loses only what it counts."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

import pytest

import duly
from duly import events
from duly.broker import Outcome, SubscribeOptions
from duly.guarantees import Guarantee
from duly.message import Message
from duly.publishing.buffer import Buffer, Drops
from tests.api.fakes import FakeBroker, stored
from tests.waiting import eventually

views = duly.Topic("views", dict, guarantee="at-most-once")
pings = duly.Topic("pings", dict, guarantee="at-most-once")


@pytest.fixture
def broker() -> FakeBroker:
    return FakeBroker()


@pytest.fixture
def app(broker):
    app = duly.App("shop", broker)
    yield app
    broker.gate.set()
    app.close()


@pytest.fixture
def drops() -> Drops:
    return Drops({})


def buffer_of(broker: FakeBroker, drops: Drops, **limits: int) -> Buffer:
    broker.declare([views, pings])
    return Buffer(broker.publish, lambda *told: None, broker.recorded.update, drops, **limits)


def message(n: int, topic: duly.Topic[Any] = views) -> Message[Any]:
    return topic.message({"n": n}, source="shop")


def test_what_is_published_arrives_in_order_and_together(app, broker):
    outcomes = [app.publish(views, {"n": n}) for n in range(500)]
    assert all(isinstance(outcome, duly.Buffered) for outcome in outcomes)
    eventually(lambda: len(broker.messages) == 500, "all stored")
    assert [m.id for m in broker.messages] == [outcome.message_id for outcome in outcomes]
    assert len(broker.portions) < 100
    assert app.drops == {}


def test_a_wrong_payload_is_still_refused(app):
    with pytest.raises(duly.InvalidMessage):
        app.publish(views, [7])


def test_a_full_buffer_drops_counts_and_says_so(broker, drops):
    told: list[tuple[str, int, str]] = []
    broker.declare([views, pings])
    buffer = Buffer(
        broker.publish, lambda *each: told.append(each), broker.recorded.update, drops,
        max_messages=10,
    )  # fmt: skip
    broker.gate.clear()
    buffer.put(message(0))
    assert broker.entered.acquire(timeout=30)  # the broker holds the first one
    outcomes = [buffer.put(message(n, pings)) for n in range(15)]
    assert [type(outcome) for outcome in outcomes] == [duly.Buffered] * 10 + [duly.Dropped] * 5
    assert drops.by_topic() == {"pings": 5}
    assert told == [("pings", 1, "the buffer is full")] * 5
    broker.gate.set()
    buffer.close(30)
    assert len(broker.messages) == 11
    assert broker.recorded == {"pings": 5}


def test_a_full_buffer_is_also_one_of_bytes(broker, drops):
    buffer = buffer_of(broker, drops, max_bytes=20)
    broker.gate.clear()
    buffer.put(message(0))
    assert broker.entered.acquire(timeout=30)
    outcomes = [type(buffer.put(message(n))) for n in range(4)]  # 7 bytes each
    assert outcomes == [duly.Buffered, duly.Buffered, duly.Dropped, duly.Dropped]
    broker.gate.set()
    buffer.close(30)


def test_one_that_is_larger_than_the_buffer_goes_by_itself(broker, drops):
    buffer = buffer_of(broker, drops, max_bytes=5)
    assert isinstance(buffer.put(message(0)), duly.Buffered)  # 7 bytes
    buffer.close(30)
    assert (len(broker.messages), drops.by_topic()) == (1, {})


def test_what_hangs_in_the_broker_as_it_closes_is_counted_once(broker, drops):
    buffer = buffer_of(broker, drops)
    broker.gate.clear()
    buffer.put(message(0))
    assert broker.entered.acquire(timeout=30)
    buffer.put(message(1))
    broker.answer = lambda messages: [duly.PublishFailed("full") for _ in messages]
    buffer.close(0.1)
    assert drops.by_topic() == {"views": 2}
    broker.gate.set()
    assert buffer._thread is not None
    buffer._thread.join(30)
    assert drops.by_topic() == {"views": 2}


def test_what_is_dropped_after_the_last_one_was_stored_is_recorded_too(broker, drops):
    buffer = buffer_of(broker, drops, max_messages=1)
    buffer.put(message(0))
    eventually(lambda: len(broker.messages) == 1, "it is stored")
    with buffer._lock:  # its thread takes nothing meanwhile
        buffer._waiting.append(message(1))
    buffer.put(message(2))
    with buffer._lock:
        buffer._waiting.clear()
    buffer.close(30)
    assert broker.recorded == drops.by_topic() == {"views": 1}


def test_a_message_of_unknown_fate_is_never_sent_again(broker, drops):
    given: list[str] = []

    def lossy(messages: Sequence[Message[Any]]) -> Sequence[Outcome]:
        given.extend(m.id for m in messages)
        if len(given) == 1:
            raise OSError("connection reset")
        return stored(messages)

    broker.answer = lossy
    buffer = buffer_of(broker, drops)
    buffer.put(message(0))
    eventually(lambda: drops.by_topic() == {"views": 1}, "the drop is counted")
    buffer.put(message(1))
    buffer.close(30)
    assert len(given) == len(set(given)) == 2


def test_a_broker_that_is_away_for_a_while_costs_nothing(broker, drops):
    tries: list[int] = []

    def away(messages: Sequence[Message[Any]]) -> Sequence[Outcome]:
        tries.append(len(messages))
        if len(tries) < 4:
            raise duly.BrokerUnavailable("locked")
        return stored(messages)

    broker.answer = away
    buffer = buffer_of(broker, drops)
    for n in range(5):
        buffer.put(message(n))
    eventually(lambda: len(broker.messages) == 5, "stored once the broker is back")
    assert [m.body for m in broker.messages] == [b'{"n":%d}' % n for n in range(5)]
    assert drops.by_topic() == {}
    buffer.close(1)


def test_refused_messages_are_drops(app, broker):
    def refuse(messages: Sequence[Message[Any]]) -> Sequence[Outcome]:
        return [duly.MessageTooLarge("too large", message_id=m.id) for m in messages]

    seen: list[events.Event] = []
    app.watchers.append(seen.append)
    broker.answer = refuse
    app.publish(views, {})
    eventually(lambda: app.drops == {"views": 1}, "the drop is counted")
    eventually(lambda: seen, "the watcher was told")
    assert seen[0] == events.PublishDropped("views", 1, "too large")
    broker.answer = stored
    app.publish(views, {})
    eventually(lambda: broker.recorded == {"views": 1}, "the broker was told")


def test_close_stores_what_waits(app, broker):
    app.publish_many(views, [{"n": n} for n in range(5000)])
    app.close()
    assert len(broker.messages) == 5000


def test_close_gives_up_in_time_and_counts(app, broker):
    broker.gate.clear()
    app.publish(views, {})
    assert broker.entered.acquire(timeout=30)
    app.publish_many(views, [{}] * 9)
    app.close(timeout_s=0.05)
    assert app.drops == {"views": 10}
    assert app.publish(views, {}).message_id  # opens again


def test_close_gives_up_on_a_broker_that_stays_away(app, broker):
    def away(messages: Sequence[Message[Any]]) -> Sequence[Outcome]:
        raise duly.BrokerUnavailable("locked")

    broker.answer = away
    app.publish_many(views, [{}] * 9)
    app.close(timeout_s=0.2)
    assert app.drops == {"views": 9}


def test_a_broker_that_cannot_be_opened_is_a_counted_drop_and_a_log_line(caplog):
    app = duly.App("shop", "nosuch://broker")
    app.publish(views, {})
    eventually(lambda: app.drops == {"views": 1}, "the drop is counted")
    assert "nosuch" in caplog.text
    app.close()


def test_many_threads(app, broker):
    def publish() -> None:
        for n in range(500):
            app.publish(views, {"n": n})

    threads = [threading.Thread(target=publish) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    app.close()
    assert len(broker.messages) + sum(app.drops.values()) == 4000
    assert app.drops == {}


def test_from_a_loop(app, broker):
    async def main():
        for n in range(100):
            assert isinstance(await app.apublish(views, {"n": n}), duly.Buffered)

    asyncio.run(main())
    app.close()
    assert len(broker.messages) == 100


def test_a_process_that_ends_without_closing_still_sends(db_url):
    program = (
        "import duly, sys\n"
        "views = duly.Topic('views', dict, guarantee='at-most-once')\n"
        "app = duly.App('shop', sys.argv[1])\n"
        "app.publish_many(views, [{'n': n} for n in range(100)])\n"
    )
    subprocess.run([sys.executable, "-c", program, db_url], check=True, timeout=60)
    with duly.App("reader", db_url) as app:
        broker, _ = app.backends()
        broker.declare([views])
        lane = broker.subscribe([views], "reader", SubscribeOptions(Guarantee.AT_LEAST_ONCE))
        assert len(lane.claim(1000, 1 << 20, 10.0)) == 100
        lane.close()

"""Due times and retries wait on the server: as long as asked, whatever becomes of it meanwhile."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest

from duly.broker import Outcome
from duly.brokers.rabbitmq import RabbitMQBroker
from duly.brokers.rabbitmq.delays import SHORTEST_MS, Delays, levels_for
from duly.brokers.rabbitmq.topology import LONGEST_MS
from duly.errors import PublishFailed
from duly.guarantees import Done, Retry
from duly.message import MAX_DELAY_S, Topic, now_ms
from duly.message.limits import MAX_NAME_CHARS
from tests.rabbitmq.test_topology import names, taken
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

READINGS: Topic[str] = Topic("readings", str, guarantee="at-most-once")


def later(broker: RabbitMQBroker, in_s: float, *bodies: str, topic: Topic[str] = ORDERS) -> Any:
    """Publish these with a due time; it, and the outcomes."""
    due_ms = now_ms() + int(in_s * 1000)
    messages = [topic.message(body, source="tests", id=body, due_ms=due_ms) for body in bodies]
    return due_ms, broker.publish(messages)


def kinds(outcomes: Sequence[Outcome]) -> list[str]:
    return [type(outcome).__name__ for outcome in outcomes]


def is_in(url: str, queue: str, count: int) -> bool:
    with channel(url) as stranger:
        return bool(stranger.queue_declare(queue, passive=True).message_count == count)


# --- of what a delay is composed


@pytest.mark.parametrize(
    "delay_s", [0.001, 0.064, 0.25, 1.0, 47.0, 86400.1, 4 * 86400, MAX_DELAY_S]
)
def test_levels_add_up_to_the_delay(delay_s: float):
    levels = levels_for(delay_s, exactly=True)
    assert len(set(levels)) == len(levels)
    assert all(SHORTEST_MS <= level <= LONGEST_MS for level in levels)
    assert delay_s * 1000 <= sum(levels) < delay_s * 1000 + SHORTEST_MS


@pytest.mark.parametrize("delay_s", [0.001, 0.25, 1.0, 3.3, 47.0, 599.9, 86400.0, MAX_DELAY_S])
def test_a_retry_is_never_shorter_less_than_a_quarter_longer_and_three_writes(delay_s: float):
    levels = levels_for(delay_s, exactly=False)
    assert len(levels) <= 3
    assert delay_s * 1000 <= sum(levels) < max(1.25 * delay_s * 1000, SHORTEST_MS + 1)


# --- they wait


def test_every_subscription_is_given_it_when_it_is_due_and_not_before(rabbit_url: str):
    with broker_at(rabbit_url) as broker:
        lanes = [broker.subscribe([ORDERS], name, OPTIONS) for name in ("sub", "other")]
        sent = message("later", id="later", key="k", headers={"tenant": "blue"})
        due_ms, outcomes = later(broker, 0.7, "later")
        assert kinds(outcomes) == ["Published"]
        publish(broker, "now")
        for lane in lanes:
            first, *rest = awaited(lane)
            assert bodies([first]) == ["now"]
            [delivery] = rest or awaited(lane)
            assert now_ms() >= due_ms
            got = delivery.message
            assert (got.body, got.id, got.due_ms) == (sent.body, sent.id, due_ms)
            assert (delivery.attempt, delivery.repeated) == (1, False)


def test_short_ones_are_not_held_up_by_long_ones(rabbit_url: str):
    with broker_at(rabbit_url) as broker:
        lane = lane_of(broker)
        for in_s in (3600.0, 0.9, 0.5, 0.1):
            later(broker, in_s, str(in_s))
        assert bodies(awaited(lane, 3)) == ["0.1", "0.5", "0.9"]


def test_a_delay_of_years_is_taken_and_waits(rabbit_url: str):
    with broker_at(rabbit_url) as broker:
        for in_s in (90 * 86400.0, MAX_DELAY_S - 1.0):
            _, outcomes = later(broker, in_s, str(in_s))
            assert kinds(outcomes) == ["Published"]
            level = names(rabbit_url).delay(max(levels_for(in_s, exactly=True)))
            eventually(partial(is_in, rabbit_url, level, 1), f"it waits in {level}")
        later(broker, 0.2, "soon")
        assert bodies(awaited(lane_of(broker))) == ["soon"]


def test_the_longest_names_go_the_same_way(rabbit_url: str):
    topic: Topic[str] = Topic("t" * MAX_NAME_CHARS, str, guarantee="at-least-once")
    subscription = "s" * MAX_NAME_CHARS
    with broker_at(rabbit_url) as broker:
        broker.declare([topic])
        lane = broker.subscribe([topic], subscription, OPTIONS)
        due_ms, _ = later(broker, 0.2, "a", topic=topic)
        [held] = awaited(lane)
        assert now_ms() >= due_ms
        lane.settle([Retry(held.receipt, 0.1, "again")])
        assert awaited(lane)[0].attempt == 2


def test_what_had_a_due_time_may_wait_for_a_retry_too(rabbit_url: str):
    with broker_at(rabbit_url) as broker:
        lane = lane_of(broker)
        later(broker, 0.3, "a")
        for attempt in (1, 2, 3):
            [held] = awaited(lane)
            assert held.attempt == attempt
            asked = time.monotonic()
            lane.settle([Retry(held.receipt, 0.3, "not yet")])
        [held] = awaited(lane)
        assert time.monotonic() - asked >= 0.3
        lane.settle([Done(held.receipt)])


# --- nobody is there


def test_what_is_due_later_is_refused_where_nobody_listens_now(rabbit_url: str):
    with broker_at(rabbit_url) as broker:
        unheard: Topic[str] = Topic("unheard", str, guarantee="at-least-once")
        broker.declare([unheard])
        _, [outcome] = later(broker, 60.0, "a", topic=unheard)
        assert isinstance(outcome, PublishFailed)
        assert "no subscription takes it" in str(outcome)
        broker.prepare([unheard], "first", OPTIONS)
        broker.prepare([unheard], "second", OPTIONS)
        for queue in ("first", "second"):
            assert kinds(later(broker, 60.0, f"before {queue}", topic=unheard)[1]) == ["Published"]
            with channel(rabbit_url) as operator:
                operator.queue_delete(names(rabbit_url).queue("unheard", queue))
        _, [outcome] = later(broker, 60.0, "b", topic=unheard)
        assert isinstance(outcome, PublishFailed)


def test_nobody_need_listen_later_to_what_may_be_lost(rabbit_url: str):
    with broker_at(rabbit_url) as broker:
        broker.declare([READINGS])
        assert kinds(later(broker, 60.0, "21", topic=READINGS)[1]) == ["Published"]


def test_nor_to_what_may_go_unheard(rabbit_url: str):
    news: Topic[str] = Topic("news", str, guarantee="at-least-once", may_go_unheard=True)
    with broker_at(rabbit_url) as broker:
        lane = lane_of(broker)
        broker.declare([news])
        assert kinds(later(broker, 0.1, "unheard", topic=news)[1]) == ["Published"]
        broker.prepare([news], "sub", OPTIONS)
        later(broker, 0.3, "unheard", topic=news)
        with channel(rabbit_url) as operator:
            operator.queue_delete(names(rabbit_url).queue("news", "sub"))
        later(broker, 0.4, "heard")
        assert bodies(awaited(lane)) == ["heard"]
        assert is_in(rabbit_url, names(rabbit_url).unheard, 0)


def test_what_nobody_takes_when_it_is_due_is_kept_and_holds_nothing_up(rabbit_url: str):
    """More of them than the server moves at once."""
    gone: Topic[str] = Topic("gone", str, guarantee="at-least-once")
    with broker_at(rabbit_url) as broker:
        lane = lane_of(broker)
        broker.declare([gone, READINGS])
        for topic in (gone, READINGS):
            broker.prepare([topic], "sub", OPTIONS)
            later(broker, 0.6, *(f"{topic.name} {n}" for n in range(100)), topic=topic)
        with channel(rabbit_url) as operator:
            for topic in (gone, READINGS):
                operator.queue_delete(names(rabbit_url).queue(topic.name, "sub"))
        later(broker, 0.7, "heard")
        assert bodies(awaited(lane)) == ["heard"]
        unheard = names(rabbit_url).unheard
        eventually(lambda: is_in(rabbit_url, unheard, 100), "they are kept apart")
        letter = taken(rabbit_url, unheard)
        assert letter.properties["message_id"] == "gone 0"
        assert letter.properties["type"] == "gone"


def test_a_retry_whose_queue_is_gone_is_kept_too(rabbit_url: str):
    with broker_at(rabbit_url) as broker:
        lane = lane_of(broker)
        publish(broker, "a")
        [held] = awaited(lane)
        lane.settle([Retry(held.receipt, 0.5, "not yet")])
        lane.close()
        with channel(rabbit_url) as operator:
            operator.queue_delete(names(rabbit_url).queue(ORDERS.name, "sub"))
        assert taken(rabbit_url, names(rabbit_url).unheard).properties["message_id"] == "a"


# --- the server


@pytest.mark.parametrize("how", ["kill", "stop"])
@pytest.mark.long
def test_a_server_that_restarts_keeps_what_waits(rabbit_node: RabbitMQNode, how: str):
    rabbit_node.start_again()
    url = in_namespace(named_after(f"restarts_{how}"), rabbit_node.url)
    with broker_at(url) as broker:
        lane = lane_of(broker)
        # Every level is there and on disk, which takes the server some seconds after it answered.
        every = sum(SHORTEST_MS << n for n in range(8)) / 1000
        Delays(names(url)).make(levels_for(every, exactly=True), broker.link)
        made = [names(url).delay(level) for level in levels_for(every, exactly=True)]
        for queue in (*made, names(url).queue(ORDERS.name, "sub")):
            eventually(partial(rabbit_node.remembers, queue), f"{queue} is on disk")
        wanted = [str(n) for n in range(20)]
        due_ms, outcomes = later(broker, 12.0, *wanted)
        assert set(kinds(outcomes)) == {"Published"}
        publish(broker, "retried")
        [held] = awaited(lane)
        lane.settle([Retry(held.receipt, 8.0, "later")])
        getattr(rabbit_node, how)()
        rabbit_node.start()
        got: dict[str, int] = {}

        def all_came() -> bool:
            for delivery in lane.claim(10, A_LOT, 0.2):
                got.setdefault(delivery.message.body.decode(), now_ms())
                lane.settle([Done(delivery.receipt)])
            return len(got) == len(wanted) + 1

        eventually(all_came, "all of them come", lambda: f"came: {sorted(got)}", 60.0)
    assert min(at for body, at in got.items() if body in wanted) >= due_ms

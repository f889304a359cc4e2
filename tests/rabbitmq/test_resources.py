"""Nothing is kept that was given up, and nothing is held that nobody can settle, whatever fails."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from duly.broker import Published, SubscribeOptions
from duly.brokers.rabbitmq import RabbitMQBroker
from duly.errors import BrokerError, BrokerUnavailable, CommitUnknown
from duly.guarantees import Done, Guarantee, Retry
from duly.message import Topic
from tests.rabbitmq.ordered import RIDES, board, rides_at
from tests.rabbitmq.work import (
    ORDERS,
    awaited,
    bodies,
    broker_at,
    lane_of,
    publish,
    work_off,
)
from tests.waiting import eventually

LINES: Topic[str] = Topic("lines", str, guarantee="at-least-once", partitions=1, key=str)
ROOT = Path(__file__).parents[2]


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def threads() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith("duly-rabbitmq")]


def test_a_broker_that_is_closed_leaves_no_file_open(rabbit_url: str):
    RabbitMQBroker(rabbit_url).close()  # what is loaded once
    before = open_files()
    for _ in range(3):
        RabbitMQBroker(rabbit_url).close()
    assert open_files() <= before


def test_one_that_cannot_connect_leaves_nothing_either(rabbit_url: str):
    wrong = "amqp://guest:wrong@" + rabbit_url.partition("@")[2]
    eventually(lambda: not threads(), "the threads of tests before end")
    before = open_files()
    for _ in range(3):
        with pytest.raises(BrokerError):
            RabbitMQBroker(wrong)
    eventually(lambda: not threads(), "no thread is left", lambda: str(threads()))
    assert open_files() <= before


def test_a_lane_that_cannot_be_closed_keeps_no_connection_open(rabbit_url: str):
    eventually(lambda: not threads(), "the threads of tests before end")
    broker = RabbitMQBroker(rabbit_url)
    broker.declare([ORDERS])
    broker.subscribe([ORDERS], "once", SubscribeOptions(Guarantee.AT_MOST_ONCE))
    broker.subscribe([ORDERS], "sub", SubscribeOptions(Guarantee.AT_LEAST_ONCE))
    call = broker.link.call

    def fails(run: Any, timeout_s: float = 30.0) -> Any:
        call(lambda _: None, timeout_s)
        raise BrokerError("the connection was lost just now")

    broker.link.call = fails  # type: ignore[method-assign]
    broker.close()
    eventually(lambda: not threads(), "no thread is left", lambda: str(threads()))


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("topic", [ORDERS, LINES], ids=lambda topic: topic.name)
def test_a_settlement_that_is_interrupted_leaves_the_claim_as_it_was(
    rabbit_url: str, topic: Topic[str], error: BaseException
):
    with broker_at(rabbit_url) as broker:
        broker.declare([topic])
        options = SubscribeOptions(Guarantee.AT_LEAST_ONCE, order_by_key=topic is LINES)
        lane = broker.subscribe([topic], "one", options)
        broker.publish([topic.message("a", source="tests", id="a")])
        [held] = awaited(lane)
        with pytest.MonkeyPatch.context() as patch:

            def raises(*_: object) -> None:
                raise error

            patch.setattr(broker, "move", raises)
            patch.setattr(broker, "keep", raises)
            with pytest.raises(type(error)):
                lane.settle([Retry(held.receipt, 0.0, "later")])
        assert list(lane.extend([held.receipt], 60.0)) == []
        assert list(lane.settle([Done(held.receipt)])) == []


def blocked(broker: RabbitMQBroker, fails: Callable[[int], bool]) -> list[int]:
    """Let calls time out before they are begun, as where the link's thread is busy elsewhere."""
    call, count = broker.link.call, [0]

    def times_out(run: Any, timeout_s: float = 30.0) -> Any:
        if run.__name__ == "<lambda>":
            count[0] += 1
            if fails(count[0]):
                raise BrokerUnavailable("not connected; nothing was sent")
        return call(run, timeout_s)

    broker.link.call = times_out  # type: ignore[method-assign]
    return count


def test_what_was_not_acknowledged_in_time_comes_again(rabbit_url: str):
    """The server holds it for as long as the connection lives: it has to come from here."""
    with broker_at(rabbit_url) as broker:
        lane = lane_of(broker)
        publish(broker, "a")
        [held] = awaited(lane)
        blocked(broker, lambda n: n == 1)
        assert list(lane.settle([Done(held.receipt)])) == [held.receipt]
        [again] = awaited(lane)
        assert (bodies([again]), again.repeated) == (["a"], True)
        assert list(lane.settle([Done(again.receipt)])) == []
        publish(broker, "b")
        assert work_off(lane, {"b"}.issubset) == ["b"]


@pytest.mark.parametrize("unknown", [False, True], ids=["not sent", "unknown"])
def test_in_order_what_was_not_acknowledged_in_time_comes_again(rabbit_url: str, unknown: bool):
    """First of its key, and as what it is: handled before."""
    with rides_at(rabbit_url) as broker:
        lane = board(broker)
        rides = [RIDES.message(f"{n}", key="k", source="tests") for n in range(2)]
        assert all(isinstance(each, Published) for each in broker.publish(rides))
        held = awaited(lane, 2)
        call, failed = broker.link.call, [False]

        def fails(run: Any, timeout_s: float = 30.0) -> Any:
            if run.__name__ == "<lambda>" and not failed[0]:
                failed[0] = True
                raise BrokerError("no answer") if unknown else BrokerUnavailable("not connected")
            return call(run, timeout_s)

        broker.link.call = fails  # type: ignore[method-assign]
        if unknown:
            with pytest.raises(CommitUnknown):
                lane.settle([Done(each.receipt) for each in held])
        else:
            receipts = [each.receipt for each in held]
            assert list(lane.settle([Done(receipt) for receipt in receipts])) == receipts
        again = awaited(lane, 2)
        assert [(each.message.id, each.repeated) for each in again] == [
            (each.id, True) for each in rides
        ]
        assert list(lane.settle([Done(each.receipt) for each in again])) == []


FORKS = """
import os, sys
from tests.rabbitmq.work import broker_at, lane_of, publish, awaited, bodies
from duly.guarantees import Done

with broker_at(sys.argv[1]) as broker:
    lane = lane_of(broker)
    publish(broker, "a")
    [held] = awaited(lane)
    child = os.fork()
    if not child:
        del broker, lane, held
        import gc
        gc.collect()
        sys.exit(0)  # as a program does, whose interpreter ends in order
    assert os.waitpid(child, 0)[1] == 0
    publish(broker, "b")
    assert list(lane.settle([Done(held.receipt)])) == [], "the claim is lost"
    assert bodies(awaited(lane)) == ["b"]
print("went on")
"""


def test_a_child_that_ends_does_not_end_its_parents_connections(rabbit_url: str):
    ended = subprocess.run(
        [sys.executable, "-c", FORKS, rabbit_url],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
    )
    assert "went on" in ended.stdout, ended.stderr

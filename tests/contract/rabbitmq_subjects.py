"""How RabbitMQ is opened, aged and restarted: what an author of a broker writes."""

from __future__ import annotations

import atexit
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from duly.broker import Broker, Knows
from duly.brokers.rabbitmq import RabbitMQBroker
from duly.brokers.rabbitmq.delays import Delays, bind_level
from duly.brokers.rabbitmq.link import Connection
from duly.brokers.rabbitmq.topology import declare_queue
from duly.inspection.graves import Buries
from duly.inspection.survey import Surveys
from duly.testing.conformance import BrokerSubject, Site
from duly.testing.conformance.subject import Clock
from tests.servers.rabbitmq import channel, in_namespace
from tests.waiting import eventually


class TickingClock(Clock):
    """The server's timers cannot be told the time, so what waits goes on when this clock passes."""

    def __init__(self) -> None:
        super().__init__()
        self.due: dict[str, tuple[float, str]] = {}
        self.broker: RabbitMQBroker | None = None

    def advance(self, seconds: float) -> None:
        super().advance(seconds)
        for queue in [queue for queue, (due, _) in self.due.items() if due <= self()]:
            release(queue, self.due.pop(queue)[1])


@functools.cache
def _operator() -> Any:
    """A channel on which every publish is confirmed, for the length of the run."""
    opened = channel()
    waiting = opened.__enter__()
    atexit.register(opened.__exit__, None, None, None)
    waiting.confirm_select()
    return waiting


def release(queue: str, onward: str) -> None:
    """What the server does with all of a queue whose time has come."""
    waiting, confirmed = _operator(), []
    waiting.events["basic_ack"] = {lambda *told: confirmed.append(told)}
    while (message := waiting.basic_get(queue)) is not None:
        tag, key = message.delivery_tag, message.delivery_info["routing_key"]
        waiting.basic_publish(message, onward, key, mandatory=True)
        while not confirmed:
            waiting.connection.drain_events(timeout=30)
        confirmed.clear()
        waiting.basic_ack(tag)
    waiting.queue_delete(queue)


def bury(broker: RabbitMQBroker) -> None:
    """The process of a broker dies, and takes its sockets along; returns when the server has
    noticed.
    """
    queues = [queue for intake in broker._intakes.values() for queue in intake.queues]
    broker.abandon()
    eventually(
        lambda: not any(consumers for _, consumers in _told(queues)), "the server has noticed"
    )


def _told(queues: Sequence[str]) -> Iterator[tuple[int, int]]:
    for queue in queues:
        told = _operator().queue_declare(queue, passive=True)
        yield told.message_count, told.consumer_count


class ClockedDelays(Delays):
    """One level for each end of a delay, by the clock of a test: it lets go when told to."""

    clock: TickingClock

    def levels_for(self, delay_s: float, *, exactly: bool = False) -> Sequence[int]:
        due = self.clock() + delay_s
        level = math.ceil(due * 1000)
        self.clock.due[f"{self.names.namespace}/waits/{level}"] = due, self.names.onward
        return [level]

    def declare(self, connection: Connection, level: int) -> None:
        name = f"{self.names.namespace}/waits/{level}"
        declare_queue(connection, name, {})
        bind_level(connection, name, self.entry, level)


def open_broker(site: Site) -> Broker:
    url = in_namespace(site.name)
    clock = site.clock
    if clock is None:
        return RabbitMQBroker(url)
    assert isinstance(clock, TickingClock)
    if clock.broker is not None:
        bury(clock.broker)  # or it was closed
    kind: Callable[..., Any] = type("Delays", (ClockedDelays,), {"clock": clock})
    clock.broker = RabbitMQBroker(url, clock=clock, wall_ms=clock.wall_ms, delays=kind)
    return clock.broker


RABBITMQ = BrokerSubject(
    name="rabbitmq", open=open_broker, clock=TickingClock, operations=(Buries, Knows, Surveys)
)

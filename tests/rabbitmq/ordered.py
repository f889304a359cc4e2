"""A topic in order by key, and workers of it in processes of their own, whose work is recorded.

Run as a program it works the topic until it is killed: ``python -m tests.rabbitmq.ordered URL FILE
SECONDS``, each handler taking up to so long.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import amqp

from duly.broker import Delivery, Published, SubscribeOptions
from duly.brokers.rabbitmq import RabbitMQBroker
from duly.brokers.rabbitmq.ordered_lane import OrderedLane
from duly.brokers.rabbitmq.topology import Names
from duly.errors import BrokerError, CommitUnknown
from duly.guarantees import Done, Guarantee, Release, Retry, Settlement
from duly.message import Topic
from tests.rabbitmq.work import A_LOT
from tests.servers.rabbitmq import channel
from tests.waiting import eventually

PARTITIONS = 4
RIDES: Topic[str] = Topic("rides", str, guarantee="at-least-once", partitions=PARTITIONS)
IN_ORDER = SubscribeOptions(Guarantee.AT_LEAST_ONCE, order_by_key=True)
ROOT = Path(__file__).parents[2]

_never = threading.Event()


@contextlib.contextmanager
def rides_at(url: str, **more: Any) -> Iterator[RabbitMQBroker]:
    """A broker that knows the topic, and its subscription ``board`` in order by key."""
    broker = RabbitMQBroker(url, **more)
    try:
        broker.declare([RIDES])
        broker.prepare([RIDES], "board", IN_ORDER)
        yield broker
    finally:
        broker.close()


def board(broker: RabbitMQBroker, **more: Any) -> OrderedLane:
    """A lane in order by key."""
    options = SubscribeOptions(Guarantee.AT_LEAST_ONCE, order_by_key=True, **more)
    lane = broker.subscribe([RIDES], "board", options)
    assert isinstance(lane, OrderedLane)
    return lane


def publish(broker: RabbitMQBroker, key: str, *numbers: int) -> None:
    """Publish these of one key, one after the other, each until it is confirmed."""
    for number in numbers:
        message = RIDES.message(f"{key}:{number}", source="tests", id=f"{key}:{number}", key=key)
        eventually(partial(is_published, broker, message), "it is confirmed")


def is_published(broker: RabbitMQBroker, *messages: Any) -> bool:
    """Whether the server has them now."""
    return all(isinstance(outcome, Published) for outcome in broker.publish(messages))


def bodies(deliveries: Sequence[Delivery]) -> list[str]:
    return [delivery.message.body.decode() for delivery in deliveries]


class Records:
    """What processes did, in the order in which it happened: one short line each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, what: str, lane: int, body: str) -> None:
        os.write(self._file, f"{what} {os.getpid()}/{lane} {body}\n".encode())

    def read(self) -> Iterator[tuple[str, str, str, int]]:
        """What happened, by whom, to which key, and which message of it."""
        for line in self.path.read_text().splitlines():
            what, lane, body = line.split()
            key, _, number = body.partition(":")
            yield what, lane, key, int(number)

    def handled(self) -> dict[str, list[int]]:
        """Of each key what was handled, each message where it was so first."""
        found: dict[str, dict[int, None]] = defaultdict(dict)
        for what, _, key, number in self.read():
            if what == "end":
                found[key].setdefault(number)
        return {key: list(numbers) for key, numbers in found.items()}

    def check(self, expected: dict[str, int], gone: set[int]) -> None:
        """Each key was handled completely and in order, and by one at a time. Those that are gone
        may have begun something; and who was told that its claim is lost may have gone on.
        """
        handled = self.handled()
        for key, count in expected.items():
            assert handled.get(key, []) == list(range(count)), f"key {key}"
        lost = {(lane, key, number) for what, lane, key, number in self.read() if what == "lost"}
        at_work: dict[str, str] = {}
        for what, lane, key, number in self.read():
            if (lane, key, number) in lost:
                continue
            if what == "start":
                other = at_work.get(key, lane)
                assert other == lane or pid_of(other) in gone, f"two at once with {key}:{number}"
                at_work[key] = lane
            elif at_work.get(key) == lane:
                del at_work[key]


def pid_of(lane: str) -> int:
    """The process of a lane."""
    return int(lane.partition("/")[0])


class Crowd:
    """Processes that work the topic."""

    def __init__(self, url: str, path: Path, handler_s: float = 0.003) -> None:
        self.url = url
        self.records = Records(path)
        self.gone: set[int] = set()
        self._handler_s = handler_s
        self.workers: list[subprocess.Popen[bytes]] = []

    def start(self, count: int = 1) -> None:
        command = [sys.executable, "-m", "tests.rabbitmq.ordered", self.url]
        for _ in range(count):
            self.workers.append(
                subprocess.Popen([*command, str(self.records.path), str(self._handler_s)], cwd=ROOT)
            )

    def kill(self, worker: subprocess.Popen[bytes]) -> None:
        """kill -9."""
        self.gone.add(worker.pid)
        self.workers.remove(worker)
        worker.kill()
        worker.wait(30)

    def stop(self, worker: subprocess.Popen[bytes]) -> None:
        """It stands still, whatever it has in hand."""
        self.gone.add(worker.pid)
        worker.send_signal(signal.SIGSTOP)

    def someone_at_work(self) -> subprocess.Popen[bytes]:
        """Who began something last."""
        last = [lane for what, lane, _, _ in self.records.read() if what == "start"][-1]
        return next(worker for worker in self.workers if worker.pid == pid_of(last))

    def are_in_line(self) -> bool:
        """Whether the server sees all of them."""
        here = Names(self.url.partition("namespace=")[2].partition("&")[0]).present(
            "rides", "board"
        )
        with channel(self.url) as operator:
            try:
                seen = operator.queue_declare(here, passive=True).consumer_count
            except amqp.exceptions.NotFound:
                return False  # the first of them makes it
        return bool(seen == len(self.workers))

    def done(self) -> int:
        return sum(map(len, self.records.handled().values()))

    def some_more(self, count: int) -> None:
        """Wait until so many more are handled."""
        before = self.done()
        eventually(lambda: self.done() >= before + count, "work goes on", timeout_s=60.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in list(self.workers):
            self.kill(worker)


def work(url: str, records: Records, handler_s: float) -> None:
    """Handle what comes with two lanes, some of it in a second attempt only, until somebody kills
    this.
    """
    broker = RabbitMQBroker(url)
    broker.declare([RIDES])
    for number in range(2):
        lane = board(broker, lease_s=60.0)
        threading.Thread(target=work_lane, args=(lane, number, records, handler_s)).start()


def work_lane(lane: OrderedLane, number: int, records: Records, handler_s: float) -> None:
    while True:
        deliveries: Sequence[Delivery] = ()
        try:
            deliveries = lane.claim(10, A_LOT, 0.2)
            lost = set(lane.settle(settlements_of(deliveries, number, records, handler_s)))
        except (BrokerError, CommitUnknown):
            lost = {delivery.receipt for delivery in deliveries}
            _never.wait(0.05)
        for delivery in deliveries:
            if delivery.receipt in lost:
                records.write("lost", number, delivery.message.body.decode())


def settlements_of(
    deliveries: Sequence[Delivery], lane: int, records: Records, handler_s: float
) -> list[Settlement]:
    """As a worker does: what follows a failure in its key is given back."""
    ends: list[Settlement] = []
    failed = set()
    for delivery in deliveries:
        key, body = delivery.message.key, delivery.message.body.decode()
        if key in failed:
            ends.append(Release(delivery.receipt))
            continue
        records.write("start", lane, body)
        _never.wait(handler_s * random.random())
        if delivery.attempt == 1 and random.random() < 0.05:
            failed.add(key)
            records.write("fail", lane, body)
            ends.append(Retry(delivery.receipt, 0.02, "not this time"))
        else:
            records.write("end", lane, body)
            ends.append(Done(delivery.receipt))
    return ends


if __name__ == "__main__":
    work(sys.argv[1], Records(Path(sys.argv[2])), float(sys.argv[3]))

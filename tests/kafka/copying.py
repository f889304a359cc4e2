"""What tests do with `tests.kafka.copier`: start and end workers, and read what they copied."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

import duly
from duly.broker import SubscribeOptions
from duly.brokers.kafka import KafkaBroker
from duly.worker import Worker
from tests.kafka.copier import HERE, KEYS, THERE, copier
from tests.kafka.work import host_of, namespace_of
from tests.waiting import eventually

ROOT = Path(__file__).parent.parent.parent
# Who dies is noticed soon, and what it leaves open is aborted soon.
HASTY = "&session.timeout.ms=2000&heartbeat.interval.ms=400&transaction.timeout.ms=2000"


class Copied(NamedTuple):
    """One record of a topic."""

    partition: int
    offset: int
    key: str
    body: str
    headers: dict[str, bytes]


def publish(broker: str, count: int, first: int = 0) -> None:
    """So many numbers, in order, of several keys."""
    numbers = range(first, first + count)
    with copier(broker) as app:
        app.publish_many(
            HERE, numbers, ids=[str(n) for n in numbers], keys=[str(n % KEYS) for n in numbers]
        )


def read(broker: str, topic: str = THERE.name, *, committed: bool = True) -> list[Copied]:
    """All that a reader sees there now; of what is committed, or of everything."""
    with reading(broker, topic, committed=committed) as reader:
        reader.to_the_end()
        return reader.seen


class Reading:
    """Reads a topic as another program would, on and on."""

    def __init__(self, broker: str, topic: str, *, committed: bool) -> None:
        self.seen: list[Copied] = []
        self._topic = f"{namespace_of(broker)}.{topic}"
        self._consumer: Any = Consumer(
            {
                "bootstrap.servers": host_of(broker),
                "group.id": f"reading-{os.getpid()}-{id(self)}",
                "isolation.level": "read_committed" if committed else "read_uncommitted",
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "log_level": 0,
            }
        )
        there = self._consumer.list_topics(self._topic, timeout=30).topics[self._topic]
        self._places = [TopicPartition(self._topic, number, 0) for number in there.partitions]
        self._consumer.assign(self._places)
        # What is before these has been seen, where a reader like this may see it.
        self._reached = dict.fromkeys(there.partitions, 0)

    def some(self) -> None:
        """Read what is there."""
        for record in self._consumer.consume(500, 0.2):
            error = record.error()
            if error is None:
                self._reached[record.partition()] = record.offset() + 1
                self.seen.append(
                    Copied(
                        record.partition(),
                        record.offset(),
                        (record.key() or b"").decode(),
                        (record.value() or b"").decode(),
                        dict(record.headers() or ()),
                    )
                )
            elif error.code() == KafkaError._PARTITION_EOF:
                self._reached[record.partition()] = record.offset()

    def to_the_end(self) -> None:
        """Read all that a reader of this kind may see now; others may go on writing."""
        ends = self._ends()

        def ended() -> bool:
            self.some()
            return not self._left(ends)

        eventually(
            ended,
            "the topic is read to its end",
            lambda: str([(at, self._reached[at], ends[at]) for at in self._left(ends)]),
            timeout_s=90.0,
        )

    def _left(self, ends: Mapping[int, int]) -> list[int]:
        return [number for number, end in ends.items() if self._reached[number] < end]

    def _ends(self) -> Mapping[int, int]:
        """As soon as they are told: a node that has just started may not lead yet."""
        found: dict[int, int] = {}

        def told() -> bool:
            with contextlib.suppress(KafkaException):
                for place in self._places:
                    found[place.partition] = self._consumer.get_watermark_offsets(place, 30)[1]
            return len(found) == len(self._places)

        eventually(told, "the ends of a topic are told")
        return found

    def ends(self) -> int:
        """How many offsets there are for it, in all partitions."""
        return sum(self._ends().values())

    def close(self) -> None:
        self._consumer.close()


@contextlib.contextmanager
def reading(broker: str, topic: str = THERE.name, *, committed: bool = True) -> Iterator[Reading]:
    reader = Reading(broker, topic, committed=committed)
    try:
        yield reader
    finally:
        reader.close()


class Onlooker:
    """Reads what is committed while workers die."""

    def __init__(self, broker: str) -> None:
        self._reader = Reading(broker, THERE.name, committed=True)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.seen = self._reader.seen

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)
        self._reader.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._reader.some()


def check_copied(seen: Sequence[Copied], count: int) -> None:
    """Each once, and in the order of each partition."""
    numbers = [int(each.body) for each in seen]
    assert sorted(numbers) == list(range(count)), _difference(numbers, count)
    for partition in {each.partition for each in seen}:
        mine = [int(each.body) for each in seen if each.partition == partition]
        assert mine == sorted(mine), f"partition {partition} is out of order"


def _difference(numbers: Sequence[int], count: int) -> str:
    twice = sorted(number for number, times in Counter(numbers).items() if times > 1)[:20]
    missing = sorted(set(range(count)) - set(numbers))[:20]
    return f"{len(numbers)} of {count}; twice: {twice}; missing: {missing}"


class Process:
    """One process of `tests.kafka.copier`, or of another such module. ``strikes``: see there."""

    def __init__(
        self, broker: str, folder: Path, strikes: str = "", *, module: str = "copier", **more: str
    ) -> None:
        self.log = folder / f"worker-{len(list(folder.glob('worker-*')))}.txt"
        environment = {**os.environ, "COPIER_BROKER": broker, "COPIER_STRIKES": strikes, **more}
        with self.log.open("w") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"tests.kafka.{module}"],
                cwd=ROOT, env=environment, stdout=out, stderr=out,
            )  # fmt: skip

    @property
    def told(self) -> str:
        """What it wrote so far."""
        return self.log.read_text()

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def stopped(self) -> bool:
        """Whether it stands still."""
        text = Path(f"/proc/{self._process.pid}/stat").read_text()
        return text.rpartition(")")[2].split()[0] == "T"

    def stop(self) -> None:
        """Let it stand still."""
        os.kill(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self._process.pid, signal.SIGCONT)

    def kill(self) -> None:
        """Kill -9."""
        self._process.kill()
        self._process.wait(30)

    def end(self) -> None:
        """End in order."""
        self._process.terminate()
        assert self._process.wait(60) == 0, self.told

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


@contextlib.contextmanager
def working(app: duly.App) -> Iterator[Worker]:
    """A worker of this process."""
    worker = Worker(app)
    worker.start()
    try:
        yield worker
    finally:
        worker.drain()
        app.close()


def is_done(app: duly.App) -> bool:
    """Whether the positions of its consumers stand behind all that was published."""
    broker, _ = app.backends()
    assert isinstance(broker, KafkaBroker)
    for consumer in app.consumers:
        options = SubscribeOptions(consumer.guarantee)
        broker.know(consumer.topics, consumer.name, options)
    lags = [each.backlog for each in broker.queued()]
    return len(lags) == len(app.consumers) and not any(lags)


def copy_all(broker: str, count: int) -> None:
    """Copy what is left, by a worker that nothing happens to."""
    app = copier(broker)
    with working(app):
        eventually(
            lambda: len(read(broker)) >= count and is_done(app),
            "all are copied", lambda: str(len(read(broker))), 60,
        )  # fmt: skip

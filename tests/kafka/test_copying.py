"""Kafka's own test of its transactions, told again: a topic is copied while clients and the broker
are killed, and what another program reads is the same, each once and in order.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from tests.kafka.copier import THERE, copier
from tests.kafka.copying import Onlooker, Process, check_copied, publish, read
from tests.servers.kafka import KafkaNode, in_namespace
from tests.waiting import eventually

COUNT = 100_000
OPTIONS = "&session.timeout.ms=6000&heartbeat.interval.ms=1000"


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_hundred_thousand_are_copied_while_all_are_killed(kafka_node: KafkaNode, tmp_path: Path):
    broker = in_namespace("copying", kafka_node.url) + OPTIONS
    publish(broker, COUNT)
    with copier(broker) as app:
        app.backends()[0].declare([THERE])
    with Onlooker(broker) as onlooker, contextlib.ExitStack() as stack:

        def worker() -> Process:
            return stack.enter_context(Process(broker, tmp_path))

        def are_seen(count: int) -> bool:
            for number, each in enumerate(workers):
                if each.ended:  # none starts while there is no broker
                    workers[number] = worker()
            return len(onlooker.seen) >= count

        def reached(count: int) -> None:
            eventually(
                lambda: are_seen(count), f"{count:,} are copied",
                lambda: f"{len(onlooker.seen):,} {workers[-1].told[-2000:]}", 240,
            )  # fmt: skip

        workers = [worker() for _ in range(3)]
        for turn in range(1, 10):
            reached(COUNT * turn // 10)
            if turn % 3 == 0:
                kafka_node.kill()
                kafka_node.start()
                continue
            oldest = workers.pop(0)
            if turn % 3 == 1:
                oldest.kill()
            else:
                oldest.end()
            workers.append(worker())
        reached(COUNT)
        for each in workers:
            each.end()
    check_copied(onlooker.seen, COUNT)
    check_copied(read(broker), COUNT)

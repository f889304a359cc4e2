"""The server killed and restarted: nothing is lost, and nothing that was settled comes again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Self

import pytest

from duly.broker import Published, SubscribeOptions
from duly.brokers.kafka import KafkaBroker
from duly.errors import BrokerError, CommitUnknown
from duly.guarantees import Done, Guarantee
from tests.kafka.work import A_LOT, OPTIONS, ORDERS, awaited, bodies, broker_at, message
from tests.servers.kafka import KafkaNode, in_namespace
from tests.waiting import eventually

PATIENT = "&session.timeout.ms=60000"
HASTY = "&session.timeout.ms=6000&heartbeat.interval.ms=1000"


class Producer:
    """Publishes on a thread, each message until it is confirmed."""

    def __init__(self, broker: KafkaBroker) -> None:
        self.confirmed: set[str] = set()
        self.repeated = 0
        self._broker = broker
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive(), "publishing hangs"

    def _run(self) -> None:
        number = 0
        while not self._stop.is_set():
            batch = [message(str(n), id=str(n), key=str(n)) for n in range(number, number + 20)]
            number += 20
            while batch and not self._stop.is_set():
                outcomes = self._broker.publish(batch)
                pairs = list(zip(batch, outcomes, strict=True))
                self.confirmed |= {m.id for m, o in pairs if isinstance(o, Published)}
                batch = [m for m, outcome in pairs if not isinstance(outcome, Published)]
                self.repeated += len(batch)


@pytest.mark.slow
def test_what_was_confirmed_survives_the_server(kafka_node: KafkaNode):
    """Publishers and a consumer work on while the only node is killed twice."""
    with broker_at(in_namespace("survives", kafka_node.url)) as broker:
        lane = broker.subscribe([ORDERS], "sub", OPTIONS)
        handled: list[str] = []
        settled: set[str] = set()
        again: list[str] = []

        def work_until(reached: Callable[[], bool], what: str) -> None:
            # Who is thrown out meanwhile waits for who it was before: for a session, 45 s.
            eventually(lambda: some() and reached(), what, lambda: str(len(settled)), 120.0)

        def some() -> bool:
            try:
                held = lane.claim(50, A_LOT, 0.2)
                handled.extend(bodies(held))
                again.extend(body for body in bodies(held) if body in settled)
                refused = set(lane.settle([Done(each.receipt) for each in held]))
                settled.update(each.message_id for each in held if each.receipt not in refused)
            except (BrokerError, CommitUnknown):
                pass  # until it is back
            return True

        def goes_on(before: int) -> None:
            work_until(lambda: len(producer.confirmed) > before + 200, "it goes on")

        with Producer(broker) as producer:
            for _ in range(2):
                goes_on(len(producer.confirmed))
                kafka_node.kill()
                kafka_node.start()
            goes_on(len(producer.confirmed))
        work_until(lambda: settled >= producer.confirmed, "all that was confirmed is handled")
        # What was published twice, since nobody could say whether it was stored, comes twice.
        assert len(again) <= producer.repeated


@pytest.mark.long
def test_a_server_that_is_away_is_told_and_comes_back(kafka_node: KafkaNode):
    with broker_at(in_namespace("away", kafka_node.url) + PATIENT, deadline_s=3.0) as broker:
        lane = broker.subscribe([ORDERS], "sub", OPTIONS)
        broker.publish([message("a")])
        held = awaited(lane)
        kafka_node.kill()
        [outcome] = broker.publish([message("b", id="b")])
        assert not isinstance(outcome, Published)
        kafka_node.start()
        assert list(lane.settle([Done(held[0].receipt)])) == []
        eventually(
            lambda: isinstance(broker.publish([message("b", id="b")])[0], Published), "it is back"
        )


@pytest.mark.long
@pytest.mark.parametrize("guarantee", [Guarantee.AT_MOST_ONCE, Guarantee.AT_LEAST_ONCE])
def test_who_waits_is_told_that_its_partitions_are_lost(
    kafka_node: KafkaNode, guarantee: Guarantee
):
    """Also while a commit is on its way to a node that stands still, which may take it yet."""
    with broker_at(in_namespace(f"told_{guarantee}", kafka_node.url) + HASTY) as broker:
        lane = broker.subscribe([ORDERS], "sub", SubscribeOptions(guarantee))
        broker.publish([message("a")])
        [held] = awaited(lane)
        kafka_node.pause()
        try:
            with pytest.raises(CommitUnknown, match="another's by now"):
                lane.settle([Done(held.receipt)])
            assert list(lane.settle([Done(held.receipt)])) == [held.receipt]
        finally:
            kafka_node.go_on()

"""How Kafka is opened and restarted: what an author of a broker writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from duly.broker import Broker, Knows, SubscribeOptions
from duly.brokers.kafka import KafkaBroker
from duly.brokers.kafka.intake import Intake
from duly.brokers.kafka.lane import Lane
from duly.inspection.graves import Buries
from duly.inspection.survey import Surveys
from duly.message import Topic
from duly.testing.conformance import BrokerSubject, Site
from duly.testing.conformance.subject import Clock
from tests.servers.kafka import in_namespace


class LifeClock(Clock):
    """One process at a time: who opens the place again is its successor."""

    def __init__(self) -> None:
        super().__init__()
        self.broker: KafkaBroker | None = None


def open_broker(site: Site, kind: type[KafkaBroker] = KafkaBroker) -> Broker:
    url = in_namespace(site.name)
    clock = site.clock
    if clock is None:
        return kind(url)
    assert isinstance(clock, LifeClock)
    if clock.broker is not None:
        clock.broker.abandon()  # or it was closed
    clock.broker = kind(url, clock=clock, wall_ms=clock.wall_ms)
    return clock.broker


KAFKA = BrokerSubject(
    name="kafka", open=open_broker, clock=LifeClock, operations=(Buries, Knows, Surveys)
)


class ByBodies(KafkaBroker):
    """Whatever its lanes ask for, they are given bodies."""

    def subscribe(
        self, topics: Sequence[Topic[Any]], subscription: str, options: SubscribeOptions
    ) -> Lane:
        """As `Broker.subscribe`."""
        return super().subscribe(topics, subscription, replace(options, bodies_only=True))

    def _intake_of(
        self, topics: Sequence[Topic[Any]], subscription: str, options: SubscribeOptions
    ) -> Intake:
        intake = super()._intake_of(topics, subscription, options)
        intake.fetched.soundness.shortest = 1  # tests publish few
        return intake


def open_by_bodies(site: Site) -> Broker:
    return open_broker(site, ByBodies)


SPANS = replace(KAFKA, open=open_by_bodies)

"""How Kafka is opened and restarted: what an author of a broker writes."""

from __future__ import annotations

from duly.broker import Broker, Knows
from duly.brokers.kafka import KafkaBroker
from duly.inspection.graves import Buries
from duly.testing.conformance import BrokerSubject, Site
from duly.testing.conformance.subject import Clock
from tests.servers.kafka import in_namespace


class LifeClock(Clock):
    """One process at a time: who opens the place again is its successor."""

    def __init__(self) -> None:
        super().__init__()
        self.broker: KafkaBroker | None = None


def open_broker(site: Site) -> Broker:
    url = in_namespace(site.name)
    clock = site.clock
    if clock is None:
        return KafkaBroker(url)
    assert isinstance(clock, LifeClock)
    if clock.broker is not None:
        clock.broker.abandon()  # or it was closed
    clock.broker = KafkaBroker(url, clock=clock, wall_ms=clock.wall_ms)
    return clock.broker


KAFKA = BrokerSubject(name="kafka", open=open_broker, clock=LifeClock, operations=(Buries, Knows))

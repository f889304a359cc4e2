"""What an app does and has before it, as Prometheus metrics: ``pip install 'duly[prometheus]'``.

::

    import duly.metrics

    duly.metrics.watch(app)  # counted in prometheus_client.REGISTRY

``duly run --metrics 9100`` does that in every worker and serves it. Counters follow what
`duly.events` tells in this process; gauges are read from the broker whenever somebody scrapes,
and are the same whichever process is asked. Labels are names of apps, topics and consumers.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from duly import events
from duly.app import App
from duly.errors import ConfigurationError
from duly.guarantees import Dead, Done, Guarantee, Release, Retry
from duly.inspection import Inspection, Observing
from duly.store import outbox_of, parked_beside, with_parked

try:
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, start_http_server
    from prometheus_client.core import GaugeMetricFamily
    from prometheus_client.registry import Collector
except ModuleNotFoundError as error:
    if error.name != "prometheus_client":
        raise
    raise ConfigurationError(
        "metrics need the package prometheus_client: pip install 'duly[prometheus]'"
    ) from None

log = logging.getLogger("duly.metrics")

_TOPIC = ("app", "topic")
_CONSUMER = ("app", "consumer")


class Counters:
    """The counters of one registry; all apps that are watched share them.

    What happens is counted in the process in which it happens, from its start on.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, labels: Iterable[str] = _CONSUMER) -> Counter:
            return Counter(f"duly_{name}", text, labels, registry=registry)

        self.published = counter("published", "Messages made durable.", _TOPIC)
        self.publish_repeats = counter(
            "publish_repeats", "Publishes dropped as repeats of an earlier one.", _TOPIC
        )
        self.publish_errors = counter(
            "publish_errors", "Publishes refused, or of unknown outcome.", _TOPIC
        )
        self.publish_drops = counter(
            "publish_drops", "At-most-once messages dropped unsent.", _TOPIC
        )
        self.publish_seconds = counter("publish_seconds", "Time spent storing them.", _TOPIC)
        self.claimed = counter("claimed", "Messages claimed.")
        self.handled = counter("handled", "Messages for which the handler returned.")
        self.handler_seconds = counter("handler_seconds", "Time spent in the handler.")
        self.failures = counter(
            "failures",
            "Calls of the handler that raised, and what that means for the message.",
            (*_CONSUMER, "then"),
        )
        self.settled = counter("settled", "Messages settled.", (*_CONSUMER, "as"))
        self.settle_seconds = counter("settle_seconds", "Time spent settling, beside commits.")
        self.settles_refused = counter("settles_refused", "Settlements after the claim was lost.")
        self.leases_lost = counter("leases_lost", "Messages whose lease could not be extended.")
        self.repeats_suppressed = counter(
            "repeats_suppressed", "Redeliveries that had taken effect before."
        )
        self.commits = counter("commits", "Transactions committed.")
        self.commit_published = counter("commit_published", "Messages published by handlers' tx.")
        self.rollbacks = counter("rollbacks", "Transactions rolled back.")
        self.relayed = counter("relayed", "Outbox messages that the broker confirmed.", ("app",))
        self.relay_refusals = counter(
            "relay_refusals", "Outbox messages that the broker refused.", ("app",)
        )


@dataclass(frozen=True, slots=True)
class _Watcher:
    """Counts the events of one app."""

    app: str
    counters: Counters
    loses: Callable[[str], bool]

    def __call__(self, event: events.Event) -> None:
        counters = self.counters
        match event:
            case events.Published(topic, count, repeats, seconds):
                counters.published.labels(self.app, topic).inc(count)
                counters.publish_repeats.labels(self.app, topic).inc(repeats)
                counters.publish_seconds.labels(self.app, topic).inc(seconds)
            case events.PublishErred(topic, messages):
                counters.publish_errors.labels(self.app, topic).inc(len(messages))
            case events.PublishDropped(topic, count):
                counters.publish_drops.labels(self.app, topic).inc(count)
            case events.Relayed(count, repeats):
                counters.relayed.labels(self.app).inc(count + repeats)
            case events.RelayRefused():
                counters.relay_refusals.labels(self.app).inc()
            case _:
                self._count_consumer(event)

    def _count_consumer(self, event: events.ConsumerEvent) -> None:
        counters, labels = self.counters, (self.app, event.consumer)
        match event:
            case events.Claimed(_, deliveries):
                counters.claimed.labels(*labels).inc(len(deliveries))
            case events.Handled(_, count, seconds):
                counters.handled.labels(*labels).inc(count)
                counters.handler_seconds.labels(*labels).inc(seconds)
            case events.HandlerFailed(_, _, _, retry_in_s):
                then = "retry" if retry_in_s is not None else self._end_of(event.consumer)
                counters.failures.labels(*labels, then).inc()
            case events.Settled(_, _, _, seconds):
                self._count_settled(event)
                counters.settle_seconds.labels(*labels).inc(seconds)
            case events.SettleRefused(_, receipts):
                counters.settles_refused.labels(*labels).inc(len(receipts))
            case events.LeaseLost(_, receipts):
                counters.leases_lost.labels(*labels).inc(len(receipts))
            case events.RepeatsSuppressed(_, deliveries):
                counters.repeats_suppressed.labels(*labels).inc(len(deliveries))
            case events.Committed(_, _, published):
                counters.commits.labels(*labels).inc()
                counters.commit_published.labels(*labels).inc(published)
            case events.RolledBack():
                counters.rollbacks.labels(*labels).inc()

    def _end_of(self, consumer: str) -> str:
        return "lost" if self.loses(consumer) else "dead"

    def _count_settled(self, event: events.Settled) -> None:
        left = set(event.refused)
        sums = dict.fromkeys(("done", "retry", "dead", "release"), 0)
        for settlement in event.settlements:
            if settlement.receipt in left:
                left.discard(settlement.receipt)
                continue
            match settlement:
                case Done():
                    sums["done"] += settlement.count
                case Retry():
                    sums["retry"] += 1
                case Dead():
                    sums["dead"] += 1
                case Release():
                    sums["release"] += 1
        sums["done"] -= len(left)  # of a span, whose messages have receipts of their own
        for name, count in sums.items():
            if count > 0:
                self.counters.settled.labels(self.app, event.consumer, name).inc(count)


class _Gauges(Collector):
    """What the watched apps have before them, read from their brokers at each scrape."""

    def __init__(self) -> None:
        self.apps: weakref.WeakSet[App] = weakref.WeakSet()

    def describe(self) -> Iterable[Any]:
        """Nothing: without this the registry would ask the broker when it is registered."""
        return ()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """One family a gauge, with a value for each topic of each consumer."""
        families = {
            name: GaugeMetricFamily(f"duly_{name}", text, labels=labels)
            for name, (text, labels) in _GAUGES.items()
        }
        for app in sorted(self.apps, key=lambda app: app.name):
            try:
                found = list(_read(app))
            except Exception:  # a scrape goes on: what was counted here is still true
                log.exception("the broker of app %s could not be asked", app.name)
                found = [("readable", (app.name,), 0.0)]
            for name, labels, value in found:
                families[name].add_metric(labels, value)
        yield from families.values()


_FLOW = ("app", "consumer", "topic")
_GAUGES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "readable": ("Whether the broker could be asked for the gauges of this app.", ("app",)),
    "backlog": ("Messages that wait to be claimed.", _FLOW),
    "in_flight": ("Messages that are claimed.", _FLOW),
    "parked": ("Messages that wait for a retry, a due time or another of their key.", _FLOW),
    "parked_oldest_age_seconds": (
        "Age of the oldest message of a log that waits in the store for a retry.",
        _FLOW,
    ),
    "dead_letters": ("Messages given up on.", _FLOW),
    "oldest_age_seconds": ("Age of the oldest message that is not done.", _FLOW),
    "incidents": ("Messages that met this, as far back as it is kept.", ("app", "of", "kind")),
    "outbox_unsent": ("Messages on their way to the broker.", ("app",)),
    "outbox_given_up": ("Messages that the broker will not take.", ("app",)),
    "outbox_oldest_age_seconds": ("Age of the oldest unsent message.", ("app",)),
}

_Sample = tuple[str, tuple[str, ...], float]


def _read(app: App) -> Iterator[_Sample]:
    broker, store = app.backends()
    yield "readable", (app.name,), 1.0
    parked = parked_beside(broker, store)
    waiting = () if parked is None else parked.waiting()
    for each in waiting:
        labels = (app.name, each.consumer, each.topic)
        yield "parked_oldest_age_seconds", labels, _age_s(each.oldest_ms)
        if not isinstance(broker, Inspection):
            yield "parked", labels, each.parked + each.in_flight
    if isinstance(broker, Inspection):
        for state in with_parked(broker.subscriptions(), waiting):
            labels = (app.name, state.name, state.topic)
            yield "backlog", labels, state.backlog
            yield "in_flight", labels, state.in_flight
            yield "parked", labels, state.parked
            yield "dead_letters", labels, state.dead
        for (of, kind), count in broker.incident_counts().items():
            yield "incidents", (app.name, of, kind), count
    if isinstance(broker, Observing):
        for (consumer, topic), oldest_ms in broker.oldest().items():
            yield "oldest_age_seconds", (app.name, consumer, topic), _age_s(oldest_ms)
    apart = store is not None and store.capabilities.database != broker.capabilities.database
    outbox = outbox_of(store) if store is not None and apart else None
    if outbox is not None:
        backlog = outbox.backlog()
        yield "outbox_unsent", (app.name,), backlog.unsent
        yield "outbox_given_up", (app.name,), backlog.given_up
        if backlog.oldest_ms is not None:
            yield "outbox_oldest_age_seconds", (app.name,), _age_s(backlog.oldest_ms)


def _age_s(time_ms: int) -> float:
    return max(0.0, time.time() - time_ms / 1000)


_lock = threading.Lock()
_watching: weakref.WeakKeyDictionary[CollectorRegistry, tuple[Counters, _Gauges]] = (
    weakref.WeakKeyDictionary()
)


def watch(app: App, registry: CollectorRegistry = REGISTRY) -> None:
    """From now on, count what ``app`` does and show what it has before it in ``registry``.

    Again for the same registry is harmless. Costs about two microseconds an event, and events
    come by the batch; nothing where it was never called.
    """
    with _lock:
        if registry not in _watching:
            gauges = _Gauges()
            registry.register(gauges)
            _watching[registry] = Counters(registry), gauges
        counters, gauges = _watching[registry]
        if app not in gauges.apps:
            gauges.apps.add(app)
            app.watchers.append(_Watcher(app.name, counters, _losing(app)))


def _losing(app: App) -> Callable[[str], bool]:
    """Whether a failure loses the message. By weak reference: the app holds its watchers."""
    held = weakref.ref(app)

    def loses(consumer: str) -> bool:
        living = held()
        return living is not None and any(
            each.name == consumer and each.guarantee is Guarantee.AT_MOST_ONCE
            for each in living.consumers
        )

    return loses


@contextlib.contextmanager
def serve(
    port: int, host: str = "127.0.0.1", registry: CollectorRegistry = REGISTRY
) -> Iterator[int]:
    """While this lasts, serve the registry at ``http://host:port/metrics``; gives the port.

    Port 0 is a free one. Raises `OSError` where the port is taken.
    """
    server, thread = start_http_server(port, host, registry)
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

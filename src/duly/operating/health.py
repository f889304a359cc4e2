"""What endangers the promises of an app where it runs: broker, store, contract, what is stuck."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from duly.broker import Broker
from duly.consumer import Consumer
from duly.contract import Run, contract_on, survey_of
from duly.contract.setting import Setting
from duly.errors import DulyError
from duly.guarantees import Admission
from duly.inspection import Observing
from duly.inspection.health import Examining, Finding
from duly.inspection.steering import Steering
from duly.message import Topic
from duly.schedules import Schedule, ticking
from duly.store import Store, parked_of


def examine(
    backends: tuple[Broker, Store | None],
    topics: Sequence[Topic[Any]],
    consumers: Sequence[Consumer],
    schedules: Sequence[Schedule],
) -> Iterator[Finding]:
    """Everything that can be seen; changes nothing."""
    broker, store = backends
    yield from _of_backend("broker", broker.capabilities.name, broker)
    apart = store is not None and store.capabilities.database != broker.capabilities.database
    if store is not None and apart:
        yield from _of_backend("store", store.capabilities.name, store)
    yield from _server(broker, topics, consumers)
    yield _contract(broker, store, topics, consumers, schedules)
    if isinstance(broker, Steering):
        yield from _subscriptions(broker, consumers)
    if isinstance(broker, Observing):
        yield from _stuck(broker)
    if store is not None:
        yield from _left_parked(broker, store, consumers)


def _left_parked(broker: Broker, store: Store, consumers: Sequence[Consumer]) -> Iterator[Finding]:
    """What a consumer by cursor has parked and nobody takes, since it is that no more."""
    setting = Setting(broker.capabilities, store.capabilities, Run())
    takes = {
        (consumer.name, topic.name)
        for consumer in consumers
        if setting.admission(consumer) is Admission.BY_CURSOR
        for topic in consumer.topics
    }
    parked = parked_of(store)
    for each in () if parked is None else parked.waiting():
        if (each.consumer, each.topic) not in takes:
            yield Finding(
                "warning",
                f"consumer {each.consumer}",
                f"{each.parked + each.in_flight:,} messages of {each.topic} wait in the store for "
                "a retry, and no consumer of this app takes them",
                "Let the consumer that parked them work, of this name, by cursor, on this topic.",
            )


def _of_backend(which: str, name: str, backend: object) -> Iterator[Finding]:
    yield Finding("ok", which, f"{name}: reachable")
    if isinstance(backend, Examining):
        for finding in backend.examine():
            yield Finding(finding.level, f"{which}, {finding.what}", finding.found, finding.remedy)


def _server(
    broker: Broker, topics: Sequence[Topic[Any]], consumers: Sequence[Consumer]
) -> Iterator[Finding]:
    """What the contract knows of the broker's server, and what it does not."""
    try:
        survey = survey_of(broker, topics, consumers)
    except DulyError as error:
        yield Finding("wrong", "server", str(error))
        return
    for seen in survey.seen:
        yield Finding("ok", "server", seen)
    for unseen in survey.unseen:
        yield Finding("warning", "server", unseen)
    for limit in survey.limits:
        yield Finding("warning", "server", limit.found, _sentence(limit.remedy))
    for peril in survey.perils:
        yield Finding("wrong", "server", peril.found, _sentence(peril.remedy))


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _contract(
    broker: Broker,
    store: Store | None,
    topics: Sequence[Topic[Any]],
    consumers: Sequence[Consumer],
    schedules: Sequence[Schedule],
) -> Finding:
    try:
        contract_on(broker, store, topics, consumers, Run(supervised=True), schedules)
        if schedules:
            ticking(broker, schedules)
    except DulyError as error:
        return Finding("wrong", "contract", str(error).partition("\n")[0], "See duly contract.")
    return Finding("ok", "contract", f"kept for {len(consumers)} consumers")


def _subscriptions(broker: Steering, consumers: Sequence[Consumer]) -> Iterator[Finding]:
    recorded = broker.recorded()
    for consumer in consumers:
        was = recorded.get(consumer.name)
        if was is not None and was != consumer.guarantee.value:
            yield Finding(
                "wrong",
                f"consumer {consumer.name}",
                f"declared {consumer.guarantee.value}, and its subscription is recorded as {was}",
                "Give the consumer another name, or its guarantee back; or remove the "
                "subscription (duly drop).",
            )
    for each in broker.steered():
        again = "" if each.state == "paused" else " and not finished: nothing of it is claimed"
        remedy = "duly resume" if each.state == "paused" else "Run the same command again."
        yield Finding(
            "warning", f"consumer {each.subscription}", f"{each.state} since "
            f"{each.since.isoformat(timespec='seconds')}{again}", remedy,
        )  # fmt: skip


def _stuck(broker: Observing) -> Iterator[Finding]:
    for holder in broker.holders():
        if not holder.alive:
            yield Finding(
                "warning",
                f"consumer {holder.subscription}",
                f"{holder.messages:,} messages of {holder.topic} are claimed by a worker that is "
                f"dead ({holder.worker})",
                "Start a worker: it takes them over at once.",
            )

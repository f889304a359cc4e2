"""The contract: what each topic and consumer was promised, what keeps it, and its limits.

Computed from the real broker and store when an app starts. `contract_of` is pure: no clock, no I/O;
`contract_on` asks the broker before. What cannot be kept raises `ContractRefused` with the reason
and the remedy; nothing is weakened.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from duly.broker import Broker, Capabilities
from duly.consumer import Consumer
from duly.contract.flows import flow_of
from duly.contract.promises import consumer_terms, notes_on, schedule_terms, topic_terms
from duly.contract.refusals import Refusal, refusals_of, refused
from duly.contract.setting import Run, Setting
from duly.contract.terms import ConsumerTerms, Contract, Flow, ScheduleTerms, TopicTerms
from duly.contract.text import render
from duly.inspection.survey import Survey, Surveys
from duly.message import Topic
from duly.schedules import Schedule
from duly.store import Store, StoreCapabilities

__all__ = [
    "ConsumerTerms",
    "Contract",
    "Flow",
    "Refusal",
    "Run",
    "ScheduleTerms",
    "TopicTerms",
    "contract_of",
    "contract_on",
    "render",
    "survey_of",
]

_UNSUPERVISED = Run()
_NOTHING = Survey()


def contract_on(
    broker: Broker,
    store: Store | None,
    topics: Sequence[Topic[Any]],
    consumers: Sequence[Consumer],
    run: Run = _UNSUPERVISED,
    schedules: Sequence[Schedule] = (),
) -> Contract:
    """As `contract_of`, on this open broker and store, whose server is looked at where it can be
    configured against the promises. Raises `BrokerError` too.
    """
    able = None if store is None else store.capabilities
    survey = survey_of(broker, topics, consumers)
    return contract_of(broker.capabilities, able, topics, consumers, run, schedules, survey)


def survey_of(
    broker: Broker, topics: Sequence[Topic[Any]], consumers: Sequence[Consumer]
) -> Survey:
    """What is found on the broker's server, where it can be configured against the promises.

    Raises as `Surveys.survey`.
    """
    if not isinstance(broker, Surveys):
        return _NOTHING
    wanted = {each.name: [topic.name for topic in each.topics] for each in consumers}
    return broker.survey(_every_topic(topics, consumers), wanted)


def contract_of(
    broker: Capabilities,
    store: StoreCapabilities | None,
    topics: Sequence[Topic[Any]],
    consumers: Sequence[Consumer],
    run: Run = _UNSUPERVISED,
    schedules: Sequence[Schedule] = (),
    survey: Survey = _NOTHING,
) -> Contract:
    """The contract of these topics, consumers and schedules on this broker and store.

    ``topics`` are those the app publishes to; the consumers' own are added. ``survey`` is what was
    found on the broker's server. Raises `ContractRefused`, naming everything that cannot be kept,
    each with its remedy.
    """
    setting = Setting(broker, store, run, survey)
    every = _every_topic(topics, consumers)
    if complaints := list(refusals_of(setting, every, consumers)):
        raise refused(setting, complaints)
    return Contract(
        broker=broker.name,
        store=None if store is None else store.name,
        notes=tuple(notes_on(setting)),
        topics=tuple(topic_terms(setting, topic, consumers) for topic in every),
        consumers=tuple(consumer_terms(setting, consumer) for consumer in consumers),
        flows=tuple(
            flow_of(setting, topic, consumer) for consumer in consumers for topic in consumer.topics
        ),
        schedules=tuple(schedule_terms(setting, schedule) for schedule in schedules),
    )


def _every_topic(
    topics: Sequence[Topic[Any]], consumers: Sequence[Consumer]
) -> Sequence[Topic[Any]]:
    found = {topic.name: topic for topic in topics}
    for consumer in consumers:
        for topic in consumer.topics:
            found.setdefault(topic.name, topic)
    return list(found.values())

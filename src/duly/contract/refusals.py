"""What cannot be kept here: each refusal with its reason and its remedy."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from duly.consumer import Consumer
from duly.contract.setting import Setting, consumers_of, duration, size
from duly.errors import ContractRefused
from duly.guarantees import Admission, Guarantee
from duly.inspection.survey import Peril
from duly.message import Topic


@dataclass(frozen=True, slots=True)
class Refusal:
    """Something asked for that cannot be kept: of what, why, and what to do."""

    subject: str
    reason: str
    remedy: str


def refused(setting: Setting, complaints: Sequence[Refusal]) -> ContractRefused:
    """The error that names all of them: mending one at a time wastes a start each."""
    store = "no store" if setting.store is None else f"store {setting.store.name}"
    lines = [f"refused to start on broker {setting.broker.name} with {store}:"]
    for each in complaints:
        lines += [f"  {each.subject}: {each.reason}.", f"    Remedy: {each.remedy}."]
    return ContractRefused("\n".join(lines))


def refusals_of(
    setting: Setting, topics: Sequence[Topic[Any]], consumers: Sequence[Consumer]
) -> Iterator[Refusal]:
    """Everything these topics and consumers ask for that cannot be kept here."""
    if setting.run.processes > 1 and not setting.broker.durable:
        yield Refusal(
            f"processes={setting.run.processes}",
            f"{setting.broker.name} keeps its messages in one process; each would have its own",
            "run one process, or use a broker that processes share (sqlite:///...)",
        )
    for name, count in Counter(consumer.name for consumer in consumers).items():
        if count > 1:
            yield Refusal(
                f"consumer {name!r}",
                f"{count} consumers have this name, which is their subscription: each would "
                "see only some of the messages",
                "give each a name of its own",
            )
    for topic in topics:
        yield from _of_topic(setting, topic)
        if setting.nobody_drops_repeats(topic):
            for consumer in consumers_of(topic, consumers):
                yield from _of_repeats(setting, topic, consumer)
    for consumer in consumers:
        yield from _of_consumer(setting, consumer)
    for peril in setting.survey.perils:
        yield from _of_peril(peril, topics, consumers)


# --- the server


def _of_peril(
    peril: Peril, topics: Sequence[Topic[Any]], consumers: Sequence[Consumer]
) -> Iterator[Refusal]:
    """A setting of the server's that may lose what is promised not to be lost."""
    if peril.subscription is None:
        for topic in topics:
            kept = topic.promise is not Guarantee.AT_MOST_ONCE
            if kept and peril.topic in (None, topic.name):
                yield Refusal(f"topic {topic.name!r} ({topic.promise})", peril.found, peril.remedy)
        return
    for consumer in consumers:
        kept = consumer.guarantee is not Guarantee.AT_MOST_ONCE
        if kept and consumer.name == peril.subscription:
            yield Refusal(_named(consumer), peril.found, peril.remedy)


# --- topics


def _of_topic(setting: Setting, topic: Topic[Any]) -> Iterator[Refusal]:
    broker, subject = setting.broker, f"topic {topic.name!r}"
    if topic.max_body_bytes > broker.max_message_bytes:
        yield Refusal(
            subject,
            f"it allows bodies of {size(topic.max_body_bytes)}, {broker.name} carries at most "
            f"{size(broker.max_message_bytes)}",
            f"declare max_body_bytes={broker.max_message_bytes}, and publish a reference to "
            "what is larger",
        )
    if topic.partitions and not broker.orders_by_key:
        yield Refusal(
            subject,
            f"partitions={topic.partitions}, and {broker.name} keeps no order by key",
            "declare it without partitions, or use a broker that does (sqlite:///...)",
        )
    if (
        topic.promise is Guarantee.EXACTLY_ONCE
        and broker.identity_retention
        and topic.identity_retention_s == 0
    ):
        yield Refusal(
            f"{subject} (exactly-once)",
            "identity_retention_s=0 forgets an id at once, so that no repeat would be dropped",
            "declare for how long a publish may be repeated, say identity_retention_s=7 * 86400",
        )


def _of_repeats(setting: Setting, topic: Topic[Any], consumer: Consumer) -> Iterator[Refusal]:
    """An exactly-once topic whose broker drops no repeats: its consumers have to."""
    reason = f"{setting.broker.name} drops no repeated publishes"
    if consumer.guarantee is not Guarantee.EXACTLY_ONCE:
        yield Refusal(
            f"topic {topic.name!r} (exactly-once)",
            f"{reason}, nor does consumer {consumer.name!r}, which is {consumer.guarantee} and "
            "keeps no inbox",
            f"declare the topic at-least-once, or {consumer.name!r} exactly-once, or use a "
            "broker that drops repeats (sqlite:///...)",
        )
    elif setting.admission(consumer) is Admission.BY_CLAIM:
        yield Refusal(
            f"topic {topic.name!r} (exactly-once)",
            f"{reason}, and consumer {consumer.name!r} admits by claim, which lets them pass",
            "give the app a store in another database, so that admission is by inbox",
        )


# --- consumers


def _of_consumer(setting: Setting, consumer: Consumer) -> Iterator[Refusal]:
    if consumer.guarantee is Guarantee.EXACTLY_ONCE:
        yield from _of_exactly_once(setting, consumer)
    elif consumer.options.tx_s is not None:
        yield Refusal(
            _named(consumer),
            f"tx_s={consumer.options.tx_s:g} bounds a transaction, and it has none",
            "leave tx_s out",
        )
    if consumer.options.key_lanes > 1 and consumer.guarantee is not Guarantee.EXACTLY_ONCE:
        yield Refusal(
            _named(consumer),
            f"key_lanes={consumer.options.key_lanes} is about transactions side by side, and it "
            "has none",
            "leave key_lanes out; lanes=... or concurrency=... need none",
        )
    if consumer.options.pipeline and consumer.guarantee is not Guarantee.EXACTLY_ONCE:
        yield Refusal(
            _named(consumer),
            "pipeline=True is about the statements of a transaction, and it has none",
            "leave pipeline out",
        )
    if consumer.guarantee is Guarantee.AT_MOST_ONCE and not setting.broker.settles_before_it_runs:
        yield Refusal(
            _named(consumer),
            f"{setting.broker.name} does not confirm that a message is settled and may deliver "
            "it again, so that the handler could run twice",
            "declare it exactly-once with a store, whose inbox drops the second delivery, or "
            "at-least-once with an idempotent handler",
        )
    if consumer.options.order_by_key:
        yield from _of_order(setting, consumer)
    if consumer.options.concurrency > 1:
        yield from _of_concurrency(consumer)
    yield from _of_hold(setting, consumer)


def _of_hold(setting: Setting, consumer: Consumer) -> Iterator[Refusal]:
    """A handler that the server does not wait for is run again and again, for nothing."""
    hold, in_order = setting.survey.hold, consumer.options.order_by_key
    if hold is None or not hold.known:
        return
    longest_s = hold.run_s(in_order=in_order)
    if consumer.options.max_run_s > longest_s:
        others = " or others wait behind it in order" if longest_s < hold.longest_s else ""
        yield Refusal(
            _named(consumer),
            f"max_run_s={consumer.options.max_run_s:g}, and {setting.broker.name} takes a message "
            f"back after {duration(hold.longest_s)}, while its handler runs{others}",
            f"declare max_run_s={longest_s:g} or less, or {hold.remedy}",
        )


def _of_exactly_once(setting: Setting, consumer: Consumer) -> Iterator[Refusal]:
    if setting.store is None:
        yield Refusal(
            _named(consumer),
            f"there is no store to commit its effects in, and {setting.broker.name} is no "
            "database that could be one",
            'give the app one, say App(..., store="sqlite:///effects.db"), or declare the '
            "consumer at-least-once with an idempotent handler",
        )
    elif consumer.options.pipeline and not setting.store.pipelines:
        yield Refusal(
            _named(consumer),
            f"pipeline=True, and {setting.store.name} answers each statement before the next",
            "leave pipeline out, or use a store that can (postgresql://...)",
        )
    if setting.store is not None and not setting.store.effects:
        yield from _of_effects(setting.store.name, consumer)
    if setting.admission(consumer) is Admission.BY_INBOX:
        yield from _of_inbox(setting, consumer)
    for topic in consumer.topics:
        if topic.without_identity == "accept":
            yield Refusal(
                _named(consumer),
                f'topic {topic.name!r} says without_identity="accept", and what has no identity '
                "cannot be known again when it is delivered a second time",
                "declare what names an event, Topic(..., dedup_by=...), and leave "
                "without_identity out",
            )


def _of_effects(store: str, consumer: Consumer) -> Iterator[Refusal]:
    """A handler that writes rows, where a transaction has none."""
    wanted = consumer.handler.connection
    if wanted is not None:
        name = getattr(wanted, "__qualname__", str(wanted))
        yield Refusal(
            _named(consumer),
            f"its handler writes through a {name} (tx: duly.Transaction[{name}]), and {store} "
            "cover what is published with tx.publish and the positions of the messages, no rows",
            'give the app a database as store, say App(..., store="sqlite:///effects.db"); a '
            "handler that publishes and does nothing else takes tx: duly.Transaction[None]",
        )


def _of_inbox(setting: Setting, consumer: Consumer) -> Iterator[Refusal]:
    kept_s, horizon_s = consumer.options.inbox_retention_s, setting.broker.redelivery_horizon_s
    if horizon_s is not None and kept_s < horizon_s:
        yield Refusal(
            _named(consumer),
            f"its inbox remembers for {duration(kept_s)}, and {setting.broker.name} may deliver "
            f"a message again for {duration(horizon_s)}",
            f"declare inbox_retention_s={math.ceil(horizon_s)} or more",
        )
    elif kept_s == 0:
        yield Refusal(
            _named(consumer),
            "admission is by inbox, and inbox_retention_s=0 forgets a message at once",
            "declare for how long it may come again, say inbox_retention_s=7 * 86400",
        )


def _of_order(setting: Setting, consumer: Consumer) -> Iterator[Refusal]:
    if not setting.broker.orders_by_key:
        yield Refusal(
            _named(consumer),
            f"order_by_key=True, and {setting.broker.name} keeps no order by key",
            "use a broker that does (sqlite:///...), or leave order_by_key out",
        )
        return
    if consumer.guarantee is Guarantee.AT_MOST_ONCE:
        yield Refusal(
            _named(consumer),
            "order_by_key=True, and a message is settled before its handler runs: another worker "
            "may start the next one of its key beside it",
            "declare it at-least-once, which holds the key until the handler returned, or leave "
            "order_by_key out",
        )
    if consumer.options.hold_key_on_dead and not setting.broker.holds_keys:
        yield Refusal(
            _named(consumer),
            f"hold_key_on_dead=True, and {setting.broker.name} keeps dead letters apart from what "
            "waits behind them",
            "leave it out, so that a key goes on behind its dead letter, or use a broker that "
            "holds keys (sqlite:///...)",
        )
    for topic in consumer.topics:
        if topic.without_identity == "accept":
            yield Refusal(
                _named(consumer),
                f'order_by_key=True, and topic {topic.name!r} says without_identity="accept": what '
                "nothing names cannot be told from others of its key",
                "leave one of them out, or declare Topic(..., dedup_by=...)",
            )
        if topic.partitions == 0:
            yield Refusal(
                _named(consumer),
                f"order_by_key=True, and topic {topic.name!r} has no partitions to order in",
                f"declare Topic({topic.name!r}, ..., partitions=16): as many streams of keys "
                "can be worked side by side",
            )


def _of_concurrency(consumer: Consumer) -> Iterator[Refusal]:
    asked = f"concurrency={consumer.options.concurrency}"
    if consumer.guarantee is Guarantee.EXACTLY_ONCE:
        yield Refusal(
            _named(consumer),
            f"{asked}, and the messages of one transaction run in order",
            "leave concurrency out; batch commits many messages together, which is faster",
        )
    elif consumer.handler.is_batch:
        yield Refusal(
            _named(consumer),
            f"{asked}, and a batch handler is given all claimed messages at once",
            "declare lanes=... for several batches side by side",
        )
    elif not consumer.handler.is_async:
        yield Refusal(
            _named(consumer),
            f"{asked} is for async def handlers, and this is a def",
            f"declare lanes={consumer.options.concurrency} (threads), or write it as async def",
        )


def _named(consumer: Consumer) -> str:
    return f"consumer {consumer.name!r} ({consumer.guarantee})"

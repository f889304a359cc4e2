"""What keeps each promise, and within which limits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil, inf
from typing import Any, assert_never

from duly.broker import Capabilities
from duly.consumer import Consumer, Options
from duly.contract.setting import (
    Setting,
    consumers_of,
    duration,
    in_one_crash,
    plural,
    size,
)
from duly.contract.terms import ConsumerTerms, ScheduleTerms, TopicTerms
from duly.guarantees import Admission, Guarantee
from duly.inspection.survey import Hold, Peril
from duly.message import Topic
from duly.schedules import Schedule
from duly.store import StoreCapabilities
from duly.versions import Versions


def notes_on(setting: Setting) -> Iterator[str]:
    """What holds for every topic and consumer here."""
    broker, store = setting.broker, setting.store
    if not broker.durable:
        yield (
            f"{broker.name} keeps messages in this process: its death loses all of them, "
            "whatever the guarantee. For tests and trials."
        )
    if store is not None and not store.durable:
        yield (
            f"{store.name} keeps effects in this process: its death loses all of them, with "
            "the memory of what was handled."
        )
    if broker.one_writer:
        yield (
            f"{broker.name}: one writer a file. One transaction at a time; more processes do "
            "not speed up publishing or exactly-once consumers."
        )
    if store is not None and store.one_writer and not setting.one_database:
        yield (
            f"{store.name}: one writer a file. One transaction at a time; more processes do "
            "not speed up exactly-once consumers."
        )
    yield from (
        _weakened(limit)
        for limit in setting.survey.limits
        if limit.topic is None and limit.subscription is None
    )
    yield from setting.survey.seen
    yield from setting.survey.unseen


def _weakened(limit: Peril) -> str:
    return f"{limit.found} (remedy: {limit.remedy})"


# --- topics


def topic_terms(setting: Setting, topic: Topic[Any], consumers: Sequence[Consumer]) -> TopicTerms:
    """What publishing to this topic promises here."""
    exactly = topic.promise is Guarantee.EXACTLY_ONCE
    remembers = exactly and setting.broker.identity_retention
    return TopicTerms(
        name=topic.name,
        guarantee=topic.promise,
        provided_by=_publishing(setting, topic.promise),
        drops_repeats=_drops_repeats(setting, topic, consumers) if exactly else None,
        max_body_bytes=topic.max_body_bytes,
        retention_s=topic.retention_s,
        identity_retention_s=topic.identity_retention_s if remembers else None,
        limits=tuple(_topic_limits(setting, topic)),
    )


def _publishing(setting: Setting, guarantee: Guarantee) -> str:
    match guarantee:
        case Guarantee.AT_MOST_ONCE:
            return "a bounded buffer, sent in the background and never repeated; drops are counted"
        case Guarantee.AT_LEAST_ONCE:
            return _confirmed(setting)
        case Guarantee.EXACTLY_ONCE:
            return f"{_confirmed(setting)}; after PublishUnknown, publish again under its id"
    assert_never(guarantee)


def _confirmed(setting: Setting) -> str:
    if setting.broker.durable:
        return f"confirmed: durable in {setting.broker.name} when publish returns"
    return f"confirmed: in {setting.broker.name} when publish returns"


def _drops_repeats(setting: Setting, topic: Topic[Any], consumers: Sequence[Consumer]) -> str:
    if setting.broker.identity_retention:
        kept = duration(topic.identity_retention_s)
        return f"{setting.broker.name}'s identity table (topic, source, id), for {kept}"
    readers = list(consumers_of(topic, consumers))
    if not readers:
        return (
            f"not {setting.broker.name}: the inbox of each exactly-once consumer, for as long "
            "as that remembers; other consumers of this topic are refused"
        )
    inboxes = ", ".join(f"{c.name} for {duration(c.options.inbox_retention_s)}" for c in readers)
    return f"the inbox of each consumer ({inboxes}), before the handler runs"


def _topic_limits(setting: Setting, topic: Topic[Any]) -> Iterator[str]:
    yield f"a body has at most {size(topic.max_body_bytes)}"
    if topic.retention_s:
        yield f"kept for {duration(topic.retention_s)} after every subscription is done with it"
    if topic.promise is Guarantee.AT_MOST_ONCE:
        yield "a crash of the publisher loses what its buffer holds; a full buffer drops"
    if topic.promise is Guarantee.AT_LEAST_ONCE:
        yield "publishing again after an error may store the message twice"
    if topic.promise is Guarantee.EXACTLY_ONCE:
        yield (
            "repeats are known by (source, id): give publish an id of your own for what may be "
            "published again by another process"
        )
    if topic.dedup_by is not None:
        yield f"what other programs publish is known by {_naming(topic)}, not by the id they give"
    if topic.without_identity == "accept":
        yield "what other programs publish without identity is another event at each delivery"
    if topic.partitions:
        yield f"order by key: up to {plural(topic.partitions, 'key stream')} side by side"
    if topic.versions is not None:
        yield from _versions(setting, topic.versions)
    yield from _broker_limits(setting, topic)


def _broker_limits(setting: Setting, topic: Topic[Any]) -> Iterator[str]:
    """What the broker, and its server as it is set up, make of it."""
    store = setting.store
    relayed = store is not None and store.outbox and setting.broker.relays_once
    if store is not None and relayed and setting.nobody_drops_repeats(topic):
        yield (
            f"what reaches it through {store.name}'s outbox alone (tx.publish, within=) is stored "
            "once, for readers of what is committed (read_committed); what is published directly, "
            "and again after PublishUnknown, is stored again"
        )
    if not setting.broker.replays and topic.promise is not Guarantee.AT_MOST_ONCE:
        becomes = "stored nowhere (may_go_unheard)" if topic.may_go_unheard else "refused"
        yield (
            f"a message that no subscription takes is {becomes}, and a new subscription begins "
            "with what is published after it was made"
        )
    if topic.promise is not Guarantee.AT_MOST_ONCE:
        yield from (
            _weakened(limit)
            for limit in setting.survey.limits
            if limit.topic == topic.name and limit.subscription is None
        )
    if not setting.broker.delays:
        yield f"no delays: {setting.broker.name} delivers at once"
    elif topic.partitions and not setting.broker.delays_in_order:
        yield f"no delays: {setting.broker.name} has none in order by key"


def _naming(topic: Topic[Any]) -> str:
    if isinstance(topic.dedup_by, str):
        return f"its header {topic.dedup_by!r}"
    return "what dedup_by makes of its payload"


def _versions(setting: Setting, versions: Versions[Any]) -> Iterator[str]:
    older = f"; {', '.join(versions.upcast)} are read as it" if versions.upcast else ""
    yield f"published as type {versions.type}{older}"
    if versions.unknown_type == "dead":
        yield "any other type is a dead letter"
        return
    held = ", holding up its partition" if setting.broker.retries_in_place else ""
    yield f"any other type waits, looked at every {duration(versions.look_again_s)}{held}"


# --- schedules


def schedule_terms(setting: Setting, schedule: Schedule) -> ScheduleTerms:
    """What this schedule promises here."""
    return ScheduleTerms(
        name=schedule.name,
        topic=schedule.topic.name,
        when=str(schedule.ticks),
        provided_by=(
            f"one transaction in {setting.broker.name} with the memory of the tick: by whichever "
            "worker comes first, once"
        ),
        limits=tuple(_schedule_limits(schedule)),
    )


def _schedule_limits(schedule: Schedule) -> Iterator[str]:
    missed = "tick is" if schedule.most == 1 else f"{schedule.most:,} ticks are"
    yield f"nothing ticks while no worker runs; afterwards the latest missed {missed} published"
    yield "by the wall clock: set back, it ticks nothing again and waits until it is where it was"
    if schedule.topic.promise is Guarantee.AT_MOST_ONCE:
        yield "its messages are stored durably; only consuming is at-most-once"


# --- consumers


def consumer_terms(setting: Setting, consumer: Consumer) -> ConsumerTerms:
    """What this consumer promises here."""
    admission = setting.admission(consumer)
    at_once = in_one_crash(consumer)
    inbox = admission is Admission.BY_INBOX
    return ConsumerTerms(
        name=consumer.name,
        topics=tuple(topic.name for topic in consumer.topics),
        guarantee=consumer.guarantee,
        provided_by=_consuming(setting, consumer, admission),
        admission=admission,
        inbox_retention_s=consumer.options.inbox_retention_s if inbox else None,
        crash_loses=at_once if consumer.guarantee is Guarantee.AT_MOST_ONCE else 0,
        crash_repeats=at_once if consumer.guarantee is Guarantee.AT_LEAST_ONCE else 0,
        limits=tuple(_consumer_limits(setting, consumer, admission)),
    )


def _consuming(setting: Setting, consumer: Consumer, admission: Admission | None) -> str:
    match consumer.guarantee:
        case Guarantee.AT_MOST_ONCE:
            if setting.broker.hands_out_once:
                return f"taken out of {setting.broker.name} for good, before the handler starts"
            return f"settled in {setting.broker.name}, confirmed, before the handler starts"
        case Guarantee.AT_LEAST_ONCE:
            lease = duration(consumer.options.lease_s)
            return (
                "settled after the handler returned; what a dead worker held comes again, "
                f"at the latest {lease} after its death"
            )
        case Guarantee.EXACTLY_ONCE:
            return _in_one_transaction(setting, consumer, admission)
    assert_never(consumer.guarantee)


def _in_one_transaction(setting: Setting, consumer: Consumer, admission: Admission | None) -> str:
    where = "the store" if setting.store is None else setting.store.name
    if setting.store is not None and not setting.store.effects:
        return (
            f"one transaction ({where}) with what they publish, the positions of the messages and "
            "their dead letters, fenced by the generation of the consumer's group"
        )
    start = f"one transaction in {where} with the effects, what they publish"
    if admission is Admission.BY_CLAIM:
        return f"{start} and the settlement, fenced by the claim"
    if admission is Admission.BY_CURSOR:
        return f"{start} and the log's cursor, compared and moved"
    kept = duration(consumer.options.inbox_retention_s)
    return f"{start} and the inbox's (consumer, source, id), kept {kept}"


def _consumer_limits(
    setting: Setting, consumer: Consumer, admission: Admission | None
) -> Iterator[str]:
    yield _a_crash_costs(consumer)
    if consumer.guarantee is Guarantee.AT_MOST_ONCE and setting.broker.hands_out_once:
        yield f"a restart of {setting.broker.name} loses what waits for it there"
    if admission is not None:
        yield from _exactly_once_limits(setting, consumer, admission)
    yield from _handler_limits(setting, consumer)
    yield from _order_limits(setting, consumer)
    if consumer.guarantee is not Guarantee.AT_MOST_ONCE:
        yield from (
            _weakened(limit)
            for limit in setting.survey.limits
            if limit.subscription == consumer.name
        )
    yield _retries(consumer)


def _a_crash_costs(consumer: Consumer) -> str:
    match consumer.guarantee:
        case Guarantee.AT_MOST_ONCE:
            at_risk = plural(in_one_crash(consumer), "message")
            return f"at risk in one crash: {at_risk} ({_product(consumer)})"
        case Guarantee.AT_LEAST_ONCE:
            again = plural(in_one_crash(consumer), "message")
            return f"handled again after one crash: at most {again} ({_product(consumer)})"
        case Guarantee.EXACTLY_ONCE:
            return (
                "a crash costs time and a second run; effects outside the transaction (HTTP, "
                "mail) may happen again: give them message.idempotency_key"
            )
    assert_never(consumer.guarantee)


def _product(consumer: Consumer) -> str:
    options = consumer.options
    if options.concurrency > 1:
        return f"concurrency={options.concurrency} x lanes={options.lanes}, a process"
    return f"batch={options.batch} x lanes={options.lanes}, a process"


def _exactly_once_limits(
    setting: Setting, consumer: Consumer, admission: Admission
) -> Iterator[str]:
    if admission is Admission.BY_INBOX:
        kept = duration(consumer.options.inbox_retention_s)
        if setting.broker.redelivery_horizon_s is None:
            yield (
                f"a message that {setting.broker.name} delivers again more than {kept} after it "
                "took effect is dead-lettered, not run"
            )
        if setting.broker.is_log and setting.repeats_arrive(consumer):
            yield (
                "by inbox although the source is a log: repeated publishes stand at other "
                "positions, which a cursor lets pass"
            )
    store = setting.store
    if store is not None and store.one_writer and setting.reaches_further:
        yield (
            f"only among workers on this {store.name} file: one with a file of its own, on another "
            "machine, does not see what took effect here, and nothing refuses it"
        )
    if store is not None and not setting.one_database:
        yield _through_outbox(setting, store)
    if store is not None:
        yield from store.limits
    if consumer.options.pipeline:
        yield (
            "in a pipeline: rowcount is -1 until something is fetched, and an error may be raised "
            "in a later handler; the batch is then run again without"
        )
    if store is not None and store.one_writer and consumer.options.lanes > 1:
        yield f"lanes={consumer.options.lanes} take turns: {store.name} has one writer"
    if setting.broker.is_log:
        one_writer = store is not None and store.one_writer
        yield from _side_by_side(setting.broker, consumer.options, one_writer=one_writer)


def _side_by_side(broker: Capabilities, options: Options, *, one_writer: bool) -> Iterator[str]:
    """How many transactions of a partition run at once, where the source is a log."""
    asked, lanes = options.key_lanes, options.lanes
    if asked > 1 and not broker.key_lanes:
        yield (
            f"key_lanes={asked} changes nothing: {broker.name} works the transactions of one "
            "partition one after the other"
        )
        return
    if one_writer:
        pass  # it is told for all lanes
    elif min(asked, lanes) > 1:
        at_once = plural(min(asked, lanes), "transaction")
        yield f"up to {at_once} of one partition side by side, each with keys of its own"
    elif asked > 1:
        yield f"key_lanes={asked} gains nothing yet: lanes=1 works one transaction at a time"
    elif lanes > 1:
        hint = "; key_lanes lets them run side by side" if broker.key_lanes else ""
        yield f"lanes={lanes}: transactions of one partition run one after the other{hint}"
    if asked > 1:
        yield f"key_lanes={asked} is fixed once the consumer has begun"


def _through_outbox(setting: Setting, store: StoreCapabilities) -> str:
    if not store.outbox:
        return f"tx.publish is refused: {store.name} has no outbox"
    start = f"tx.publish goes through {store.name}'s outbox: sent after the commit, and"
    if setting.broker.relays_once:
        return f"{start} stored once, for readers of what is committed (read_committed)"
    return f"{start} again under the same id after a crash in between"


def _handler_limits(setting: Setting, consumer: Consumer) -> Iterator[str]:
    limit = duration(consumer.options.max_run_s)
    if consumer.handler.is_async:
        yield f"a handler that runs for over {limit} is cancelled and retried"
    elif setting.run.supervised:
        yield f"a handler that runs for over {limit} has its process ended and replaced"
    else:
        yield (
            f"nobody ends a def handler that hangs (max_run_s is {limit}): run it with "
            "`duly run`, or make it async def"
        )
    hold = setting.survey.hold
    longest_s = inf if hold is None else hold.run_s(in_order=consumer.options.order_by_key)
    if hold is not None and not hold.known and consumer.options.max_run_s > longest_s:
        others = ", and what waits behind it," if longest_s < hold.longest_s else ""
        yield (
            f"a handler that runs for over {duration(longest_s)}{others} is started again unless "
            f"the server was told to wait, which cannot be seen: {hold.remedy}"
        )
    if hold is not None and consumer.guarantee is not Guarantee.AT_MOST_ONCE:
        yield from _claim_limits(hold, consumer)
    if consumer.handler.is_batch:
        yield "a batch handler fails as a whole; its messages come again, one call each"


def _claim_limits(hold: Hold, consumer: Consumer) -> Iterator[str]:
    """What a slow handler does to what was claimed with its message, and waits behind it."""
    options = consumer.options
    in_a_row = 1 if consumer.handler.is_batch else ceil(options.batch / options.concurrency)
    if in_a_row > 1 and in_a_row * options.max_run_s > hold.claim_s:
        each_s = hold.claim_s / in_a_row
        fits = max(1, int(hold.claim_s / options.max_run_s)) * options.concurrency
        yield (
            f"where {in_a_row} handlers in a row take over {duration(each_s)} each, what is "
            f"claimed with them is taken back after {duration(hold.longest_s)}, and comes again: "
            f"if they may, declare batch={fits} or less, or max_run_s={each_s:g}"
        )


def _order_limits(setting: Setting, consumer: Consumer) -> Iterator[str]:
    if setting.parks(consumer):
        yield (
            f"no order is promised: a retry waits in {_store_of(setting)}, parked there in the "
            "transaction that moves the cursor past it, and what is behind it goes on"
        )
        return
    by_lane = setting.broker.key_lanes and consumer.options.key_lanes > 1
    behind = "lane of keys" if by_lane else "partition"
    if not consumer.options.order_by_key:
        if setting.holds_partition(consumer):
            yield f"a retry holds up everything behind it in its {behind}"
        else:
            yield "no order is promised: retries and other workers overtake"
        return
    held = consumer.options.hold_key_on_dead
    dead = "its key waits until that is replayed or discarded" if held else "its key goes on"
    yield f"in order by key; behind a dead letter {dead}"
    if setting.holds_partition(consumer):
        yield f"a retry holds up everything behind it in its {behind}"


def _store_of(setting: Setting) -> str:
    assert setting.store is not None, "what is parked is parked in one"
    return setting.store.name


def _retries(consumer: Consumer) -> str:
    policy = consumer.options.retry
    if policy.attempts == 1:
        return "no retries: a failure is a dead letter at once"
    waits = f"{duration(policy.first_s)} to {duration(policy.longest_s)} apart"
    return f"at most {policy.attempts} attempts, {waits}, then a dead letter"

"""Admission by inbox: what has taken effect is remembered by (consumer, topic, source, id).

The whole batch goes in first, in the order of its keys so that two transactions never wait for
each other crosswise; a second copy in another transaction waits here instead of running beside
the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter

from duly.broker import Delivery, Span
from duly.guarantees import Dead, Settlement
from duly.message import body_hashes
from duly.sql.steps import Ask, Many, Steps
from duly.store import Admitted, Scope, not_done

Flow = tuple[str, str, str]
"""consumer, topic, source"""

Key = tuple[int, str]
"""The number of a flow, and an id."""

_id = itemgetter(0)

# How many remembered messages one step of `forget_old` looks at.
STRETCH = 500


@dataclass(slots=True)
class Flows:
    """The numbers of flows: those ``known`` to stand in the database, and those that this
    transaction found or made, known to all once it stands.
    """

    known: Mapping[Flow, int]
    found: dict[Flow, int] = field(default_factory=dict)

    def number(self, flow: Flow) -> Steps[int]:
        """The number of a flow, which may be a new one."""
        number = self.known.get(flow) or self.found.get(flow)
        if number is None:
            rows = yield Ask("inbox_flow", flow)
            [(number,)] = rows or (yield Ask("add_inbox_flow", flow))
            self.found[flow] = number
        return number

    def key(self, consumer: str, delivery: Delivery) -> Steps[Key]:
        """What a message is remembered by."""
        message = delivery.message
        number = yield from self.number((consumer, message.topic, message.source))
        return number, message.id


def admit(
    scope: Scope, flows: Flows, deliveries: Sequence[Delivery], now_ms: int, mark: int
) -> Steps[Admitted]:
    """Remember the deliveries and sort out those that may not run; the first statement.

    ``mark`` tells this transaction from every other.
    """
    if isinstance(deliveries, Span) and deliveries.repeated:
        deliveries = [*deliveries]  # each is looked at: as a span it would be another each time
    too_old = yield from _too_old(scope, flows, deliveries, now_ms)
    if too_old:
        deliveries = _without(deliveries, too_old)
    events, hashes = _events(scope.consumer, deliveries)
    added = 0
    for flow, of_flow in sorted(events.items()):
        number = yield from flows.number(flow)
        of_flow.sort(key=_id)  # by id alone: of two with one id, the first delivered is remembered
        added += yield Many("inbox_remember", of_flow, (number, now_ms, mark))
    if added == len(deliveries):
        return Admitted(deliveries, too_old=too_old)
    return (yield from _sort_out(scope, flows, deliveries, hashes, too_old, mark))


def _events(
    consumer: str, deliveries: Sequence[Delivery]
) -> tuple[Mapping[Flow, list[tuple[str, int]]], Sequence[int]]:
    """By flow the ids with the hashes of their bodies, and these for each delivery in order."""
    events: dict[Flow, list[tuple[str, int]]] = {}
    if isinstance(deliveries, Span):
        topic, sources, ids = deliveries.identities
        hashes = body_hashes(deliveries.bodies)
        if len(set(sources)) == 1:
            events[consumer, topic, sources[0]] = [*zip(ids, hashes, strict=True)]
        else:
            for source, id, hash in zip(sources, ids, hashes, strict=True):
                events.setdefault((consumer, topic, source), []).append((id, hash))
        return events, hashes
    messages = [delivery.message for delivery in deliveries]
    hashes = body_hashes([message.body for message in messages])
    for message, hash in zip(messages, hashes, strict=True):
        flow = consumer, message.topic, message.source
        events.setdefault(flow, []).append((message.id, hash))
    return events, hashes


def _sort_out(
    scope: Scope,
    flows: Flows,
    deliveries: Sequence[Delivery],
    hashes: Sequence[int],
    too_old: Sequence[Delivery],
    mark: int,
) -> Steps[Admitted]:
    """Which were there before: by another transaction, or by an equal one of this batch.

    What was given up on has a mark below zero: so often. Replayed as often, it may run again.
    """
    ours: set[Key] = set()
    fresh: list[Delivery] = []
    repeated: list[Delivery] = []
    conflicting: list[Delivery] = []
    dead: list[Delivery] = []
    for delivery, hash in zip(deliveries, hashes, strict=True):
        key = yield from flows.key(scope.consumer, delivery)
        [(first_hash, first_mark)] = yield Ask("inbox_known", key)
        if first_mark == mark and key not in ours:
            ours.add(key)
            fresh.append(delivery)
        elif first_hash != hash:
            conflicting.append(delivery)
        elif first_mark >= 0:
            repeated.append(delivery)
        elif delivery.replays < -first_mark:
            dead.append(delivery)
        else:
            yield Ask("inbox_mark", (mark, *key, first_mark))
            ours.add(key)
            fresh.append(delivery)
    return Admitted(fresh, repeated, conflicting, too_old, dead)


def _too_old(
    scope: Scope, flows: Flows, deliveries: Sequence[Delivery], now_ms: int
) -> Steps[Sequence[Delivery]]:
    """Marked as repeated, older than the inbox remembers, and not remembered."""
    # Only the broker's own mark makes a stranger suspicious: after a long backlog a first
    # delivery may be of any age.
    if isinstance(deliveries, Span):
        return ()  # not repeated
    since_ms = now_ms - int(scope.inbox_retention_s * 1000)
    suspects = [d for d in deliveries if d.repeated and d.message.time_ms < since_ms]
    strangers: list[Delivery] = []
    for delivery in suspects:
        known = yield Ask("inbox_known", (yield from flows.key(scope.consumer, delivery)))
        strangers += [] if known else [delivery]
    return strangers


def settle(
    scope: Scope,
    flows: Flows,
    settlements: Sequence[Settlement],
    deliveries: Sequence[Delivery],
    mark: int,
) -> Steps[None]:
    """Forget those that will run again, and mark the dead as dead: who lost its claim to the
    one that gave up must not commit after all.
    """
    forgotten: list[tuple[object, ...]] = []
    marked: list[tuple[object, ...]] = []
    for settlement, delivery in not_done(settlements, deliveries):
        key = yield from flows.key(scope.consumer, delivery)
        if isinstance(settlement, Dead):
            marked.append((-delivery.replays - 1, *key, mark))
        elif delivery.replays:
            marked.append((-delivery.replays, *key, mark))  # as it was before
        else:
            forgotten.append((*key, mark))
    if forgotten:
        yield Many("inbox_forget", forgotten)
    if marked:
        yield Many("inbox_mark", marked)


@dataclass(slots=True)
class Sweeper:
    """Where cleaning a consumer's inbox stands: it goes round in short stretches."""

    consumer: str
    flow_no: int = 0
    after: str = ""
    admitted: int = 0
    """Messages remembered since the last stretch."""


def forget_old(sweeper: Sweeper, before_ms: int) -> Steps[None]:
    """Forget what took effect before ``before_ms``, in the next `STRETCH`."""
    sweeper.admitted = 0
    if not sweeper.after:
        flow = yield Ask("inbox_flow_after", (sweeper.consumer, sweeper.flow_no))
        sweeper.flow_no = flow[0][0] or 0
    start = (sweeper.flow_no, sweeper.after)
    end = yield Ask("inbox_after", (*start, STRETCH - 1))
    if end:
        yield Ask("inbox_forget_old", (*start, *end[0], before_ms))
        sweeper.after = end[0][0]
    else:
        yield Ask("inbox_forget_old_rest", (*start, before_ms))
        sweeper.after = ""


def _without(deliveries: Sequence[Delivery], others: Sequence[Delivery]) -> list[Delivery]:
    gone = {id(delivery) for delivery in others}
    return [delivery for delivery in deliveries if id(delivery) not in gone]

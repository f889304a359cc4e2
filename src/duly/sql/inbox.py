"""Admission by inbox: what has taken effect is remembered by (consumer, topic, source, id).

The whole batch goes in first, in the order of its keys so that two transactions never wait for
each other crosswise; a second copy in another transaction waits here instead of running beside
the first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter

from duly.broker import Delivery, Span
from duly.errors import Superseded
from duly.guarantees import Dead, Settlement
from duly.message import body_hashes
from duly.sql.steps import Ask, Each, Many, Steps
from duly.store import Admitted, Scope, not_done

Flow = tuple[str, str, str]
"""consumer, topic, source"""

Key = tuple[int, str]
"""The number of a flow, and an id."""

_id = itemgetter(0)

# How many remembered messages one step of `forget_old` looks at, at least.
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

    def keys(self, consumer: str, deliveries: Sequence[Delivery]) -> Steps[list[Key]]:
        """The same for each of these."""
        keys: list[Key] = []
        for delivery in deliveries:
            keys += [(yield from self.key(consumer, delivery))]
        return keys


def flows_of(consumer: str, deliveries: Sequence[Delivery]) -> set[Flow]:
    """The flows that these belong to."""
    if isinstance(deliveries, Span) and not deliveries.repeated:
        topic, sources, _ = deliveries.identities
        return {(consumer, topic, source) for source in sources}
    return {(consumer, d.message.topic, d.message.source) for d in deliveries}


def number_flows(flows: Iterable[Flow]) -> Steps[Mapping[Flow, int]]:
    """The numbers of flows, which may be new ones."""
    numbered = Flows({})
    for flow in sorted(flows):
        yield from numbered.number(flow)
    return numbered.found


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
    return (yield from _sort_out(scope, flows, deliveries, hashes, too_old, now_ms, mark))


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
    now_ms: int,
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
    replayed: list[tuple[object, ...]] = []
    keys = yield from flows.keys(scope.consumer, deliveries)
    known = yield from _known(keys, hashes, now_ms, mark)
    for delivery, hash, key, (first_hash, first_mark) in zip(
        deliveries, hashes, keys, known, strict=True
    ):
        if first_mark == mark and key not in ours:
            ours.add(key)
            fresh.append(delivery)
        elif first_hash != hash:
            conflicting.append(delivery)
        elif first_mark >= 0 or key in ours:
            repeated.append(delivery)
        elif delivery.replays < -first_mark:
            dead.append(delivery)
        else:
            replayed.append((mark, *key, first_mark))
            ours.add(key)
            fresh.append(delivery)
    if replayed and (yield Many("inbox_mark", replayed)) < len(replayed):
        raise Superseded(
            f"consumer {scope.consumer!r}: another worker runs what was replayed; nothing was run"
        )
    return Admitted(fresh, repeated, conflicting, too_old, dead)


def _known(
    keys: Sequence[Key], hashes: Sequence[int], now_ms: int, mark: int
) -> Steps[Sequence[tuple[int, int]]]:
    """The hash and the mark under which each is remembered."""
    rows = [*(yield Each("inbox_known", keys))]
    for index, (number, id) in enumerate(keys):
        while rows[index] is None:  # it was old, and cleaned away since it was in the way
            yield Many("inbox_remember", [(id, hashes[index])], (number, now_ms, mark))
            [rows[index]] = yield Each("inbox_known", [(number, id)])
    return rows


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
    keys = yield from flows.keys(scope.consumer, suspects)
    known = yield Each("inbox_known", keys)
    return [delivery for delivery, row in zip(suspects, known, strict=True) if row is None]


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
    """Where cleaning a consumer's inbox stands: it goes round in short stretches, and rests when a
    round has shown that nothing will be old for a while.
    """

    consumer: str
    flow_no: int = 0
    after: str = ""
    admitted: int = 0
    """Messages remembered since the last stretch."""
    begun_ms: int = 0
    """When this round began."""
    oldest_ms: int = 0
    """Of what stays of this round; what came since it began is no older."""
    rests: bool = False
    """Between two rounds; `oldest_ms` is that of everything."""


def forget_old(sweeper: Sweeper, now_ms: int, retention_ms: int) -> Steps[None]:
    """Forget what took effect before so long, in the next stretch.

    It is twice as long as what came in since the last one. Were it no longer than that, then
    among ids that grow it would follow the newest for ever, and never come round to the old.
    """
    before_ms = now_ms - retention_ms
    stretch = max(STRETCH, 2 * sweeper.admitted)
    sweeper.admitted = 0
    if sweeper.rests and before_ms <= sweeper.oldest_ms and now_ms >= sweeper.begun_ms:
        return
    if sweeper.rests or not sweeper.begun_ms:
        sweeper.rests = False
        sweeper.begun_ms = sweeper.oldest_ms = now_ms
    if not sweeper.after:
        [(flow_no,)] = yield Ask("inbox_flow_after", (sweeper.consumer, sweeper.flow_no))
        sweeper.flow_no = flow_no or 0
        if not flow_no:
            sweeper.rests = True
            return
    start = (sweeper.flow_no, sweeper.after)
    [(last, oldest_ms, count)] = yield Ask("inbox_stretch", (*start, stretch))
    if count and oldest_ms < before_ms:
        yield Ask("inbox_forget_old", (*start, last, before_ms))
        oldest_ms = before_ms
    if count:
        sweeper.oldest_ms = min(sweeper.oldest_ms, oldest_ms)
    sweeper.after = last if count == stretch else ""


def forget_some(consumer: str, limit: int) -> Steps[int]:
    """Forget up to ``limit`` of what took effect or was given up on; returns how many."""
    forgotten: int = yield Many("inbox_forget_some", [(consumer, limit)])
    return forgotten


def effect_ms(consumer: str, topic: str, source: str, id: str) -> Steps[int | None]:
    """When a message was admitted that took effect; None where nothing is remembered."""
    rows = yield Ask("inbox_effect", (consumer, topic, source, id))
    return rows[0][0] if rows else None


def _without(deliveries: Sequence[Delivery], others: Sequence[Delivery]) -> list[Delivery]:
    gone = {id(delivery) for delivery in others}
    return [delivery for delivery in deliveries if id(delivery) not in gone]

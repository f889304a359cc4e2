"""Admission by inbox: what has taken effect is remembered by (consumer, topic, source, id).

The whole batch goes in first, in the order of its keys so that two transactions never wait for
each other crosswise; a second copy in another transaction waits here instead of running beside
the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from duly.broker import Delivery
from duly.guarantees import Dead, Done, Settlement
from duly.sql.steps import Ask, Many, Steps
from duly.store import Admitted, Scope

Key = tuple[str, str, str, str]
"""consumer, topic, source, id"""

# How many remembered messages one step of `forget_old` looks at.
STRETCH = 500


def admit(scope: Scope, deliveries: Sequence[Delivery], now_ms: int, mark: int) -> Steps[Admitted]:
    """Remember the deliveries and sort out those that may not run; the first statement.

    ``mark`` tells this transaction from every other.
    """
    too_old = yield from _too_old(scope, deliveries, now_ms)
    if too_old:
        deliveries = _without(deliveries, too_old)
    known = [(_key(scope.consumer, d), d.message.body_hash(), d) for d in deliveries]
    known.sort(key=lambda entry: entry[0])
    added = yield Many("inbox_remember", [(*key, hash, now_ms, mark) for key, hash, _ in known])
    if added == len(known):
        return Admitted(deliveries, too_old=too_old)
    return (yield from _sort_out(known, deliveries, too_old, mark))


def _sort_out(
    known: Sequence[tuple[Key, bytes, Delivery]],
    deliveries: Sequence[Delivery],
    too_old: Sequence[Delivery],
    mark: int,
) -> Steps[Admitted]:
    """Which were there before: by another transaction, or by an equal one of this batch.

    What was given up on has a mark below zero: so often. Replayed as often, it may run again.
    """
    ours: set[Key] = set()
    repeated: list[Delivery] = []
    conflicting: list[Delivery] = []
    dead: list[Delivery] = []
    for key, hash, delivery in known:
        [(first_hash, first_mark)] = yield Ask("inbox_known", key)
        if first_mark == mark and key not in ours:
            ours.add(key)
        elif first_hash != hash:
            conflicting.append(delivery)
        elif first_mark >= 0:
            repeated.append(delivery)
        elif delivery.replays < -first_mark:
            dead.append(delivery)
        else:
            yield Ask("inbox_mark", (mark, *key, first_mark))
            ours.add(key)
    fresh = _without(deliveries, [*repeated, *conflicting, *dead])
    return Admitted(fresh, repeated, conflicting, too_old, dead)


def _too_old(
    scope: Scope, deliveries: Sequence[Delivery], now_ms: int
) -> Steps[Sequence[Delivery]]:
    """Marked as repeated, older than the inbox remembers, and not remembered."""
    since_ms = now_ms - int(scope.inbox_retention_s * 1000)
    # Only the broker's own mark makes a stranger suspicious: after a long backlog a first
    # delivery may be of any age.
    suspects = [d for d in deliveries if d.repeated and d.message.time_ms < since_ms]
    strangers: list[Delivery] = []
    for delivery in suspects:
        known = yield Ask("inbox_known", _key(scope.consumer, delivery))
        strangers += [] if known else [delivery]
    return strangers


def settle(
    scope: Scope, settlements: Sequence[Settlement], deliveries: Sequence[Delivery], mark: int
) -> Steps[None]:
    """Forget those that will run again, and mark the dead as dead: who lost its claim to the
    one that gave up must not commit after all.
    """
    forgotten: list[tuple[object, ...]] = []
    marked: list[tuple[object, ...]] = []
    for settlement, delivery in zip(settlements, deliveries, strict=True):
        key = _key(scope.consumer, delivery)
        match settlement:
            case Done():
                pass
            case Dead():
                marked.append((-delivery.replays - 1, *key, mark))
            case _ if delivery.replays:
                marked.append((-delivery.replays, *key, mark))  # as it was before
            case _:
                forgotten.append((*key, mark))
    if forgotten:
        yield Many("inbox_forget", forgotten)
    if marked:
        yield Many("inbox_mark", marked)


@dataclass(slots=True)
class Sweeper:
    """Where cleaning a consumer's inbox stands: it goes round in short stretches."""

    consumer: str
    after: tuple[str, str, str] = ("", "", "")
    admitted: int = 0
    """Messages remembered since the last stretch."""


def forget_old(sweeper: Sweeper, before_ms: int) -> Steps[None]:
    """Forget what took effect before ``before_ms``, in the next `STRETCH`."""
    sweeper.admitted = 0
    start = (sweeper.consumer, *sweeper.after)
    end = yield Ask("inbox_after", (*start, STRETCH - 1))
    if end:
        yield Ask("inbox_forget_old", (*start, *end[0], before_ms))
        sweeper.after = end[0]
    else:
        yield Ask("inbox_forget_old_rest", (*start, before_ms))
        sweeper.after = ("", "", "")


def _without(deliveries: Sequence[Delivery], others: Sequence[Delivery]) -> list[Delivery]:
    gone = {id(delivery) for delivery in others}
    return [delivery for delivery in deliveries if id(delivery) not in gone]


def _key(consumer: str, delivery: Delivery) -> Key:
    message = delivery.message
    return consumer, message.topic, message.source, message.id

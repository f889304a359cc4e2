"""What has to be done in turn on a server, where SQLite's file has one writer anyway.

Claims of one subscription are made one after the other, over all hosts: who is first moves the
cursor, and the next one sees it moved. So are changes to topics and subscriptions. Publishing
and settling wait for nobody: a settlement locks the rows of its own claim.

Each lock is an advisory one, ends with its transaction, and is taken by a statement before the
first that looks: under READ COMMITTED that one sees whatever the last holder has committed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from duly.broker import SubscribeOptions
from duly.inspection.steering import REWINDING
from duly.message import Topic
from duly.sql import log
from duly.sql.steps import Ask, Many, Step, Steps

R = TypeVar("R")


def declare(topics: Iterable[Topic[Any]]) -> Steps[log.Catalog]:
    """As `log.declare`; takes its turn only for what is new or changed.

    A transaction of the application's may declare, and hold its turn until it ends: days, where
    it is a prepared one.
    """
    wanted = list(topics)
    there = []
    for topic in wanted:
        exactly_once = topic.guarantee == "exactly-once"
        retentions = (topic.retention_s, topic.identity_retention_s)
        asked = (topic.name, exactly_once, topic.partitions, *retentions)
        there += [topic.name for _ in (yield Ask("topic_as_declared", asked))]
    catalog = dict((yield from log.find(there)))
    if rest := [topic for topic in wanted if topic.name not in catalog]:
        yield Ask("lock_topics")
        catalog.update((yield from log.declare(rest)))
    return catalog


def subscribe(
    catalog: log.Catalog, topics: Sequence[Topic[Any]], name: str, options: SubscribeOptions
) -> Steps[list[int]]:
    """As `log.subscribe`."""
    yield Ask("lock_topics")
    return (yield from log.subscribe(catalog, topics, name, options))


def claiming(lanes: Sequence[log.Lane], steps: Steps[R]) -> Steps[R]:
    """Steps that claim, or free what others hold: when the subscription's turn has come."""
    for number in sorted(lane.subscription_no for lane in lanes):
        yield Ask("lock_subscription", (number,))
    return (yield from steps)


def taking_over(steps: Steps[R]) -> Steps[R]:
    """Steps that free what others hold, of whichever subscription, when the turn of each has come
    of which anything is held.
    """
    for (number,) in (yield Ask("held_subscriptions")):
        yield Ask("lock_subscription", (number,))
    return (yield from steps)


def mending(numbers: Sequence[int], steps: Steps[R]) -> Steps[R]:
    """Steps that bring back or remove dead letters, in the turn of their subscriptions.

    Nothing but a replay or a rewind makes the log's past needed again: a sweep that has begun
    before would not see it, and delete the message.
    """
    yield Ask("await_retention")
    yield Many("lock_dead", [(number,) for number in numbers])
    return (yield from steps)


def steering(name: str, steps: Steps[R]) -> Steps[R]:
    """Steps by which people change a subscription: beside nobody who claims of it or subscribes.

    A claim that is being made when it is paused is made, and every later one sees that it is.
    """
    yield Ask("lock_topics")
    for number in (yield from _numbers(name)):
        yield Ask("lock_subscription", (number,))
    return (yield from steps)


def taking_back(name: str, steps: Steps[R]) -> Steps[R]:
    """Steps that take a subscription's claims away, which is held back already.

    Rows are waited for in statements of their own, until there are none but those that are locked
    here: somebody who was settling part of a claim has split it meanwhile, and a statement that
    waited for him would not see the other part. No lock that a handler's transaction asks for is
    held meanwhile, so that nobody waits in a circle.
    """
    yield Ask("await_retention")
    for number in (yield from _numbers(name)):
        mine: set[int] = set()
        while held := {claim_id for (claim_id,) in (yield Ask("lock_held", (number,)))} - mine:
            mine |= held
    return (yield from steps)


def tidying(name: str, steps: Steps[R]) -> Steps[R]:
    """Steps that remove what a rewind or a removal left behind: while of what is rewound nobody
    brings back dead letters. Of what is removed, workers may still be settling.
    """
    for number, under in (yield Ask("to_tidy", (name,))):
        if under == REWINDING:
            yield Ask("lock_subscription", (number,))
    return (yield from steps)


def _numbers(name: str) -> Steps[list[int]]:
    return sorted(number for _, number, _ in (yield Ask("find_subscription", (name,))))


def erasing(steps: Steps[R]) -> Steps[R]:
    """Steps that put hashes in the place of identities: while nobody is publishing under one.

    A publish whose statement began before would find neither.
    """
    yield Ask("lock_soon")
    yield Ask("lock_identities")
    return (yield from steps)


def await_holders(positions: Sequence[int]) -> Steps[None]:
    """Until whoever was ending a claim on one of these messages has done so."""
    yield Many("lock_holders", [(position,) for position in positions])


def with_turn(turns: set[int], steps: Steps[R]) -> Steps[R]:
    """Steps that settle, and in the same transaction those that claim afterwards.

    Who settles a whole claim takes the turn for the next one by the same statement, where nobody
    else has it just now; the statement that looks comes later. ``turns`` are the subscriptions
    whose turn the transaction has so.
    """

    def answer(step: Step) -> Steps[Any]:
        if isinstance(step, Ask) and step.name == "lock_subscription":
            has_turn = not turns.isdisjoint(step.params)
            return [] if has_turn else (yield step)
        if isinstance(step, Ask) and step.name == "drop_whole_claim":
            rows = yield Ask("drop_whole_claim_with_turn", step.params)
            turns.update(number for number, _, has_turn in rows if has_turn)
            return [row[:2] for row in rows]
        return (yield step)

    return _answered(answer, steps)


# Their first parameter is a subscription, and one more the token from which on to look.
_LOOK_FOR_HELD = frozenset(
    {
        "free_ranges_ordered",
        "holders",
        "outlook_ordered",
        "parked_due_ordered",
    }
)


def held_from(tokens: Mapping[int, int], steps: Steps[R]) -> Steps[R]:
    """Steps that find held claims, where by subscription all with a lower token are over.

    What was settled stays in the way of whoever looks for what is not, as long as anybody on the
    server holds a snapshot of before. Tokens of a subscription are committed in their order,
    because claims are made in turn: below the oldest that is held there never comes another.
    """

    def answer(step: Step) -> Steps[Any]:
        if isinstance(step, Ask) and step.name in _LOOK_FOR_HELD:
            number: Any = next(iter(step.params))
            step = Ask(step.name, (*step.params, tokens.get(number, 0)))
        return (yield step)

    return _answered(answer, steps)


def _answered(answer: Callable[[Step], Steps[Any]], steps: Steps[R]) -> Steps[R]:
    """Steps, each of which is answered by others in its place."""
    try:
        step = next(steps)
        while True:
            try:
                found = yield from answer(step)
            except Exception as error:  # noqa: BLE001 - it belongs to the steps
                step = steps.throw(error)
            else:
                step = steps.send(found)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]

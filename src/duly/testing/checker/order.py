"""Properties of order by key, where it is declared."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from duly.guarantees import Guarantee
from duly.testing.checker.case import Case, Published, Run
from duly.testing.checker.properties import forbids
from duly.testing.history import About, Identity

Place = tuple[int, int]
"""Where something became true; within one commit, in the order of the starts."""


@dataclass(slots=True)
class _Line:
    """The messages of one key in publishing order, and where each was done or dead. ``surely``:
    done at the latest, where several copies leave open which of them was.
    """

    messages: list[About]
    done: dict[Identity, Place]
    surely: dict[Identity, Place]
    dead: dict[Identity, Place]


def _lines(case: Case) -> Iterator[_Line]:
    by_key: dict[tuple[str, str], dict[Identity, About]] = defaultdict(dict)
    for message in case.final.log:
        if len({each.message.content for each in case.publishes.get(message.identity, ())}) > 1:
            continue  # two events under one id: which of them stands where is not to be told
        if message.key is not None and message.topic in case.terms.topics:
            by_key[message.topic, message.key].setdefault(message.identity, message)
    done, dead = _successes(case), _deaths(case)
    surely = done | _successes(case, surely=True)
    for messages in by_key.values():
        yield _Line(list(messages.values()), done, surely, dead)


def _successes(case: Case, *, surely: bool = False) -> dict[Identity, Place]:
    """Where each message first succeeded: committed, or returned where nothing commits."""
    found: dict[Identity, Place] = {}
    there = {row.run for row in case.final.rows}
    for run in case.runs:
        place = _success(case, run, there, surely=surely)
        identity = run.start.message.identity
        if place is not None and place < found.get(identity, (len(case.events), 0)):
            found[identity] = place
    return found


def _success(case: Case, run: Run, there: set[str], *, surely: bool) -> Place | None:
    if case.terms.guarantee is not Guarantee.EXACTLY_ONCE:
        at = _handled(case, run, surely=surely)
    elif run.start.run not in there:
        return None
    else:
        tx = case.txs.get(run.start.tx)
        at = None if tx is None else tx.committing
    return None if at is None else (at, run.at)


def _handled(case: Case, run: Run, *, surely: bool) -> int | None:
    """Where a run that returned was settled: that is its commit, and what is settled together
    counts together. At most once it was settled before. What was refused has not succeeded.
    """
    if run.how != "returned":
        return None
    if case.terms.guarantee is Guarantee.AT_MOST_ONCE:
        return run.ended
    settles = [each for each in case.settles.get(run.start.token, ()) if each[1].kind == "done"]
    phases = [settle.phase for _, settle in settles]
    if not settles or phases[1:] == ["fail"]:
        return None
    if "ok" not in phases and _otherwise(case, run, surely=surely):
        return None
    return settles[0][0]


def _otherwise(case: Case, run: Run, *, surely: bool) -> bool:
    """Whether another claim on the message was settled: what became of this one is unknown, but
    it was not what counted. Of several copies nobody can tell which one a claim was on.
    """
    if case.copies()[run.start.message.identity] > 1 and not surely:
        return False
    return any(
        other.start.token != run.start.token
        and case.settled(other.start.token, "done", "dead") is not None
        for other in case.runs_by_identity()[run.start.message.identity]
    )


def _deaths(case: Case) -> dict[Identity, Place]:
    found: dict[Identity, Place] = {}
    dead = case.dead()
    # What admission refuses is dead with the transaction that it was refused by.
    refused = {
        token: tx for tx in case.txs.values() if tx.admit is not None for token in tx.admit.refused
    }
    for token, settles in case.settles.items():
        _, claim = case.claim_of.get(token, (0, None))
        if claim is None or claim.message is None or claim.message.identity not in dead:
            continue
        for at, settle in settles:
            if settle.kind == "dead":
                identity = claim.message.identity
                tx = case.txs.get(settle.tx) or refused.get(token)
                if tx is not None and tx.outcome == "fail":
                    continue
                # In a transaction the dead and the done become true at its commit, together.
                place = (at if tx is None or tx.committing is None else tx.committing, at)
                found[identity] = min(place, found.get(identity, place))
    return found


@forbids("inversion", ordered=True)
def inversion(case: Case) -> Iterator[str]:
    """First successes of a key came in another order than its messages were published."""
    for line in _lines(case):
        done = [m for m in line.messages if m.identity in line.done]
        one_order = case.final.one_order
        for earlier, later in _pairs(done, one_order=one_order):
            if not one_order and _side_by_side(case, earlier, later):
                continue
            if _given_up(line, earlier, before=later):
                continue  # what succeeded later is another copy of it, or a replay
            if line.done[earlier.identity] > line.surely[later.identity]:
                yield f"key {later.key}: {later.id} succeeded before {earlier.id}"


def _pairs(done: Sequence[About], *, one_order: bool) -> Iterator[tuple[About, About]]:
    """Neighbours are enough where each pair of them tells."""
    return itertools.pairwise(done) if one_order else itertools.combinations(done, 2)


def _side_by_side(case: Case, one: About, other: About) -> bool:
    """Whether they were published at the same time by two, so that neither is the earlier."""
    return any(
        a.who != b.who and a.invoked < _end_of(case, b) and b.invoked < _end_of(case, a)
        for a in _tries(case, one)
        for b in _tries(case, other)
    )


def _tries(case: Case, message: About) -> Sequence[Published]:
    """Where what a transaction published is brought by somebody else, that is when it comes."""
    tries = case.publishes.get(message.identity, ())
    return [each for each in tries if not each.tx] or tries


def _end_of(case: Case, publish: Published) -> int:
    return len(case.events) if publish.ended is None else publish.ended


def _given_up(line: _Line, message: About, *, before: About) -> bool:
    dead = line.dead.get(message.identity)
    return dead is not None and dead < line.done[before.identity]


@forbids("skip", Guarantee.AT_LEAST_ONCE, Guarantee.EXACTLY_ONCE, ordered=True)
def skip(case: Case) -> Iterator[str]:
    """A message succeeded while an earlier one of its key was neither done nor dead."""
    for line in _lines(case):
        for number, later in enumerate(line.messages):
            at = line.done.get(later.identity)
            if at is None:
                continue
            for earlier in line.messages[:number]:
                if earlier.identity in line.done:
                    continue  # in the wrong order, that is an inversion
                if not case.final.one_order and _side_by_side(case, earlier, later):
                    continue
                dead = line.dead.get(earlier.identity)
                if dead is None or dead[0] > at[0]:
                    yield f"key {later.key}: {later.id} succeeded, {earlier.id} was skipped"


@forbids("head of line", Guarantee.AT_LEAST_ONCE, Guarantee.EXACTLY_ONCE, ordered=True)
def head_of_line(case: Case) -> Iterator[str]:
    """A key went on behind a dead letter that should have held it."""
    if not case.terms.hold_key_on_dead:
        return
    for line in _lines(case):
        for number, earlier in enumerate(line.messages):
            dead = line.dead.get(earlier.identity)
            for later in line.messages[number + 1 :] if dead is not None else ():
                if line.done.get(later.identity, (-1, 0)) > (dead or (0, 0)):
                    yield f"key {later.key}: {later.id} succeeded behind the dead {earlier.id}"


@forbids("overlap", ordered=True)
def overlap(case: Case) -> Iterator[str]:
    """Two handlers of one key ran at once; a zombie whose claim was taken is excepted."""
    by_key: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in case.runs:
        message = run.start.message
        if message.key is not None:
            by_key[message.topic, message.key].append(run)
    for (_, key), runs in by_key.items():
        for first, second in _overlapping(case, runs):
            if first.start.token == second.start.token:
                continue  # one call of a batch handler
            if not _is_zombie(case, first, second):
                yield f"key {key}: runs {first.start.run} and {second.start.run} overlap"


def _overlapping(case: Case, runs: list[Run]) -> Iterator[tuple[Run, Run]]:
    for number, first in enumerate(runs):
        end = first.ended
        if end is None:
            end = case.died(first.start.who, first.at) or first.at
        for second in runs[number + 1 :]:
            if second.at >= end:
                break
            # One call of a batch handler is many runs at once.
            if second.start.who != first.start.who or not case.terms.batch_handler:
                yield first, second


def _is_zombie(case: Case, first: Run, second: Run) -> bool:
    """Whether one of two had lost its lease: another took something it held of this key."""
    return _fenced(case, first, second.at) or _fenced(case, second, second.at)


def _fenced(case: Case, run: Run, at: int) -> bool:
    message = run.start.message
    for claimed, claim in case.claims:
        if claimed >= at or claim.who != run.start.who or claim.message is None:
            continue
        if (claim.message.topic, claim.message.key) == (message.topic, message.key):
            taken = case.superseded(claim.token)
            # What is settled comes again only where the whole partition has changed hands.
            settled = case.settled(claim.token, "done") if case.terms.confirms_settlement else None
            if taken is not None and taken < at and settled is None:
                return True
    return False

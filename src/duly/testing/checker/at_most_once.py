"""Properties of at-most-once: never handled twice, and not lost without a recorded cause."""

from __future__ import annotations

from collections.abc import Iterator

from duly.guarantees import Guarantee
from duly.testing.checker.case import Case
from duly.testing.checker.properties import forbids
from duly.testing.history import Identity

AT_MOST_ONCE = Guarantee.AT_MOST_ONCE


@forbids("double start", AT_MOST_ONCE)
def double_start(case: Case) -> Iterator[str]:
    """A message was started more than once, over all restarts."""
    for identity, runs in case.runs_by_identity().items():
        if len(runs) > max(1, _copies(case, identity)):
            yield f"{identity[0]}/{identity[2]} was started {len(runs)} times"


def _copies(case: Case, identity: Identity) -> int:
    """How many may be there to be started: a repeated publish is another one."""
    copies = case.copies()[identity]
    if not case.terms.hands_out_once:
        return copies
    tries = case.publishes.get(identity, ())
    return max(copies, sum(case.outcome(each) != "fail" for each in tries))


@forbids("start before settle", AT_MOST_ONCE)
def start_before_settle(case: Case) -> Iterator[str]:
    """A start was not preceded by a settlement that ended ok."""
    for run in case.runs:
        settled = case.settled(run.start.token, "done")
        if settled is None or settled > run.at:
            message = run.start.message
            yield f"{message.topic}/{message.id} was started before it was surely settled"


@forbids("unexplained loss", AT_MOST_ONCE)
def unexplained_loss(case: Case) -> Iterator[str]:
    """A published message was not handled and nothing in the history explains it."""
    if not case.was_read:
        return
    started = {run.start.message.identity for run in case.runs}
    gone = started | case.dropped | case.dead() | set(_still_waiting(case))
    for identity in case.must():
        if identity not in gone and not _explained(case, identity):
            yield f"{identity[0]}/{identity[2]} was lost and nothing explains it"


def _still_waiting(case: Case) -> Iterator[Identity]:
    # What was never claimed at all is for the liveness properties to report.
    claimed = {c.message.identity for _, c in case.claims if c.message is not None}
    for identity in case.must():
        if identity not in claimed:
            yield identity


def _explained(case: Case, identity: Identity) -> bool:
    for token, (claimed, claim) in case.claim_of.items():
        if claim.message is None or claim.message.identity != identity:
            continue
        if case.terms.hands_out_once and _lost_with_its_claim(case, token, claimed, claim.who):
            return True
        settles = case.settles.get(token, [])
        ended = [settle for _, settle in settles if settle.phase != "invoke"]
        if settles and settles[-1][1].phase == "invoke":
            return True  # died in the middle of settling it
        if any(settle.phase == "info" or settle.refused for settle in ended):
            return True
        at = case.settled(token, "done")
        if at is not None and case.died(claim.who, at) is not None:
            return True
    return False


def _lost_with_its_claim(case: Case, token: str, claimed: int, who: str) -> bool:
    """Whether something befell whoever took it off the broker; or, where that gave it back, what it
    was given back to.
    """
    if case.died(who, claimed) is not None:
        return True
    loses = case.terms.loses_waiting
    given_back = case.settled(token, "done") is None
    return given_back and any(at > claimed and fault.kind in loses for at, fault in case.faults)

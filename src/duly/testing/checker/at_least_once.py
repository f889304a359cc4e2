"""Properties of at-least-once: handled or dead-lettered, settled after it, repeats explained."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from duly.guarantees import Guarantee
from duly.testing.checker.case import Case, Run
from duly.testing.checker.properties import forbids

AT_LEAST_ONCE, EXACTLY_ONCE = Guarantee.AT_LEAST_ONCE, Guarantee.EXACTLY_ONCE


@forbids("lost", AT_LEAST_ONCE)
def lost(case: Case) -> Iterator[str]:
    """A published message was neither handled nor dead-lettered."""
    if not case.was_read:
        return
    returned = {r.start.message.identity for r in case.runs if r.how == "returned"}
    ended = returned | case.dead() | set(case.held())
    for identity in case.must():
        if identity not in ended:
            yield f"{identity[0]}/{identity[2]} was neither handled nor dead-lettered"


@forbids("premature settle", AT_LEAST_ONCE, EXACTLY_ONCE)
def premature_settle(case: Case) -> Iterator[str]:
    """A message was settled as done before a start of it had returned, or as failed though its
    handler was only cancelled.
    """
    yield from _settled_as_failed(case)
    if case.terms.guarantee is AT_LEAST_ONCE:
        yield from _settled_as_done(case)


def _settled_as_failed(case: Case) -> Iterator[str]:
    by_token: dict[str, list[Run]] = {}
    for run in case.runs:
        by_token.setdefault(run.start.token, []).append(run)
    for token, settles in case.settles.items():
        for at, settle in settles:
            if settle.phase != "invoke" or settle.kind not in ("retry", "dead"):
                continue
            runs = [run for run in by_token.get(token, ()) if run.at < at]
            if runs and not any(_ended_by_itself(case, run) for run in runs):
                yield f"claim {token} was settled as {settle.kind}, its handler was cancelled"


def _ended_by_itself(case: Case, run: Run) -> bool:
    """Whether a run came to an end that says something about its message."""
    if run.how != "cancelled" or run.ended is None:
        return run.how is not None
    lasted_s = case.events[run.ended].at - case.events[run.at].at
    return lasted_s >= case.terms.max_run_s  # its own limit is a failure like any other


def _settled_as_done(case: Case) -> Iterator[str]:
    returned: dict[str, int] = {}
    for run in case.runs:
        if run.how == "returned" and run.ended is not None:
            returned.setdefault(run.start.token, run.ended)
    for token, settles in case.settles.items():
        for at, settle in settles:
            if settle.kind == "done" and settle.phase == "invoke":
                if returned.get(token, at + 1) > at:
                    yield f"claim {token} was settled as done before its handler returned"
                break


@forbids("redelivery after a confirmed settle", AT_LEAST_ONCE, EXACTLY_ONCE)
def redelivery_after_settle(case: Case) -> Iterator[str]:
    """A message came again though its settlement was confirmed."""
    if not case.terms.confirms_settlement:
        return
    copies = case.copies()
    gone: dict[tuple[str, str, str], int] = {}
    for token, (_, claim) in case.claim_of.items():
        at = _confirmed(case, token)
        if at is not None and claim.message is not None:
            identity = claim.message.identity
            gone[identity] = min(at, gone.get(identity, at))
    for _, claim in case.claims:
        if claim.message is None or copies[claim.message.identity] > 1:
            continue
        made = case.made[claim.token]
        if made > gone.get(claim.message.identity, made):
            message = claim.message
            yield f"{message.topic}/{message.id} was delivered again after it was settled"


def _confirmed(case: Case, token: str) -> int | None:
    for at, settle in case.settles.get(token, ()):
        if settle.kind in ("done", "dead"):
            if settle.tx and settle.phase == "invoke":
                tx = case.txs.get(settle.tx)
                by_claim = tx is not None and tx.admit is not None and tx.admit.admission
                if tx is not None and tx.outcome == "ok" and by_claim == "by claim":
                    return tx.ended
            elif settle.phase == "ok" and not settle.tx:
                return at
    return None


@forbids("unexplained duplicate", AT_LEAST_ONCE)
def unexplained_duplicate(case: Case) -> Iterator[str]:
    """A message was started again without a cause."""
    copies = case.copies()
    for identity, runs in case.runs_by_identity().items():
        if copies[identity] > 1:
            continue
        for first, again in itertools.pairwise(runs):
            if not _has_cause(case, first, again):
                yield (
                    f"{identity[0]}/{identity[2]} was started again (run {again.start.run}) "
                    f"though run {first.start.run} had returned and nothing went wrong"
                )


def _has_cause(case: Case, first: Run, again: Run) -> bool:
    if first.how != "returned" or (first.ended or 0) > again.at:
        return True  # it failed, was cancelled or killed, or was overtaken after its lease
    taken = case.superseded(again.start.token)
    if taken is not None and taken < again.at:
        return True  # a zombie starts, whose lease was over
    settled = case.settled(first.start.token, "done")
    before = [fault for at, fault in case.faults if at < again.at]
    lost = any(fault.kind == "lose" for fault in before) or not case.terms.confirms_settlement
    # Who had it before that, and stood still, starts late.
    told = case.claim_of.get(again.start.token, (again.at,))[0]
    made = case.made.get(again.start.token, told)
    late = settled is not None and made < settled < told
    return bool(before) and (settled is None or settled > again.at or late or lost)


def _fell(case: Case, runs: Sequence[Run]) -> bool:
    """Whether one was claimed with a count, and later with a smaller one: a zombie starts late, and
    with the count it was given.
    """
    return any(
        later.start.attempt < first.start.attempt
        and case.made.get(later.start.token, later.at)
        > case.claim_of.get(first.start.token, (first.at,))[0]
        for first, later in itertools.permutations(runs, 2)
    )


@forbids("poison loop", AT_LEAST_ONCE, EXACTLY_ONCE)
def poison_loop(case: Case) -> Iterator[str]:
    """Attempts exceed the policy, or the count of a started message falls."""
    copies, most = case.copies(), case.terms.attempts
    for identity, runs in case.runs_by_identity().items():
        name = f"{identity[0]}/{identity[2]}"
        attempts = [run.start.attempt for run in runs]
        if max(attempts) > most:
            yield f"{name} was started as attempt {max(attempts)}, the policy allows {most}"
        if copies[identity] > 1:
            continue
        if case.terms.keeps_attempts and _fell(case, runs):
            yield f"the count of {name} fell: its starts were attempts {attempts}"
        # A death charges nobody that was not alone, so each fault may cost one more start.
        each = 2 if case.terms.batch_handler else 1
        allowed = (most * each + len(case.faults) + 1) * copies[identity]
        counted = case.terms.keeps_attempts and case.terms.guarantee is AT_LEAST_ONCE
        if counted and len(runs) > max(allowed, most):
            yield f"{name} was started {len(runs)} times, the policy allows {most}"

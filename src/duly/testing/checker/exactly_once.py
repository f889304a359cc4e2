"""Properties of exactly-once, in its scope: admission, effects and outputs of one store."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator

from duly.guarantees import Admission, Guarantee
from duly.testing.checker.case import Case
from duly.testing.checker.properties import forbids
from duly.testing.history import Identity
from duly.worker.admission import OLDER_THAN_INBOX

EXACTLY_ONCE = Guarantee.EXACTLY_ONCE


def _name(identity: Identity) -> str:
    return f"{identity[0]}/{identity[2]}"


@forbids("duplicate effect", EXACTLY_ONCE)
def duplicate_effect(case: Case) -> Iterator[str]:
    """The effect of one message is there twice, however often it was published."""
    copies = case.copies() if case.terms.repeats_count else Counter[Identity]()
    for (table, identity), count in _counts(case).items():
        if count > max(1, copies[identity]) and not _beyond_horizon(case, identity):
            yield f"{_name(identity)} has {count} rows in {table}"


def _counts(case: Case) -> Counter[tuple[str, Identity]]:
    """How many rows each table has of each message."""
    return Counter((row.table, row.message.identity) for row in case.final.rows)


def _beyond_horizon(case: Case, identity: Identity) -> bool:
    """Whether the message stands in the log several times, and each copy took effect later than
    the inbox remembers the one before: a copy that was never delivered bears no mark.
    """
    kept_s = case.terms.inbox_retention_s
    by_inbox = case.terms.admission is Admission.BY_INBOX
    if kept_s is None or not by_inbox or case.copies()[identity] < 2:
        return False
    runs = {row.run for row in case.final.rows if row.message.identity == identity}
    admits = [case.txs[case.run_of[run].start.tx].admit for run in runs if run in case.run_of]
    began = sorted(admit.began for admit in admits if admit is not None and admit.began)
    return len(began) == len(runs) and all(
        # In whole milliseconds, as the inbox has them.
        later - earlier > kept_s - 0.001
        for earlier, later in itertools.pairwise(began)
    )


@forbids("lost effect", EXACTLY_ONCE)
def lost_effect(case: Case) -> Iterator[str]:
    """A published message has no effect and is not dead."""
    if not case.was_read:
        return
    done = {row.message.identity for row in case.final.rows}
    ended = done | case.dead() | set(case.held())
    for identity in case.must():
        if identity not in ended:
            yield f"{_name(identity)} has no effect and is not dead-lettered"
    yield from _lost_of_a_copy(case)


def _lost_of_a_copy(case: Case) -> Iterator[str]:
    if not case.terms.repeats_count:
        return
    copies, dead = case.copies(), case.dead()
    for (table, identity), count in _counts(case).items():
        if count < copies[identity] and identity not in dead:
            yield f"{_name(identity)} stands {copies[identity]} times, {table} has {count} rows"


@forbids("effect of a dead letter", EXACTLY_ONCE)
def effect_of_a_dead_letter(case: Case) -> Iterator[str]:
    """A message is dead-lettered though its effect is committed."""
    copies = case.copies()
    done = {row.message.identity for row in case.final.rows}
    # Older than the inbox remembers, nobody can tell; the letter says so, and is no anomaly.
    unsure = {d.message.identity for d in case.final.dead if d.error == OLDER_THAN_INBOX}
    for identity in sorted((case.dead() & done) - unsure):
        if copies[identity] <= 1:
            yield f"{_name(identity)} is dead-lettered and its effect is committed"


@forbids("identity conflict", EXACTLY_ONCE)
def identity_conflict(case: Case) -> Iterator[str]:
    """Two different messages under one id both passed."""
    took_effect: dict[Identity, set[str]] = defaultdict(set)
    for row in case.final.rows:
        took_effect[row.message.identity].add(row.message.content)
    for identity, tries in case.inputs():
        stored = {t.message.content for t in tries if case.outcome(t) == "ok"}
        if case.terms.drops_repeats and len(stored) > 1:
            yield f"{_name(identity)} was accepted with {len(stored)} different bodies"
        elif len(took_effect[identity]) > 1:
            yield f"{_name(identity)} took effect with {len(took_effect[identity])} bodies"


def _tables_by_run(case: Case) -> dict[str, set[str]]:
    tables: dict[str, set[str]] = defaultdict(set)
    for row in case.final.rows:
        tables[row.run].add(row.table)
    return tables


@forbids("torn effect", EXACTLY_ONCE)
def torn_effect(case: Case) -> Iterator[str]:
    """A run's rows are neither all there nor all absent."""
    wanted = set(case.terms.tables)
    for run, tables in _tables_by_run(case).items():
        if missing := wanted - tables:
            yield f"run {run} left rows in {sorted(tables)} and none in {sorted(missing)}"


@forbids("ghost message", EXACTLY_ONCE)
def ghost_message(case: Case) -> Iterator[str]:
    """An output is there whose effect is not."""
    committed = set(_tables_by_run(case))
    for output in case.final.outputs:
        if output.run not in committed:
            yield f"output {output.message.id} of run {output.run} is there, its effect is not"


@forbids("missing output", EXACTLY_ONCE)
def missing_output(case: Case) -> Iterator[str]:
    """An effect is there without its output."""
    if not case.terms.has_output:
        return
    published = {output.run for output in case.final.outputs}
    for run in _tables_by_run(case):
        if run not in published:
            yield f"run {run} has its effect and no output"


@forbids("zombie commit", EXACTLY_ONCE)
def zombie_commit(case: Case) -> Iterator[str]:
    """A transaction committed though another had taken its claim.

    By claim the later claim itself supersedes; by cursor and inbox the fence is what has taken
    effect, so that there only another's commit does.
    """
    if case.terms.admission is not Admission.BY_CLAIM:
        return
    for name, tx in case.txs.items():
        if tx.outcome != "ok" or tx.admit is None or tx.ended is None:
            continue
        for token in _ran_in(case, name):
            taken = case.superseded(token, surely=True)
            if taken is not None and taken < (tx.committing or 0):
                yield f"transaction {name} committed claim {token}, which another had taken"


def _ran_in(case: Case, tx: str) -> list[str]:
    return [run.start.token for run in case.runs if run.start.tx == tx]


@forbids("blind retry", EXACTLY_ONCE)
def blind_retry(case: Case) -> Iterator[str]:
    """After a commit of unknown outcome somebody acted as if it had failed, or succeeded."""
    for name, tx in case.txs.items():
        if tx.outcome != "info" or tx.ended is None or tx.admit is None:
            continue
        for token in tx.admit.fresh:
            yield from _acted(case, name, token, tx.ended)


def _acted(case: Case, tx: str, token: str, after: int) -> Iterator[str]:
    for at, settle in case.settles.get(token, ()):
        if at > after and settle.kind != "release" and not _admitted(case, token, after, at):
            yield f"claim {token} was settled as {settle.kind} after COMMIT of {tx} was unknown"
            return
    for run in case.runs:
        again = run.at > after and run.start.token == token
        if again and not _admitted(case, token, after, run.at):
            yield f"claim {token} was started again after COMMIT of {tx} was unknown"
            return


def _admitted(case: Case, token: str, after: int, before: int) -> bool:
    """Whether a later transaction asked admission about the claim."""
    return any(
        tx.admit is not None
        and tx.admitted is not None
        and after < tx.admitted < before
        and token in (*tx.admit.fresh, *tx.admit.repeated, *tx.admit.refused)
        for tx in case.txs.values()
    )


@forbids("silent rollback", EXACTLY_ONCE)
def silent_rollback(case: Case) -> Iterator[str]:
    """A commit was reported as ok and what it committed is not there."""
    if not case.was_read or not case.terms.tables:
        return
    there = _tables_by_run(case)
    for run in case.runs:
        tx = case.txs.get(run.start.tx)
        if tx is None or tx.outcome != "ok" or run.how != "returned":
            continue
        done = any(
            settle.kind == "done" and settle.tx == run.start.tx
            for _, settle in case.settles.get(run.start.token, ())
        )
        if done and run.start.run not in there:
            yield f"transaction {run.start.tx} was committed, run {run.start.run} left nothing"


@forbids("scope honesty")
def scope_honesty(case: Case) -> Iterator[str]:
    """An effect outside the scope was reported with another number than it happened."""
    times = Counter((effect.message.identity, effect.what) for effect in case.effects)
    for reported in case.reported:
        happened = times[reported.message.identity, reported.what]
        if happened != reported.times:
            yield (
                f"{reported.what!r} of {_name(reported.message.identity)} happened {happened} "
                f"times and was reported as {reported.times}"
            )


@forbids("dedup horizon", EXACTLY_ONCE)
def dedup_horizon(case: Case) -> Iterator[str]:
    """A redelivery older than the inbox remembers was run."""
    kept_s = case.terms.inbox_retention_s
    if case.terms.admission is not Admission.BY_INBOX or kept_s is None:
        return
    for run in case.runs:
        _, claim = case.claim_of.get(run.start.token, (0, None))
        tx = case.txs.get(run.start.tx)
        if claim is None or not claim.repeated or tx is None or tx.admitted is None:
            continue
        began = tx.admit.began if tx.admit is not None else None
        # In whole milliseconds, as messages and inboxes have them.
        began_ms = int((began or case.events[tx.admitted].at) * 1000)
        age_s = (began_ms - run.start.message.time_ms) / 1000
        if age_s > kept_s:
            message = run.start.message
            yield (
                f"{message.topic}/{message.id}, a repeated delivery {age_s:.0f} s old, was run; "
                f"the inbox remembers {kept_s:.0f} s"
            )

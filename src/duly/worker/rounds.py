"""The three ways to run, one short function per guarantee: this source is the definition.

A round takes claimed messages through to their settlement. It yields calls of the handler
(whose exception is thrown back in), pauses, and boundaries (None), at each of which the
process may die without breaking the promise.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

from duly.guarantees import Dead, Done, Release, Settlement
from duly.store import Admitted, Session, Transaction, flush, forget_since, mark
from duly.worker.steps import Failed, Round, Step, Unfit, Work, blocking

if TYPE_CHECKING:
    from duly.worker.lane import Lane


def at_most_once(lane: Lane) -> Round:
    """Settled, durably, before the handler runs. A crash in between loses, nothing repeats."""
    work = yield from lane.take()
    started = lane.settle_before(work)
    yield None
    # From here on nothing can bring these messages back, so not even a stop skips one.
    yield from call_each(lane, started, lane.report_failure)


def at_least_once(lane: Lane) -> Round:
    """Settled after the handler ran. A crash in between repeats, nothing is lost."""
    work = yield from lane.take()
    ended = yield from call_while_time(lane, work)
    yield None
    yield from lane.settle(ended)


def exactly_once(lane: Lane) -> Round:
    """Effects, the memory of the message and what it publishes commit in one transaction.

    The fence (`Session.admit`) is its first statement, so that a second copy waits instead of
    running beside the first; the settlement is its last and covers only what ran.
    """
    work = lane.share_for_transaction((yield from lane.take()))
    if not work:
        return
    session = lane.begin()
    tx: Transaction[Any] = Transaction(session.connection, lane.around.source)
    try:
        admitted = session.admit([delivery for delivery, _ in work])
        yield None
        ended = yield from call_within(lane, fresh_of(work, admitted), tx, session)
        yield None
        published = flush(tx, session)
        session.settle(*lane.told_to_store(admitted, ended))
        yield None
        session.commit()
    except BaseException as error:  # noqa: BLE001 - rolled_back raises what is no failure
        session.rollback()
        yield from lane.rolled_back(work, error)
        return
    yield None
    lane.committed(tx, ended, published, admitted)
    yield None
    yield from lane.settle_after_commit(of_all(ended, admitted))


# --- How the handler is called, for each of them.


def call_each(lane: Lane, work: Work, failed: Failed) -> Generator[Step, None, list[Settlement]]:
    """Call the handler for all of ``work``, whatever fails; returns how each ended."""
    if lane.consumer.handler.is_batch:
        return (yield from call_batch_once(work, failed))
    ended: list[Settlement] = []
    for delivery, argument in work:
        try:
            yield delivery, (argument,)
        except Exception as error:  # noqa: BLE001 - whatever the handler raises
            ended.append(failed(delivery, error))
        else:
            ended.append(Done(delivery.receipt))
    return ended


def call_while_time(lane: Lane, work: Work) -> Generator[Step, None, list[Settlement]]:
    """Call the handler until time is up; what was not started stays pending."""
    if lane.consumer.handler.is_batch and not lane.careful:
        return (yield from call_batch(lane, work, None))
    ended: list[Settlement] = []
    add, until = ended.append, lane.until()
    is_batch, blocked = lane.consumer.handler.is_batch, lane.blocked()
    for delivery, argument in work:
        if argument.__class__ is Unfit:
            add(Dead(delivery.receipt, argument.why))
        elif blocked is not None and blocked.holds(delivery):
            add(Release(delivery.receipt))
        elif lane.stopping or (ended and lane.moment >= until):
            break
        else:
            try:
                yield delivery, (([argument] if is_batch else argument),)
            except Exception as error:  # noqa: BLE001 - whatever the handler raises
                add(blocking(blocked, delivery, lane.failure(delivery, error)))
            else:
                add(Done(delivery.receipt))
    lane.keep(work[len(ended) :])
    return ended


def call_within(
    lane: Lane, work: Work, tx: Transaction[Any], session: Session[Any]
) -> Generator[Step, None, list[Settlement]]:
    """Call the handler inside a transaction until time is up.

    Without savepoints a failure has no culprit to roll back to, so it ends the transaction
    (`lane.rolled_back` turns them on); with one per message only the culprit is undone.
    """
    if lane.careful:
        return (yield from call_with_savepoints(lane, work, tx, session))
    if lane.consumer.handler.is_batch:
        return (yield from call_batch(lane, work, tx))
    ended: list[Settlement] = []
    add, until = ended.append, lane.until()
    for delivery, argument in work:
        if argument.__class__ is Unfit:
            add(Dead(delivery.receipt, argument.why))
        elif lane.stopping or (ended and lane.moment >= until):
            break
        else:
            yield delivery, (argument, tx)
            add(Done(delivery.receipt))
    lane.keep(work[len(ended) :])
    return ended


def call_with_savepoints(
    lane: Lane, work: Work, tx: Transaction[Any], session: Session[Any]
) -> Generator[Step, None, list[Settlement]]:
    """Call the handler with a savepoint around each message: only the culprit is rolled back."""
    ended: list[Settlement] = []
    until, blocked = lane.until(), lane.blocked()
    is_batch = lane.consumer.handler.is_batch
    for delivery, argument in work:
        if argument.__class__ is Unfit:
            ended.append(Dead(delivery.receipt, argument.why))
        elif blocked is not None and blocked.holds(delivery):
            ended.append(Release(delivery.receipt))
        elif lane.stopping or (ended and lane.moment >= until):
            break
        else:
            before = mark(tx)
            session.savepoint()
            try:
                yield delivery, (([argument] if is_batch else argument), tx)
                flush(tx, session)
            except Exception as error:  # noqa: BLE001 - whatever the handler raises
                lane.pass_on_lost(delivery, error, session.rollback_to_savepoint)
                forget_since(tx, before)
                ended.append(blocking(blocked, delivery, lane.failure(delivery, error)))
            else:
                session.release_savepoint()
                ended.append(Done(delivery.receipt))
    lane.keep(work[len(ended) :])
    return ended


def call_batch(
    lane: Lane, work: Work, tx: Transaction[Any] | None
) -> Generator[Step, None, list[Settlement]]:
    """Call a batch handler once for all of ``work``.

    Its failure names no culprit: the messages come again, one call each (`lane.careful`).
    """
    fit = [item for item in work if item[1].__class__ is not Unfit]
    if lane.stopping:
        fit = []
    if fit:
        arguments = [argument for _, argument in fit]
        try:
            about = tuple(delivery for delivery, _ in fit)
            yield about, ((arguments,) if tx is None else (arguments, tx))
        except Exception as error:
            if tx is not None:
                raise
            lane.be_careful(error)
            lane.keep(work)
            return []
    elif lane.stopping:
        lane.keep(work)
        return []
    return [
        Dead(delivery.receipt, argument.why)
        if argument.__class__ is Unfit
        else Done(delivery.receipt)
        for delivery, argument in work
    ]


def call_batch_once(work: Work, failed: Failed) -> Generator[Step, None, list[Settlement]]:
    """Call a batch handler once, whatever fails: at-most-once may not call it again."""
    if not work:
        return []
    try:
        yield tuple(delivery for delivery, _ in work), ([argument for _, argument in work],)
    except Exception as error:  # noqa: BLE001 - whatever the handler raises
        return [failed(delivery, error) for delivery, _ in work]
    return [Done(delivery.receipt) for delivery, _ in work]


def fresh_of(work: Work, admitted: Admitted) -> Work:
    """The part of ``work`` that may run."""
    if len(admitted.fresh) == len(work):
        return work
    fresh = {delivery.receipt for delivery in admitted.fresh}
    return [item for item in work if item[0].receipt in fresh]


def of_all(ended: Sequence[Settlement], admitted: Admitted) -> list[Settlement]:
    """How every admitted message ended, also those that did not run: a repeat is settled like
    any other, not ignored.
    """
    return [
        *ended,
        *(Done(delivery.receipt) for delivery in admitted.repeated),
        *(Dead(delivery.receipt, IDENTITY_TAKEN) for delivery in admitted.conflicting),
        *(Dead(delivery.receipt, OLDER_THAN_INBOX) for delivery in admitted.too_old),
    ]


IDENTITY_TAKEN = (
    "identity conflict: this (source, id) has taken effect before with another body. "
    "One id names one event; publish the new event under an id of its own"
)
OLDER_THAN_INBOX = (
    "a repeated delivery older than the inbox remembers: whether it took effect cannot be "
    "told. Look whether its effect is there; replay it only if not"
)

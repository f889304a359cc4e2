"""The three ways to run, one short function per guarantee: this source is the definition.

A round takes claimed messages through to their settlement. It yields calls of the handler
(whose exception is thrown back in), pauses, and boundaries (None), at each of which the
process may die without breaking the promise.
"""

from __future__ import annotations

from collections.abc import Generator
from math import inf
from typing import TYPE_CHECKING, Any, cast

from duly.broker import Delivery
from duly.errors import BrokerError, DulyError
from duly.guarantees import Release, Settlement
from duly.store import Admitted, Pipelines, Session, Transaction, end, flush, forget_since, mark
from duly.worker.admission import admit, of_all, told_to_store
from duly.worker.ahead import claim_within
from duly.worker.beforehand import settle_before
from duly.worker.failing import excused, pass_on_lost
from duly.worker.steps import (
    NO_WORK,
    Blocked,
    BrokerFailed,
    Calls,
    Failed,
    HandlerFailed,
    Round,
    Step,
    Unfit,
    Work,
    blocking,
    describe,
)
from duly.worker.undone import rolled_back

if TYPE_CHECKING:
    from duly.worker.lane import Lane


def at_most_once(lane: Lane) -> Round:
    """Settled, durably, before the handler runs. A crash in between loses, nothing repeats."""
    work = yield from lane.take()
    started = settle_before(lane, work)
    yield None
    # From here on nothing can bring these messages back, so not even a stop skips one.
    yield from call_all(lane, started)


def at_least_once(lane: Lane) -> Round:
    """Settled after the handler ran. A crash in between repeats, nothing is lost."""
    work = yield from lane.take()
    ended = yield from call_while_time(lane, work)
    yield None
    yield from lane.settle(ended, len(work) - lane.left(), claims=lane.consumer.options.batch)


def exactly_once(lane: Lane) -> Round:
    """Effects, the memory of the message and what it publishes commit in one transaction.

    The fence (`Session.admit`) is its first statement, so that a second copy waits instead of
    running beside the first; the settlement is its last and covers only what ran.
    """
    work = lane.share_for_transaction((yield from lane.take()))
    if not work:
        return
    session = lane.begin()
    tx: Transaction[Any] = Transaction(session.connection, lane.around.source, lane.around.stamps)
    try:
        admitted = admit(lane, session, work)
        yield None
        ended = yield from call_within(lane, fresh_of(work, admitted), tx, session)
        yield None
        published = flush(tx, session, lane.around.declare)
        session.settle(*told_to_store(lane, admitted, ended))
        ahead = claim_within(lane, tx, session)
        yield None
        session.commit()
    except BaseException as error:  # noqa: BLE001 - rolled_back raises what is no failure
        error = excused(session, error)
        session.rollback()
        end(tx)
        yield from rolled_back(lane, work, error)
        return
    end(tx)
    yield None
    lane.committed(tx, published, admitted)
    lane.receive(ahead)
    yield None
    yield from lane.settle_after_commit(of_all(ended, admitted))


# --- How the handler is called, for each of them.


def call_all(lane: Lane, work: Work) -> Generator[Step, None, None]:
    """Call the handler for all of ``work``, whatever fails: nothing will bring it back."""
    lane.starts += len(work)
    if lane.consumer.handler.is_batch and work:
        work = in_one_call(work)
    calls, start = Calls(work, (), inf), lane.around.clock()
    while calls.done < len(work):
        try:
            yield calls
        except Exception as error:  # noqa: BLE001 - whatever the handler raises
            lane.report_failure(work[calls.done][0], error)
            lane.starts -= work.found_unfit(calls.done)
            calls.done += 1
    lane.calls_s = lane.around.clock() - start


def call_while_time(lane: Lane, work: Work) -> Generator[Step, None, list[Settlement]]:
    """Call the handler until time is up; what was not started stays claimed.

    A batch handler's failure names no culprit: its messages come again, one call each.
    """
    if lane.consumer.handler.is_batch:
        work = work.decoded()
        if not lane.careful and lane.order_of(work) is None:
            try:
                return (yield from call_batch(lane, work, ()))
            except Exception as error:  # noqa: BLE001 - whatever the handler raises
                lane.be_careful(error)
                lane.keep(work)
                return []
    return (yield from call_in_turn(lane, work, (), lane.failure, lane.order))


def call_within(
    lane: Lane, work: Work, tx: Transaction[Any], session: Session[Any]
) -> Generator[Step, None, list[Settlement]]:
    """Call the handler inside a transaction until time is up.

    Without savepoints a failure has no culprit to roll back to, so it ends the transaction
    (`rolled_back` turns them on); with one per message only the culprit is undone.
    """
    if lane.careful or lane.leaves_savepoints:
        return (yield from call_with_savepoints(lane, work, tx, session))
    if lane.consumer.options.pipeline:
        return (yield from call_in_pipeline(lane, work, tx, session))
    return (yield from call_together(lane, work, tx, session))


def call_in_pipeline(
    lane: Lane, work: Work, tx: Transaction[Any], session: Session[Any]
) -> Generator[Step, None, list[Settlement]]:
    """The same with statements that do not wait for answers; an error may come at the end."""
    pipeline = cast(Pipelines, session)  # the contract refuses it elsewhere
    pipeline.start_pipeline()
    ended = yield from call_together(lane, work, tx, session)
    try:
        pipeline.end_pipeline()
    except DulyError:
        raise
    except Exception as error:
        raise HandlerFailed(describe(error)) from error
    return ended


def call_together(
    lane: Lane, work: Work, tx: Transaction[Any], session: Session[Any]
) -> Generator[Step, None, list[Settlement]]:
    """Call the handler until time is up; the failure of one is the failure of all.

    Who may have left a savepoint open is the last of the transaction: its commit closes that, and
    no later handler can undo with it what is not its own.
    """
    if lane.consumer.handler.is_batch:
        work = work.decoded()
    order = lane.order_of(work)
    lane.caller.watch_savepoints(session)
    if lane.consumer.handler.is_batch and order is None:
        try:
            return (yield from call_batch(lane, work, (tx,)))
        except Exception as error:
            raise HandlerFailed(describe(error)) from error
    ended = yield from call_in_turn(lane, work, (tx,), raise_it, order)
    lane.leaves_savepoints |= lane.caller.savepoint_left and not lane.consumer.handler.is_batch
    return ended


def call_in_turn(
    lane: Lane, work: Work, extra: tuple[Any, ...], failed: Failed, blocked: Blocked | None
) -> Generator[Step, None, list[Settlement]]:
    """Call the handler message after message until time is up; how each ended, in order.

    Where no order is to be kept behind a failure, all calls are one step.
    """
    rest, work = work, in_single_calls(lane, work)
    until = lane.until()
    calls = Calls(work, extra, until, most=len(work) if blocked is None else 1)
    ended: list[Settlement] = []
    while calls.done < len(work):
        if blocked is not None and blocked.holds(delivery := work.deliveries[calls.done]):
            ended.append(Release(delivery.receipt))
            calls.done += 1
        elif unfit := work.unfit(calls.done):
            delivery = work.deliveries[calls.done]
            ended.append(blocking(blocked, delivery, unfit.settlement(delivery.receipt)))
            calls.done += 1
        elif lane.stopping or (ended and lane.caller.over(until)):
            break
        else:
            start = calls.done
            try:
                yield calls
            except Exception as error:  # noqa: BLE001 - whatever the handler raises
                ended += work.handled(start, calls.done)
                lane.starts += calls.done - start
                if work.found_unfit(calls.done):
                    continue  # its handler was not called
                lane.starts += 1
                culprit = work.deliveries[calls.done]
                ended.append(blocking(blocked, culprit, failed(culprit, error)))
                calls.done += 1
            else:
                ended += work.handled(start, calls.done)
                lane.starts += calls.done - start
    lane.keep(rest[calls.done :] if calls.done < len(work) else NO_WORK)
    return ended


def call_with_savepoints(
    lane: Lane, work: Work, tx: Transaction[Any], session: Session[Any]
) -> Generator[Step, None, list[Settlement]]:
    """Call the handler with a savepoint around each message: only the culprit is rolled back."""
    rest, work = work, in_single_calls(lane, work)
    until, blocked = lane.until(), lane.order
    savepoints = 0
    ended: list[Settlement] = []
    for index in range(len(work)):
        if blocked is not None and blocked.holds(delivery := work.deliveries[index]):
            ended.append(Release(delivery.receipt))
        elif unfit := work.unfit(index):
            delivery = work.deliveries[index]
            ended.append(blocking(blocked, delivery, unfit.settlement(delivery.receipt)))
        elif (
            lane.stopping
            or (ended and (lane.caller.moment >= until or lane.caller.leases_lost))
            or savepoints >= lane.most_savepoints
        ):
            break
        else:
            before = mark(tx)
            savepoints += 1
            session.savepoint()
            lane.starts += 1
            try:
                # A part, not an item: of a span nothing is looked up that nobody asks for.
                yield Calls(work[index : index + 1], (tx,), until)
                flush_for_handler(tx, session, lane)
            except BrokerFailed:
                raise
            except Exception as error:
                if (excuse := excused(session, error)) is not error:
                    raise excuse from error
                delivery = work.deliveries[index]
                pass_on_lost(delivery, lane.consumer.name, error, session.rollback_to_savepoint)
                forget_since(tx, before)
                if work.found_unfit(index) and (unfit := work.unfit(index)):
                    settlement: Settlement = unfit.settlement(delivery.receipt)
                    lane.starts -= 1
                else:
                    settlement = lane.failure(delivery, error)
                ended.append(blocking(blocked, delivery, settlement))
            else:
                session.release_savepoint()
                ended += work.handled(index, index + 1)
    lane.keep(rest[len(ended) :])
    return ended


def flush_for_handler(tx: Transaction[Any], session: Session[Any], lane: Lane) -> None:
    """Flush what a handler published. A refused message is the handler's failure; a broker that
    cannot be used is nobody's, and must not be charged.
    """
    try:
        flush(tx, session, lane.around.declare)
    except BrokerError as error:
        raise BrokerFailed(str(error)) from error


def call_batch(
    lane: Lane, work: Work, extra: tuple[Any, ...]
) -> Generator[Step, None, list[Settlement]]:
    """Call a batch handler once for all of ``work``; raises what it raises."""
    if lane.stopping:
        lane.keep(work)
        return []
    if fit := work.fit():
        lane.starts += len(fit)
        yield Calls(in_one_call(fit), extra, inf)
    return work.ended()


def in_one_call(work: Work) -> Work:
    """All of ``work`` as one call of a batch handler, which may take its list apart."""
    return Work((work.deliveries,), [[*work.arguments]], plain=True)


def in_single_calls(lane: Lane, work: Work) -> Work:
    """Each of ``work`` as one call, which takes a batch of one where the handler takes batches.

    Only to be called with: what is kept of it for another round is kept as it was claimed.
    """
    if not lane.consumer.handler.is_batch:
        return work
    work = work.decoded()
    arguments = [a if a.__class__ is Unfit else [a] for a in work.arguments]
    return Work(work.deliveries, arguments, plain=work.plain)


def raise_it(_: Delivery, error: Exception) -> Settlement:
    """The failure of one is the failure of all."""
    raise HandlerFailed(describe(error)) from error


def fresh_of(work: Work, admitted: Admitted) -> Work:
    """The part of ``work`` that may run."""
    if len(admitted.fresh) == len(work):
        return work
    fresh = {delivery.receipt for delivery in admitted.fresh}
    return work.only(lambda delivery, _: delivery.receipt in fresh)

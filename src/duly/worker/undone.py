"""A transaction that was rolled back, and what that means for its messages."""

from __future__ import annotations

import logging
from collections.abc import Generator
from typing import TYPE_CHECKING

from duly import errors, events
from duly.worker.admission import recorded
from duly.worker.steps import NO_WORK, HandlerFailed, Step, Work, blocking, describe

if TYPE_CHECKING:
    from duly.worker.lane import Lane

log = logging.getLogger("duly.worker")

# How often in a row a transaction is done again after a deadlock, a lost connection or a full disk,
# before that is charged like any failure: a handler that always ends so would come again for ever.
INTERRUPTIONS = 20


def rolled_back(lane: Lane, work: Work, error: BaseException) -> Generator[Step, None, None]:
    """Decide what a rolled-back transaction means for its messages."""
    lane.keep(NO_WORK)
    if not isinstance(error, Exception):
        raise error  # not the handler's failure: this lane settles nothing any more
    if lane.consumer.handler.is_async:
        yield None  # off the loop: what follows may wait for somebody whom that keeps waiting
    lane.tell(events.RolledBack(lane.consumer.name, len(work), error))
    if isinstance(error, errors.BrokerError):
        lane.keep(work)
        raise error
    if isinstance(error, errors.TransactionInterrupted) and lane.interruptions < INTERRUPTIONS:
        lane.interruptions += 1
        lane.keep(work)
        yield lane.pause_after(error)
        return
    if isinstance(error, HandlerFailed | errors.PublishError):
        lane.keep(work)
        lane.be_careful(error)
    elif isinstance(error, errors.Superseded | errors.CommitUnknown):
        # Lost to another, or perhaps committed: redelivery finds out through admission.
        log.warning("consumer %s: %s", lane.consumer.name, error)
        lane.hold_behind(work)
        # Of a lost claim the rest, which waits to go one by one, is lost as well.
        rest = lane.pending if isinstance(error, errors.Superseded) else NO_WORK
        yield from lane.give_back(work, rest)
        if rest:
            lane.pending, lane.singly = NO_WORK, 0
    elif len(work) == 1 and (lane.careful or lane.singly):
        lane.singly = max(0, lane.singly - 1)
        delivery = work[0][0]
        ended = blocking(lane.order, delivery, lane.failure(delivery, error))
        yield from lane.settle(recorded(lane, work, ended), 1)
    else:
        # The commit itself, the flush or a lost transaction: it has no culprit to name.
        log.info("consumer %s goes one by one after %s", lane.consumer.name, describe(error))
        lane.keep(work)
        lane.singly = len(work)

"""The next claim of a lane, made by the transaction that settles its last one."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, cast

from duly import errors
from duly.broker import Ahead
from duly.guarantees import Admission
from duly.store import ClaimsAhead, Session, Transaction, waits_for_commit

if TYPE_CHECKING:
    from duly.worker.lane import Lane

log = logging.getLogger("duly.worker")

# How many rounds claim by themselves after a claim with a settlement has failed.
APART_ROUNDS = 16


def offered(lane: Lane, limit: int) -> Ahead | None:
    """The next claim, of ``limit`` messages at most, where nothing has to be done before it.

    What was kept or must go one by one comes first, and so does an order to keep; a limit to
    the rate of starts counts claims.
    """
    lane.apart = max(0, lane.apart - 1)
    if (
        lane.claims_ahead is None
        or lane.apart
        or lane.stopping
        or lane.left()
        or lane.pending
        or lane.around.permits is not None
        or (lane.order is not None and lane.order.holds_any())
    ):
        return None
    lane.ahead_at = lane.around.clock()
    return lane.claims_ahead.ahead(limit, lane.consumer.options.batch_bytes)


def claim_within(lane: Lane, tx: Transaction[Any], session: Session[Any]) -> Ahead | None:
    """Make the next claim in this transaction, after its settlement.

    None where calls wait for the commit: one that ends the process would charge its death to a
    message claimed alone, which never started.
    """
    if lane.admission is not Admission.BY_CLAIM or waits_for_commit(tx):
        return None
    ahead = offered(lane, lane.consumer.options.batch)
    if ahead is not None:
        try:
            # A store that is its broker's database does what that does.
            cast(ClaimsAhead, session).claim(ahead)
        except errors.BrokerError as error:
            claim_apart(lane, error)
            raise  # the transaction is run again, and claims nothing
    return ahead


def claim_apart(lane: Lane, error: Exception) -> None:
    """Claim nothing ahead for a while: what cannot be claimed must not undo what was handled."""
    log.warning("consumer %s claims apart from settling: %s", lane.consumer.name, error)
    lane.apart = APART_ROUNDS

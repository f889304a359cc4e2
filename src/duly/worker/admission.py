"""Admission as a lane sees it: what may run, and what the broker is told of all the others."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from duly import errors, events
from duly.broker import Delivery, NotesRepeats, SettlesRemembered, Subscription
from duly.guarantees import Admission, Dead, Done, Release, Retry, Settlement
from duly.store import Admitted, Session, are_parked, covered
from duly.worker.steps import NO_WORK, Work, blocking

if TYPE_CHECKING:
    from duly.worker.lane import Lane

log = logging.getLogger("duly.worker")


def admit(lane: Lane, session: Session[Any], work: Work) -> Admitted:
    """Through the fence; what it refuses as dead holds its key like any other dead letter.

    Raises `Superseded` where the claim is older than the inbox remembers: had another taken it
    over meanwhile, that could have been forgotten.
    """
    admitted = session.admit(work.deliveries)
    # After the fence: from here on nobody else can take effect for these messages.
    age_s = lane.around.clock() - lane.claimed_at
    kept_s = lane.consumer.options.inbox_retention_s
    if lane.admission is Admission.BY_INBOX and age_s > kept_s:
        raise errors.Superseded(
            f"consumer {lane.consumer.name!r}: claimed {age_s:.0f} s ago, and the inbox "
            f"remembers {kept_s:.0f} s; nothing was run"
        )
    for delivery in (*admitted.dead, *admitted.conflicting, *admitted.too_old):
        blocking(lane.order, delivery, Dead(delivery.receipt, ""))
    return admitted


def told_to_store(
    lane: Lane, admitted: Admitted, ended: Sequence[Settlement]
) -> tuple[Sequence[Settlement], Sequence[Delivery]]:
    """What `Session.settle` is told: what ran, and the unstarted where an inbox holds their ids
    already.
    """
    fresh, count = admitted.fresh, covered(ended)
    if lane.admission is Admission.BY_INBOX:
        unstarted = [Release(delivery.receipt) for delivery in fresh[count:]]
        return [*ended, *unstarted], fresh
    return ended, fresh[:count]


def recorded(lane: Lane, work: Work, ended: Settlement) -> Sequence[Settlement]:
    """What the broker is told of one message that failed with its transaction.

    Where the store remembers what has ended, it first remembers the dead, in a transaction of its
    own: who lost the claim to this lane must not commit after all. As long as that cannot be
    written nobody is given up on. Where it parks what is to be tried again, likewise: only then
    may the log be told that it is done.
    """
    parks = lane.parks or are_parked(work.deliveries)
    of_the_store = isinstance(ended, Dead) or (parks and isinstance(ended, Retry))
    if lane.admission is Admission.BY_CLAIM or not of_the_store:
        return [ended]
    session: Session[Any] | None = None
    try:
        session = lane.begin()
        admitted = admit(lane, session, work)
        told = [ended] if admitted.fresh else []
        session.settle(told, admitted.fresh)
        session.commit()
        suppressed(lane, admitted.repeated)
        return of_all(told, admitted)
    except (errors.BrokerError, errors.TransactionError) as error:
        log.warning("consumer %s could not record a failure: %s", lane.consumer.name, error)
        if session is not None:
            session.rollback()
        lane.keep(NO_WORK)
        return [Release(ended.receipt, started=True)]
    except BaseException:
        # Not the handler's failure: nothing is settled, and nobody else is kept waiting.
        if session is not None:
            session.rollback()
        raise


def suppressed(lane: Lane, repeated: Sequence[Delivery]) -> None:
    """Count and tell what admission found to have taken effect before; the transaction stands.

    Where the broker keeps it for people to see, it is told before they are settled: afterwards
    it may have forgotten them. That it could not note them changes nothing.
    """
    if not repeated:
        return
    lane.counts.repeats += len(repeated)
    lane.tell(events.RepeatsSuppressed(lane.consumer.name, repeated))
    if isinstance(lane.subscription, NotesRepeats):
        try:
            lane.subscription.note_repeats(repeated)
        except (errors.BrokerError, errors.CommitUnknown) as error:
            log.warning(
                "consumer %s: %d suppressed repeats are not in the incidents: %s",
                lane.consumer.name, len(repeated), error,
            )  # fmt: skip


def remembered(admission: Admission | None, subscription: Subscription) -> SettlesRemembered | None:
    """Where to settle what has taken effect without waiting for it: a store's cursor knows."""
    if admission is not Admission.BY_CURSOR or not isinstance(subscription, SettlesRemembered):
        return None
    return subscription if subscription.settles_remembered else None


def of_all(ended: Sequence[Settlement], admitted: Admitted) -> list[Settlement]:
    """How every admitted message ended, also those that did not run: a repeat is settled like
    any other, not ignored.
    """
    if not (admitted.repeated or admitted.conflicting or admitted.too_old or admitted.dead):
        return [*ended]
    return [
        *ended,
        *(Done(delivery.receipt) for delivery in admitted.repeated),
        *(Dead(delivery.receipt, IDENTITY_TAKEN) for delivery in admitted.conflicting),
        *(Dead(delivery.receipt, OLDER_THAN_INBOX) for delivery in admitted.too_old),
        *(Dead(delivery.receipt, GIVEN_UP_BEFORE) for delivery in admitted.dead),
    ]


IDENTITY_TAKEN = (
    "identity conflict: this (source, id) has taken effect before with another body. "
    "One id names one event; publish the new event under an id of its own"
)
OLDER_THAN_INBOX = (
    "a repeated delivery older than the inbox remembers: whether it took effect cannot be "
    "told. Look whether its effect is there; replay it only if not"
)
GIVEN_UP_BEFORE = (
    "given up on before: the transaction that recorded it stands, and its worker ended before it "
    "could tell the broker. The log of that worker has the error"
)

"""At-most-once: settling before the handler runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from duly import errors
from duly.broker import Ahead
from duly.worker.ahead import claim_apart, offered
from duly.worker.steps import NO_WORK, Work

if TYPE_CHECKING:
    from duly.worker.lane import Lane

# What was claimed ahead lies claimed while the handlers of what was settled with it run. Longer
# than this it is not to be kept from other workers.
_QUICK_S = 0.05


def settle_before(lane: Lane, work: Work) -> Work:
    """Settle all, durably; returns what may start now.

    A refused one belongs to another worker, and one whose settlement is unknown may have been
    settled before: neither starts.
    """
    if not work:
        return work
    # What cannot be decoded must be found before all is settled.
    work = lane.in_round = work.decoded()
    ended, start = work.ended(), lane.around.clock()
    ahead = _offered(lane)
    try:
        refused = set(lane.settle_with(ended, ahead))
    except errors.BrokerUnavailable:
        lane.keep(work)  # certainly not settled: they may still start, later
        raise
    except errors.BrokerUnusable as error:
        if ahead is not None:  # perhaps for what was to be claimed: settled alone, they may start
            lane.keep(work)
            claim_apart(lane, error)
        raise
    lane.receive(ahead)
    lane.tell_settled(ended, refused, start)
    started = work.fit()
    if refused:
        started = started.only(lambda delivery, _: delivery.receipt not in refused)
    lane.in_round = NO_WORK
    lane.counts.handled += len(started)
    return started


def _offered(lane: Lane) -> Ahead | None:
    """The next claim, of quick handlers only, and of several messages only: a single one is
    charged with the death of its worker, also where that died of those before it. Handlers in
    flight at once (`ConcurrentLane`) are never called quick.
    """
    if lane.consumer.options.batch == 1 or lane.calls_s > _QUICK_S:
        return None
    return offered(lane, lane.consumer.options.batch)

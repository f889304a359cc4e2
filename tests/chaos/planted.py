"""Bugs for every process of a chaos run: what its judgement has to name."""

from __future__ import annotations

import threading
from collections.abc import Generator
from typing import Any

from duly.guarantees import Guarantee
from duly.store import Transaction, flush
from duly.worker import lane, rounds, undone

# So long that a worker killed or stopped at any time is most likely in between.
_BETWEEN_S, _NEVER = 0.2, threading.Event()


def settled_in_the_wrong_order() -> None:
    """Before the handler where it is after it, and the other way round."""
    lane.ROUNDS[Guarantee.AT_LEAST_ONCE] = rounds.at_most_once
    lane.ROUNDS[Guarantee.AT_MOST_ONCE] = rounds.at_least_once
    lane.ROUNDS[Guarantee.EXACTLY_ONCE] = _in_two_commits


def _in_two_commits(self: lane.Lane) -> Generator[Any, None, None]:
    """The effects in one, the settlement in another: who dies in between repeats the effects."""
    work = self.share_for_transaction((yield from self.take()))
    if not work:
        return
    session = self.begin()
    tx: Transaction[Any] = Transaction(session.connection, self.around.source)
    try:
        session.admit(work.deliveries)
        ended = yield from rounds.call_within(self, work, tx, session)
        flush(tx, session)
        session.commit()
    except BaseException as error:
        session.rollback()
        yield from undone.rolled_back(self, work, error)
        return
    _NEVER.wait(_BETWEEN_S)
    self.subscription.settle(ended)

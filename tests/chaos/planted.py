"""Bugs for every process of a chaos run: what its judgement has to name."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Generator
from typing import Any

from duly.guarantees import Guarantee
from duly.store import Admitted, Transaction, flush
from duly.worker import lane, rounds, undone
from duly.worker.steps import Work

# So many transactions of a process go well before it dies between its two commits.
_GO_WELL = 5
_commits = itertools.count(1)


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
    if next(_commits) > _GO_WELL:
        os.kill(os.getpid(), signal.SIGKILL)
    self.subscription.settle(ended)


def what_has_taken_effect_is_forgotten() -> None:
    """Acknowledged before the handler where it is after it; and an inbox that nobody asks."""
    lane.ROUNDS[Guarantee.AT_LEAST_ONCE] = rounds.at_most_once
    setattr(rounds, "admit", _everything)  # noqa: B010 - it is no name of that module's own


def _everything(_lane: lane.Lane, _session: Any, work: Work) -> Admitted:
    return Admitted(fresh=work.deliveries)

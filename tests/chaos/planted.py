"""Bugs for every process of a chaos run: what its judgement has to name."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from duly.brokers.kafka.store import KafkaSession
from duly.brokers.rabbitmq.publisher import Publisher, Sending
from duly.guarantees import Guarantee
from duly.store import Admitted, Transaction, flush
from duly.worker import lane, rounds, undone
from duly.worker.steps import Work

# By the name of its log a process is the first in its place: that dies between its two commits.
_FIRST = ".1.log"


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
    if str(Path("/proc/self/fd/1").readlink()).endswith(_FIRST):
        os.kill(os.getpid(), signal.SIGKILL)
    self.subscription.settle(ended)


def what_a_queue_leaves_open_is_taken_for_done() -> None:
    """Acknowledged before the handler where it is after it; an inbox that nobody asks; a message
    that is published where it was only sent.
    """
    _send = Publisher.send

    def send(self: Publisher, sendings: Sequence[Sending], deadline_s: float | None = None) -> None:
        for sending in sendings:
            sending.confirm = False
        _send(self, sendings, deadline_s)

    Publisher.send = send  # type: ignore[method-assign]
    lane.ROUNDS[Guarantee.AT_LEAST_ONCE] = rounds.at_most_once
    setattr(rounds, "admit", _everything)  # noqa: B010 - it is no name of that module's own


def what_a_log_leaves_open_is_taken_for_done() -> None:
    """Acknowledged before the handler where it is after it; a cursor and an inbox that nobody asks;
    of what a transaction copies the first record twice, in one that is committed by itself, and the
    last never.
    """
    _commit = KafkaSession.commit

    def commit(self: KafkaSession) -> None:
        if self._sendings:
            self._publish(self._sendings[:1])
            del self._sendings[1:]
        _commit(self)

    KafkaSession.commit = commit  # type: ignore[method-assign]
    lane.ROUNDS[Guarantee.AT_LEAST_ONCE] = rounds.at_most_once
    setattr(rounds, "admit", _everything)  # noqa: B010 - it is no name of that module's own


def _everything(_lane: lane.Lane, _session: Any, work: Work) -> Admitted:
    return Admitted(fresh=work.deliveries)

"""What a handler's failure means for its message: decided by the policy, logged, told."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from duly import errors, events
from duly.broker import Delivery
from duly.consumer import Consumer
from duly.guarantees import Dead, Retry, Settlement
from duly.store import Excuses, Session
from duly.worker.steps import Counts, Surroundings, describe

log = logging.getLogger("duly.worker")


class Failures:
    """The failures of one lane's handler; they go into its ``counts``."""

    def __init__(self, consumer: Consumer, around: Surroundings, counts: Counts) -> None:
        self._consumer = consumer
        self._around = around
        self._counts = counts

    def settlement(self, delivery: Delivery, error: Exception) -> Settlement:
        """What the handler's exception means for the message: another attempt, or none."""
        delay_s = self._delay_s(delivery, error)
        text = describe(error)
        self._count(delivery, error, delay_s)
        if delay_s is None:
            self._counts.dead += 1
            log.error(
                "message %s is dead for consumer %s after attempt %d: %s",
                delivery.message_id, self._consumer.name, delivery.attempt, text, exc_info=error,
            )  # fmt: skip
            return Dead(delivery.receipt, text)
        log.warning(
            "consumer %s failed on message %s (attempt %d), again in %.1f s: %s",
            self._consumer.name, delivery.message_id, delivery.attempt, delay_s, text,
            exc_info=error,
        )  # fmt: skip
        return Retry(delivery.receipt, delay_s, text)

    def report(self, about: Delivery | Sequence[Delivery], error: Exception) -> None:
        """At-most-once: settled already, so a failure is only reported."""
        for delivery in (about,) if isinstance(about, Delivery) else about:
            self._count(delivery, error, None)
            log.error(
                "consumer %s failed on message %s; at-most-once does not try again: %s",
                self._consumer.name, delivery.message_id, describe(error), exc_info=error,
            )  # fmt: skip

    def _delay_s(self, delivery: Delivery, error: Exception) -> float | None:
        policy = self._consumer.options.retry
        if isinstance(error, errors.Reject):
            return None
        if isinstance(error, errors.Retry) and error.in_s is not None:
            return error.in_s if delivery.attempt < policy.attempts else None
        return policy.after_failure(delivery.attempt, error, self._around.roll())

    def _count(self, delivery: Delivery, error: Exception, delay_s: float | None) -> None:
        self._counts.failed += 1
        if self._around.watchers:
            seen = events.HandlerFailed(self._consumer.name, delivery, error, delay_s)
            events.tell(self._around.watchers, seen)


def pass_on_lost(
    delivery: Delivery, consumer: str, error: Exception, rollback_to_savepoint: Callable[[], None]
) -> None:
    """Undo the culprit's part; where the transaction is gone, say so with its cause."""
    try:
        rollback_to_savepoint()
    except errors.TransactionLost as lost:
        raise errors.TransactionLost(
            f"message {delivery.message_id}, consumer {consumer}: {describe(error)}; with it the "
            f"database ended the whole transaction ({lost})"
        ) from error


def excused(session: Session[Any], error: BaseException) -> BaseException:
    """What an error inside a transaction means: where the database ended it for reasons of its
    own, that, and not the handler's failure. Asked before anything is rolled back.
    """
    by_database = not isinstance(error, errors.DulyError) and isinstance(error, Exception)
    if by_database and isinstance(session, Excuses):
        return session.excuse(error) or error
    return error

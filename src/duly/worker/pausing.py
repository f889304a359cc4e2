"""Whether a person holds a lane's subscription back, and the log line that says so."""

from __future__ import annotations

import logging

from duly.broker import Pausable, Subscription

log = logging.getLogger("duly.worker")


class Pausing:
    """What one lane knows of it: told once when it begins, and once when it ends."""

    def __init__(self, consumer: str, subscription: Subscription) -> None:
        self._consumer = consumer
        self._subscription = subscription if isinstance(subscription, Pausable) else None
        self._paused = False

    def look(self) -> None:
        """To be called after a claim."""
        if self._subscription is None or self._subscription.paused == self._paused:
            return
        self._paused = not self._paused
        if self._paused:
            log.warning(
                "consumer %s is paused: nothing is claimed until `duly resume`", self._consumer
            )
        else:
            log.info("consumer %s goes on: it is not paused any more", self._consumer)

"""How far schedules are, in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from duly.broker import Outcome
from duly.errors import PublishFailed
from duly.message import Message


class Reached:
    """The last tick of each schedule. See `duly.schedules.Ticking`.

    ``refusal`` says of a message, before any is stored, whether it would be refused.
    """

    def __init__(
        self,
        publish: Callable[[Sequence[Message[Any]]], Sequence[Outcome]],
        refusal: Callable[[Message[Any]], PublishFailed | None],
    ) -> None:
        self._publish = publish
        self._refusal = refusal
        self._lock = threading.Lock()
        self._reached: dict[str, int] = {}

    def reached(self, schedule: str, now_ms: int) -> int:
        """As `Ticking.reached`."""
        with self._lock:
            return self._reached.setdefault(schedule, now_ms)

    def ticked(self) -> Mapping[str, int]:
        """As `Ticking.ticked`."""
        with self._lock:
            return dict(self._reached)

    def tick(
        self, schedule: str, reached_ms: int, to_ms: int, messages: Sequence[Message[Any]]
    ) -> Sequence[Outcome] | None:
        """As `Ticking.tick`."""
        with self._lock:
            if self._reached.get(schedule) != reached_ms:
                return None
            for message in messages:
                if refused := self._refusal(message):
                    raise refused
            outcomes = self._publish(messages)
            self._reached[schedule] = to_ms
            return outcomes

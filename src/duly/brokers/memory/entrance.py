"""The entrance of an outbox to the log in memory: a batch and its note, or neither."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from duly.broker import Outcome
from duly.errors import BrokerUnavailable, PublishFailed, Superseded
from duly.message import Message


@dataclass(slots=True)
class Kept:
    """What the log keeps for one outbox: who resumed last, as a number, and the last note."""

    last: int = 0
    note: bytes | None = None


class MemoryEntrance:
    """See `duly.broker.Entrance`. ``changed`` is the lock of the log, ``append`` is called with it
    held.
    """

    def __init__(
        self,
        kept: Kept,
        changed: threading.Condition,
        check_open: Callable[[], None],
        append: Callable[[Message[Any]], Outcome],
    ) -> None:
        self._kept = kept
        self._changed = changed
        self._check_open = check_open
        self._append = append
        self._mine = 0

    def resume(self) -> bytes | None:
        """As `Entrance.resume`."""
        with self._changed:
            self._check_open()
            self._kept.last += 1
            self._mine = self._kept.last
            return self._kept.note

    def publish(
        self, messages: Sequence[Message[Any]], note_of: Callable[[Sequence[int]], bytes]
    ) -> Sequence[Outcome]:
        """As `Entrance.publish`."""
        with self._changed:
            self._check_open()
            if not self._mine:
                raise BrokerUnavailable("nothing was published: resume first")
            if self._mine != self._kept.last:
                self._mine = 0
                raise Superseded("nothing was published: another has resumed")
            outcomes = [self._append(message) for message in messages]
            at = [n for n, each in enumerate(outcomes) if not isinstance(each, PublishFailed)]
            if at:
                self._kept.note = note_of(at)
            self._changed.notify_all()
            return outcomes

    def close(self) -> None:
        """As `Entrance.close`."""
        self._mine = 0

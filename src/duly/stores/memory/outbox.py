"""The outbox in memory: messages of committed transactions on their way to a broker."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from duly.message import Message
from duly.store import Backlog, GivenUp, Outgoing, Refusal


@dataclass(slots=True, eq=False)
class Waiting:
    """One unsent message. ``due`` None: given up on."""

    message: Message[Any]
    attempts: int = 0
    error: str = ""
    due: float | None = float("-inf")


class MemoryOutbox:
    """See `duly.store.Outbox`. ``changed`` is the lock of the store, told of every commit."""

    def __init__(self, changed: threading.Condition, clock: Callable[[], float]) -> None:
        self._changed = changed
        self._clock = clock
        self._waiting: dict[int, Waiting] = {}
        self._positions = itertools.count(1)
        self._relay: tuple[str, float] | None = None

    def put(self, messages: Sequence[Message[Any]]) -> None:
        """Add the messages of a transaction that commits; called with the lock held."""
        self._waiting.update((next(self._positions), Waiting(message)) for message in messages)
        self._changed.notify_all()

    def hold(self, relay: str, lease_s: float) -> bool:
        """As `Outbox.hold`."""
        with self._changed:
            now = self._clock()
            if self._relay is not None and self._relay[0] != relay and self._relay[1] > now:
                return False
            self._relay = (relay, now + lease_s)
            return True

    def let_go(self, relay: str) -> None:
        """As `Outbox.let_go`."""
        with self._changed:
            if self._relay is not None and self._relay[0] == relay:
                self._relay = None

    def unsent(self, limit: int, max_bytes: int, wait_s: float) -> Sequence[Outgoing]:
        """As `Outbox.unsent`. Waits in real time, whatever the injected clock says."""
        deadline = time.monotonic() + wait_s
        with self._changed:
            while True:
                found = self._first(limit, max_bytes)
                left = deadline - time.monotonic()
                if found or left <= 0:
                    return found
                self._changed.wait(left)

    def _first(self, limit: int, max_bytes: int) -> Sequence[Outgoing]:
        found: list[Outgoing] = []
        for outgoing in itertools.islice(self._ready(), limit):
            max_bytes -= outgoing.message.size
            if found and max_bytes < 0:
                break
            found.append(outgoing)
        return found

    def _ready(self) -> Iterator[Outgoing]:
        now = self._clock()
        held: set[tuple[str, str]] = set()
        for position, each in self._waiting.items():
            message = each.message
            line = None if message.key is None else (message.topic, message.key)
            if each.due is None or line in held:
                continue
            if each.due <= now:
                yield Outgoing(position, message, each.attempts)
            elif line is not None:
                held.add(line)

    def left(self, positions: Sequence[int]) -> Sequence[Outgoing]:
        """As `Outbox.left`."""
        with self._changed:
            found = [(position, self._waiting.get(position)) for position in positions]
            return [
                Outgoing(position, each.message, each.attempts) for position, each in found if each
            ]

    def sent(self, positions: Sequence[int]) -> None:
        """As `Outbox.sent`."""
        with self._changed:
            for position in positions:
                self._waiting.pop(position, None)

    def refused(self, refusals: Sequence[Refusal]) -> None:
        """As `Outbox.refused`."""
        with self._changed:
            for refusal in refusals:
                each = self._waiting.get(refusal.position)
                if each is None:
                    continue
                each.attempts += refusal.charged
                each.error = refusal.error
                in_s = refusal.retry_in_s
                each.due = None if in_s is None else self._clock() + in_s

    def given_up(self, limit: int = 100) -> Sequence[GivenUp]:
        """As `Outbox.given_up`."""
        with self._changed:
            found = (
                GivenUp(position, each.message, each.attempts, each.error)
                for position, each in self._waiting.items()
                if each.due is None
            )
            return list(itertools.islice(found, limit))

    def try_again(self, positions: Sequence[int]) -> None:
        """As `Outbox.try_again`."""
        with self._changed:
            for position in positions:
                each = self._waiting.get(position)
                if each is not None and each.due is None:
                    each.attempts, each.due = 0, float("-inf")
            self._changed.notify_all()

    def backlog(self) -> Backlog:
        """As `Outbox.backlog`."""
        with self._changed:
            unsent = [each for each in self._waiting.values() if each.due is not None]
            oldest_ms = unsent[0].message.time_ms if unsent else None
            return Backlog(len(unsent), len(self._waiting) - len(unsent), oldest_ms)

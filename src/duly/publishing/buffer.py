"""At-most-once publishing: a bounded buffer, a thread that empties it, and counted drops."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from duly.broker import Outcome
from duly.errors import BrokerUnavailable, ConfigurationError, PublishError
from duly.message import Message
from duly.publishing.direct import in_portions

log = logging.getLogger("duly")

MAX_MESSAGES = 100_000
MAX_BYTES = 64 * 1024 * 1024
# Waiting this long before storing turns a stream of single messages into portions, so that a
# thousand readings a second cost 200 commits and not a thousand.
LINGER_S = 0.005
LINGER_MESSAGES = 1000
FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 2.0


@dataclass(frozen=True, slots=True)
class Buffered:
    """The at-most-once message will be sent soon, and may be lost."""

    message_id: str


@dataclass(frozen=True, slots=True)
class Dropped:
    """The buffer is full; the at-most-once message will not be sent. It is counted."""

    message_id: str


class Drops:
    """How many messages were dropped, by topic. Safe from any thread."""

    def __init__(self, so_far: Mapping[str, int]) -> None:
        self._lock = threading.Lock()
        self._by_topic = Counter(so_far)

    def add(self, topic: str, count: int) -> None:
        """So many more."""
        with self._lock:
            self._by_topic[topic] += count

    def by_topic(self) -> Mapping[str, int]:
        """How many until now."""
        with self._lock:
            return dict(self._by_topic)

    def forked(self) -> Drops:
        """The same in a forked child, where nobody may hold the lock."""
        return Drops(self._by_topic)


Publish = Callable[[Sequence[Message[Any]]], Sequence[Outcome]]
Tell = Callable[[str, int, str], None]


class Buffer:
    """Messages on their way to the broker, of which some may be lost. Safe from any thread.

    `put` never blocks and never raises. ``publish`` runs on a thread of the buffer's own; a
    message is never given to it twice unless it raised `BrokerUnavailable`, which says that
    nothing was stored. ``dropped(topic, count, why)`` is told of each loss on the thread that
    finds it, and ``record(drops)`` of the counts on the buffer's thread, when the broker was
    just reached and at the end. All are counted in ``drops`` too.
    """

    def __init__(
        self,
        publish: Publish,
        dropped: Tell,
        record: Callable[[Mapping[str, int]], None],
        drops: Drops,
        *,
        max_messages: int = MAX_MESSAGES,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self._publish = publish
        self._tell = dropped
        self._record = record
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._waiting: deque[Message[Any]] = deque()
        self._bytes = 0
        # Held by itself, and not by the condition, whose `with` is Python's: what a signal raises
        # in there leaves it held for ever.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._closing = False
        self._until: float | None = None
        self._late = ""
        self._thread: threading.Thread | None = None
        # What is being stored; and whether nobody waits for that any more.
        self._in_hand: Sequence[Message[Any]] = ()
        self._given_up = False
        self._drops = drops
        self._unrecorded: Counter[str] = Counter()

    def put(self, message: Message[Any]) -> Buffered | Dropped:
        """Take the message, or drop and count it where the buffer is full."""
        with self._lock:
            # One that is larger than all of it goes by itself.
            full = len(self._waiting) >= self._max_messages or (
                bool(self._waiting) and self._bytes + message.size > self._max_bytes
            )
            if not full and not self._closing:
                self._waiting.append(message)
                self._bytes += message.size
                if len(self._waiting) in (1, LINGER_MESSAGES):
                    self._wake()
                return Buffered(message.id)
        why = "the app is closed" if self._closing else "the buffer is full"
        self._drop(message.topic, 1, why)
        return Dropped(message.id)

    def close(self, timeout_s: float) -> None:
        """Store what waits, for up to ``timeout_s`` seconds; drop and count the rest, and what is
        being stored then: nobody will tell what became of it.
        """
        with self._lock:
            self._closing = True
            self._until = time.monotonic() + timeout_s
            self._late = f"not stored within {timeout_s:g} s of closing"
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            # A broker that hangs in its call is not waited for any longer.
            thread.join(timeout_s + 0.1)
        with self._lock:
            self._given_up = True
            late = [*self._in_hand, *self._taken()]
        self._drop_all(late, self._late)

    # --- the buffer's thread

    def _wake(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="duly-buffer", daemon=True)
            self._thread.start()
        else:
            self._changed.notify_all()

    def _run(self) -> None:
        self._store_all()
        with self._lock:
            late = self._taken()
        self._drop_all(late, self._late)
        self._tell_broker()

    def _store_all(self) -> None:
        pause_s = FIRST_PAUSE_S
        while self._wait_for_messages():
            with self._lock:
                self._in_hand = taken = self._taken()
            left = self._store(taken)
            if not left:
                pause_s = FIRST_PAUSE_S
                continue
            with self._lock:
                self._waiting.extendleft(reversed(left))
                self._bytes += sum(message.size for message in left)
                if not self._closing:
                    self._changed.wait(pause_s)
                elif time.monotonic() + pause_s > (self._until or 0.0):
                    return
                else:
                    self._changed.wait(FIRST_PAUSE_S)
            pause_s = min(pause_s * 2, LONGEST_PAUSE_S)

    def _wait_for_messages(self) -> bool:
        """True once there are some, after the linger; False to end."""
        with self._lock:
            while not self._waiting:
                if self._closing:
                    return False
                self._changed.wait()
            if not self._closing and len(self._waiting) < LINGER_MESSAGES:
                self._changed.wait(LINGER_S)
            return self._until is None or time.monotonic() < self._until

    def _taken(self) -> Sequence[Message[Any]]:
        """All that waits, taken off; the lock is held."""
        taken = list(self._waiting)
        self._waiting.clear()
        self._bytes = 0
        return taken

    def _store(self, messages: Sequence[Message[Any]]) -> Sequence[Message[Any]]:
        """Store them; returns those that are certainly not stored and may be tried again."""
        done = 0
        for portion in in_portions(messages):
            lost: Sequence[tuple[Message[Any], str]] = ()
            try:
                outcomes = self._publish(portion)
            except BrokerUnavailable:
                return messages[done:] if self._goes_on(()) else ()
            except Exception as error:  # noqa: BLE001 - the publisher has long gone on; counted
                if isinstance(error, ConfigurationError):
                    log.error("at-most-once messages are not sent: %s", error)  # noqa: TRY400
                lost = [(message, f"{type(error).__name__}: {error}") for message in portion]
            else:
                lost = [
                    (message, str(outcome))
                    for message, outcome in zip(portion, outcomes, strict=True)
                    if isinstance(outcome, PublishError)
                ]
            done += len(portion)
            if not self._goes_on(messages[done:]):
                return ()
            for (topic, why), count in Counter((m.topic, why) for m, why in lost).items():
                self._drop(topic, count, why)
            self._tell_broker()
        return ()

    def _goes_on(self, in_hand: Sequence[Message[Any]]) -> bool:
        """Only these are in hand from now on; False where `close` has counted all as dropped."""
        with self._lock:
            self._in_hand = in_hand
            return not self._given_up

    def _tell_broker(self) -> None:
        with self._lock:
            drops, self._unrecorded = self._unrecorded, Counter()
        if drops:
            try:
                self._record(drops)
            except Exception:  # noqa: BLE001 - told again next time
                with self._lock:
                    self._unrecorded.update(drops)

    # --- drops

    def _drop_all(self, messages: Iterable[Message[Any]], why: str) -> None:
        for topic, count in Counter(message.topic for message in messages).items():
            self._drop(topic, count, why)

    def _drop(self, topic: str, count: int, why: str) -> None:
        self._drops.add(topic, count)
        with self._lock:
            self._unrecorded[topic] += count
        self._tell(topic, count, why)

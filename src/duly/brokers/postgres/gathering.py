"""`Gathering`: what threads publish to a topic at the same time is stored at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from duly.broker import Outcome
from duly.errors import BrokerError, BrokerUnavailable, CommitUnknown
from duly.message import Message

Messages = Sequence[Message[Any]]


class _Entry:
    """What one caller publishes, and how that ended: by the outcomes or an error."""

    __slots__ = ("error", "leads", "messages", "outcomes", "woken")

    def __init__(self, messages: Messages) -> None:
        self.messages = messages
        self.outcomes: Sequence[Outcome] = ()
        self.error: BaseException | None = None
        self.leads = False
        self.woken: threading.Lock | None = None

    @property
    def has_ended(self) -> bool:
        return bool(self.outcomes) or self.error is not None


class Gathering:
    """Callers who publish to a topic of which nobody waits for another's transaction.

    Who finds nobody publishing leads: on its own thread it stores what is waiting, by ``store``,
    and then hands the lead to the first who came meanwhile. So one caller waits for nobody, and
    many share statements and commits. ``most``: messages that are stored at once.
    """

    def __init__(self, store: Callable[[Messages], Sequence[Outcome]], most: int) -> None:
        self._store = store
        self._most = most
        self._mutex = threading.Lock()
        self._waiting: list[_Entry] = []
        self._led = False

    def publish(self, messages: Messages) -> Sequence[Outcome]:
        """Store these; one outcome each. Raises what ``store`` raises."""
        own = _Entry(messages)
        with self._mutex:
            self._waiting.append(own)
            if not self._led:
                self._led = own.leads = True
            else:
                own.woken = threading.Lock()
                own.woken.acquire()
        if own.woken is not None:
            self._wait(own, own.woken)
        if own.leads:
            self._lead(own)
        if own.error is not None:
            raise own.error
        return own.outcomes

    def _wait(self, own: _Entry, woken: threading.Lock) -> None:
        try:
            woken.acquire()
        except BaseException:  # interrupted: leave, or pass on a lead just received
            with self._mutex:
                if own in self._waiting:
                    self._waiting.remove(own)
                if own.leads:
                    self._hand_on()
            raise

    def _lead(self, own: _Entry) -> None:
        group: list[_Entry] = []
        try:
            with self._mutex:
                self._take(group)
            self._store_together(group)
        finally:
            # Interrupted (a KeyboardInterrupt) nobody knows how far it came.
            _fail(
                [e for e in group if not e.has_ended], CommitUnknown("publishing was interrupted.")
            )
            with self._mutex:
                if own in self._waiting:
                    self._waiting.remove(own)
                self._hand_on()
            _wake(group)

    def _take(self, group: list[_Entry]) -> None:
        """Move what is stored next into the group: to the topic of the first, as much as fits."""
        topic, room, left = self._waiting[0].messages[0].topic, self._most, []
        for entry in self._waiting:
            if entry.messages[0].topic == topic and (len(entry.messages) <= room or not group):
                group.append(entry)
                room -= len(entry.messages)
            else:
                left.append(entry)
        self._waiting = left

    def _hand_on(self) -> None:
        """Let the first who waits lead; the mutex is held."""
        self._led = bool(self._waiting)
        if self._waiting:
            first = self._waiting[0]
            first.leads = True
            if first.woken is not None:
                first.woken.release()

    def _store_together(self, group: Sequence[_Entry]) -> None:
        try:
            outcomes = self._store([message for entry in group for message in entry.messages])
        except (BrokerUnavailable, CommitUnknown) as error:
            _fail(group, error)
        except BrokerError as error:
            if len(group) == 1:
                _fail(group, error)
                return
            for entry in group:  # one caller's failure is its own
                self._store_together([entry])
        else:
            at = 0
            for entry in group:
                entry.outcomes = outcomes[at : at + len(entry.messages)]
                at += len(entry.messages)


def _fail(group: Sequence[_Entry], error: Exception) -> None:
    for entry in group:
        entry.error = error


def _wake(group: Sequence[_Entry]) -> None:
    for entry in group:
        if not entry.leads and entry.woken is not None:
            entry.woken.release()

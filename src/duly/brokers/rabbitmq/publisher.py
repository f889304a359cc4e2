"""`Publisher`: messages sent in a pipeline, each confirmed, on a connection of its own.

A connection that publishes is blocked while the server has an alarm, so consumers have another.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum
from functools import partial
from itertools import takewhile
from typing import Any

from duly.brokers.rabbitmq.address import Address
from duly.brokers.rabbitmq.link import LOST, Connection, Link, publish

# What may be on its way at once: enough to keep the server busy, little to be in doubt about.
_WINDOW = 2000
# What is refused may be refused by every channel, where a queue is full.
_RENEW_S = 1.0


class State(Enum):
    """How far the sending of a message has come."""

    WAITING = "not sent"
    SENT = "sent, and not confirmed"
    CONFIRMED = "the server has it"
    UNROUTABLE = "no queue takes it"
    DOUBTFUL = "sent, and nobody can say"
    GIVEN_UP = "not sent in time"
    UNWRITABLE = "not sent: AMQP has no room for a part of it"


class Sending:
    """One message on its way. ``confirm``: the server says that it has it."""

    __slots__ = ("confirm", "exchange", "key", "mandatory", "message", "name", "portion", "state")

    def __init__(
        self, message: Any, exchange: str, key: str, *, confirm: bool = True, mandatory: bool = True
    ) -> None:
        self.message = message
        self.exchange = exchange
        self.key = key
        self.confirm = confirm
        self.mandatory = mandatory
        self.state = State.WAITING
        self.portion: Portion | None = None


class Portion:
    """What one call sends; ``ended`` is set when nothing of it is open any more."""

    def __init__(self, sendings: Sequence[Sending]) -> None:
        self.sendings = sendings
        self.open = len(sendings)
        self.ended = threading.Event()
        for sending in sendings:
            sending.portion = self


class Publisher:
    """Sends what any thread hands over. ``deadline_s`` bounds every call; ``prepare`` is called
    with each new connection, before anything is sent.
    """

    def __init__(
        self, address: Address, deadline_s: float, prepare: Callable[[Connection], None]
    ) -> None:
        self._deadline_s = deadline_s
        self._prepare = prepare
        self._lock = threading.Lock()
        self._waiting: deque[Sending] = deque()
        self._unconfirmed: dict[int, Sending] = {}
        # Channels count from 1, and this goes on; of each, where it began and ended.
        self._next_tag = 1
        self._began = 0
        self._old: list[tuple[Any, int, int]] = []
        self._renewed_s = 0.0
        self._confirmed: Any = None
        self._loose: Any = None
        self.link = Link(address, "publisher", self._up, self._down, self._pump)

    def send(self, sendings: Sequence[Sending], deadline_s: float | None = None) -> None:
        """Send these, in order; returns when the fate of each is known, or the deadline is over."""
        if not sendings:
            return
        deadline_s = self._deadline_s if deadline_s is None else deadline_s
        portion = Portion(sendings)
        with self._lock:
            self._waiting.extend(sendings)
        self.link.post(self._pump, deadline_s)
        if not portion.ended.wait(deadline_s):
            self._give_up(sendings)

    @property
    def why_not(self) -> str:
        """Why the server takes nothing just now."""
        if self.link.blocked is not None:
            return f"the server has blocked publishers ({self.link.blocked})"
        return "it did not answer" if self.link.is_up else "there is no connection"

    def _give_up(self, sendings: Sequence[Sending]) -> None:
        with self._lock:
            for sending in sendings:
                if sending.state is State.WAITING:
                    sending.state = State.GIVEN_UP
                elif sending.state is State.SENT:
                    sending.state = State.DOUBTFUL
            # Or they would pile up for as long as the server is away.
            self._waiting = deque(each for each in self._waiting if each.state is State.WAITING)

    # --- on the link's thread

    def _up(self, connection: Connection) -> None:
        self._prepare(connection)
        self._old.clear()
        self._confirmed, self._loose = self._confirming(connection), connection.channel()
        self._pump(connection)

    def _confirming(self, connection: Connection) -> Any:
        channel = connection.channel()
        channel.confirm_select()
        # Counted last: while these wait for the server, more is sent by the channel before.
        self._began = began = self._next_tag - 1
        channel.events["basic_ack"].add(partial(self._on_ack, began))
        channel.events["basic_nack"].add(partial(self._on_nack, began))
        channel.events["basic_return"].add(self._on_return)
        return channel

    def _renew(self, connection: Connection) -> None:
        """Go on with another channel. To one that first published to a queue while its leader was
        away, the server refuses everything for that queue for ever.
        """
        before, began = self._confirmed, self._began
        if before is None:
            return
        self._confirmed = self._confirming(connection)
        self._old.append((before, began, self._began))
        for channel, began, ended in list(self._old):
            if not any(began < tag <= ended for tag in self._unconfirmed):
                self._old.remove((channel, began, ended))
                channel.close()

    def _down(self) -> None:
        self._confirmed = self._loose = None
        with self._lock:
            lost = list(self._unconfirmed.values())
            self._unconfirmed.clear()
            self._end(lost, State.DOUBTFUL)

    def _pump(self, connection: Connection) -> None:
        """Send what waits, as far as the window is open."""
        with connection.transport.corked():
            self._send_waiting()

    def _send_waiting(self) -> None:
        while self.link.blocked is None and len(self._unconfirmed) < _WINDOW:
            with self._lock:
                sending = self._waiting.popleft() if self._waiting else None
                if sending is None:
                    return
                if sending.state is not State.WAITING:
                    continue
                sending.state = State.SENT
                if sending.confirm:
                    self._unconfirmed[self._next_tag] = sending
                    self._next_tag += 1
            self._write(sending)

    def _write(self, sending: Sending) -> None:
        channel = self._confirmed if sending.confirm else self._loose
        state = State.DOUBTFUL
        try:
            publish(
                channel, sending.message, sending.exchange, sending.key, mandatory=sending.mandatory
            )
            state = State.CONFIRMED
        except LOST:
            raise
        except Exception:  # noqa: BLE001 - the driver, which reckons all of it before it writes
            state = State.UNWRITABLE
            self._take_back(sending)
        finally:
            if not sending.confirm or state is State.UNWRITABLE:
                with self._lock:
                    self._end([sending], state)

    def _take_back(self, sending: Sending) -> None:
        """Its number is the next one's: the server counts what it has seen."""
        with self._lock:
            if self._unconfirmed.get(self._next_tag - 1) is sending:
                self._next_tag -= 1
                del self._unconfirmed[self._next_tag]

    def _on_return(self, _error: Any, exchange: str, key: str, message: Any) -> None:
        """No queue took a message. It comes before the confirmation, and does not say which it is:
        the first that looks like it.
        """
        id = message.properties.get("message_id")
        with self._lock:
            for sending in self._unconfirmed.values():
                if (
                    sending.state is State.SENT
                    and (sending.exchange, sending.key) == (exchange, key)
                    and sending.message.properties.get("message_id") == id
                ):
                    sending.state = State.UNROUTABLE
                    return

    def _on_ack(self, began: int, tag: int, multiple: bool) -> None:
        self._answered(began, tag, multiple, State.CONFIRMED)

    def _on_nack(self, began: int, tag: int, multiple: bool) -> None:
        """The server could not do it, for one of the queues or for all."""
        self._answered(began, tag, multiple, State.DOUBTFUL)
        now = time.monotonic()
        if now > self._renewed_s + _RENEW_S:
            self._renewed_s = now
            self.link.post(self._renew)

    def _answered(self, began: int, tag: int, multiple: bool, state: State) -> None:
        last = began + tag
        with self._lock:
            tags = [last]
            if multiple:
                older = takewhile(lambda each: each <= last, self._unconfirmed)
                tags = [each for each in older if each > began]
            ended = [self._unconfirmed.pop(each) for each in tags if each in self._unconfirmed]
            self._end(ended, state)
        if self._waiting and self._confirmed is not None:
            self._pump(self._confirmed.connection)

    def _end(self, sendings: Sequence[Sending], state: State) -> None:
        """These are over. Call it with the lock held."""
        for sending in sendings:
            if sending.state is State.SENT:
                sending.state = state
            portion = sending.portion
            if portion is not None:
                portion.open -= 1
                if portion.open == 0:
                    portion.ended.set()

    def close(self) -> None:
        """Send nothing more."""
        self.link.close()

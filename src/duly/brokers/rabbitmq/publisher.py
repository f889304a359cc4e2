"""`Publisher`: messages sent in a pipeline, each confirmed, on a connection of its own.

A connection that publishes is blocked while the server has an alarm, so consumers have another.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from itertools import takewhile
from typing import Any

from duly.brokers.rabbitmq.address import Address
from duly.brokers.rabbitmq.frames import frames_of, id_of
from duly.brokers.rabbitmq.link import Connection, Link

# What may be on its way at once: enough to keep the server busy, little to be in doubt about.
_WINDOW = 2000
# What is sent together, in bytes.
_AT_ONCE = 64 * 1024
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
    UNWRITABLE = "not sent: AMQP has no room for a part of it, or a frame for its headers"


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
    """What one call sends; `wait` ends when nothing of it is open any more."""

    def __init__(self, sendings: Sequence[Sending]) -> None:
        self.open = len(sendings)
        # A bare lock, let go of once: what an event is made of, at a third of its cost.
        self._ended = threading.Lock()
        self._ended.acquire()
        for sending in sendings:
            sending.portion = self

    def is_open(self) -> bool:
        """Whether the fate of some is not known."""
        return self.open > 0

    def one_ended(self) -> None:
        """By one at a time, with the publisher's lock."""
        self.open -= 1
        if self.open == 0:
            self._ended.release()

    def wait(self, seconds: float) -> bool:
        """Wait until all are over; False: not all were. For one thread, once."""
        return self._ended.acquire(timeout=max(0.0, seconds))


@dataclass(slots=True)
class _Way:
    """What sending needs to know of a connection. By itself: asked for it, the driver's objects
    raise, or say nothing, as soon as the connection is lost.
    """

    connection: Connection
    transport: Any
    frame_max: int
    confirmed: int
    """The number of the channel whose messages are confirmed, and of the one whose are not."""
    loose: int


class Publisher:
    """Sends what any thread hands over. ``deadline_s`` bounds every call; ``prepare`` is called
    with each new connection, before anything is sent.

    A caller writes its messages itself, as far as the network takes them at once, and reads their
    confirmations if nobody else does. The link's thread does the rest, and all of it over TLS.
    """

    def __init__(
        self, address: Address, deadline_s: float, prepare: Callable[[Connection], None]
    ) -> None:
        self._deadline_s = deadline_s
        self._prepare = prepare
        self._lock = threading.Lock()
        self._waiting: deque[Sending] = deque()
        self._unconfirmed: dict[int, Sending] = {}
        # Channels count from 1, and this goes on; of each, where it began, and of those before the
        # present one where they ended.
        self._next_tag = 1
        self._began: dict[int, int] = {}
        self._old: list[tuple[Any, int]] = []
        self._renewed_s = 0.0
        self._confirmed: Any = None
        self._way: _Way | None = None
        self.link = Link(address, "publisher", self._up, self._down, self._pump)

    def send(self, sendings: Sequence[Sending], deadline_s: float | None = None) -> None:
        """Send these, in order; returns when the fate of each is known, or the deadline is over.

        Raises `BrokerUnavailable` in a child that was forked.
        """
        if not sendings:
            return
        self.link.refuse_forked()
        until = time.monotonic() + (self._deadline_s if deadline_s is None else deadline_s)
        portion = Portion(sendings)
        with self._lock:
            self._waiting.extend(sendings)
        self._pump()
        if portion.is_open():
            self.link.read_while(portion.is_open, until - time.monotonic())
        if not portion.wait(until - time.monotonic()):
            self._give_up(sendings)

    @property
    def why_not(self) -> str:
        """Why the server takes nothing just now."""
        if self.link.blocked is not None:
            return f"the server has blocked publishers ({self.link.blocked})"
        if self.link.is_up:
            return "it did not answer"
        why = self.link.why_lost
        return "there is no connection" + (f" (the last one was lost: {why})" if why else "")

    def _give_up(self, sendings: Sequence[Sending]) -> None:
        with self._lock:
            for sending in sendings:
                if sending.state is State.WAITING:
                    sending.state = State.GIVEN_UP
                elif sending.state is State.SENT:
                    sending.state = State.DOUBTFUL
            # Or they would pile up for as long as the server is away.
            self._waiting = deque(each for each in self._waiting if each.state is State.WAITING)
            # A queue without a majority answers nothing: what goes to others is not to wait for it.
            given_up = [
                tag for tag, each in self._unconfirmed.items() if each.state is not State.SENT
            ]
            for tag in given_up:
                del self._unconfirmed[tag]
        self._pump()

    # --- sending, on any thread

    def _pump(self, _connection: Connection = None) -> None:
        """Send what waits, as far as the window is open and the network takes it."""
        while self._send_some():
            pass

    def _flush(self, connection: Connection) -> None:
        """Send the rest, and what waited behind it. On the link's thread."""
        connection.transport.flush()
        self._pump()

    def _send_some(self) -> bool:
        """Send a part of what waits; whether there was some."""
        with self._lock:
            way = self._way
            if way is None:
                return False
            if way.transport.is_behind:
                # Also where the link's thread is just sending something of its own, and will have
                # sent it when somebody looks again: it does not know of what waits.
                self.link.post(self._flush)
                return False
            try:
                frames, loose = self._next(way)
                if frames:
                    self._offer(way, b"".join(frames), loose)
            except BaseException:
                # Interrupted half-way: the server would count otherwise from now on.
                self.link.cut()
                raise
            return bool(frames)

    def _next(self, way: _Way) -> tuple[list[bytes], list[Sending]]:
        """What is sent next, and what of it nobody confirms. Call it with the lock held."""
        frames: list[bytes] = []
        loose: list[Sending] = []
        size = 0
        waiting, unconfirmed = self._waiting, self._unconfirmed
        while waiting and size < _AT_ONCE and len(unconfirmed) < _WINDOW and not self.link.blocked:
            sending = waiting.popleft()
            if sending.state is not State.WAITING:
                continue
            frame = _frames(sending, way)
            if frame is None:
                sending.state = State.UNWRITABLE
                self._end([sending])
                continue
            sending.state = State.SENT
            if sending.confirm:
                unconfirmed[self._next_tag] = sending
                self._next_tag += 1
            else:
                loose.append(sending)
            frames.append(frame)
            size += len(frame)
        return frames, loose

    def _offer(self, way: _Way, frames: bytes, loose: Sequence[Sending]) -> None:
        state = State.DOUBTFUL
        try:
            way.transport.offer(frames)
            state = State.CONFIRMED
        except OSError:
            self.link.cut()  # its thread finds that, and tells of all that was sent
        way.connection.bytes_sent += 1  # as the driver counts, to know when a heartbeat is due
        self._end(loose, state)

    # --- on the link's thread

    def _up(self, connection: Connection) -> None:
        self._prepare(connection)
        self._old.clear()
        self._began.clear()
        connection.confirmed = partial(self._on_ack, connection)
        channel, loose = self._confirming(connection), connection.channel()
        way = _Way(
            connection,
            connection.transport,
            connection.frame_max,
            channel.channel_id,
            loose.channel_id,
        )
        with self._lock:
            self._go_on_with(channel, way)
        self._pump()

    def _confirming(self, connection: Connection) -> Any:
        channel = connection.channel()
        channel.confirm_select()
        nacked = partial(self._on_nack, connection, channel.channel_id)
        channel.events["basic_nack"].add(nacked)
        channel.events["basic_return"].add(self._on_return)
        return channel

    def _go_on_with(self, channel: Any, way: _Way) -> None:
        """Confirmed messages are sent by this channel from now on. Call it with the lock held."""
        self._confirmed, self._way = channel, way
        way.confirmed = channel.channel_id
        self._began[channel.channel_id] = self._next_tag - 1

    def _renew(self, connection: Connection) -> None:
        """Go on with another channel. To one that first published to a queue while its leader was
        away, the server refuses everything for that queue for ever.
        """
        way = self._way
        if way is None:
            return
        # While this waits for the server, more is sent by the channel before.
        channel = self._confirming(connection)
        with self._lock:
            self._old.append((self._confirmed, self._next_tag - 1))
            self._go_on_with(channel, way)
            done = [old for old in self._old if not self._is_awaited(*old)]
        for old in done:
            self._old.remove(old)
            # By then nothing of it is expected; its number may be another's next.
            del self._began[old[0].channel_id]
            old[0].close()

    def _is_awaited(self, channel: Any, ended: int) -> bool:
        began = self._began[channel.channel_id]
        return any(began < tag <= ended for tag in self._unconfirmed)

    def _down(self) -> None:
        with self._lock:
            self._confirmed = self._way = None
            lost = list(self._unconfirmed.values())
            self._unconfirmed.clear()
            self._end(lost, State.DOUBTFUL)

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
                    and id_of(sending.message) == id
                ):
                    sending.state = State.UNROUTABLE
                    return

    def _on_nack(self, connection: Connection, channel: int, tag: int, multiple: bool) -> None:
        """The server could not do it, for one of the queues or for all."""
        self._answered(connection, channel, tag, multiple, State.DOUBTFUL)
        now = time.monotonic()
        if now > self._renewed_s + _RENEW_S:
            self._renewed_s = now
            self.link.post(self._renew)

    # --- on the thread that reads, whichever it is

    def _on_ack(self, connection: Connection, channel: int, tag: int, multiple: bool) -> None:
        self._answered(connection, channel, tag, multiple, State.CONFIRMED)

    def _answered(
        self, connection: Connection, channel: int, tag: int, multiple: bool, state: State
    ) -> None:
        with self._lock:
            if self._way is None or self._way.connection is not connection:
                return  # read too late, and its numbers are another's by now
            began = self._began.get(channel)
            if began is None:
                return
            last = began + tag
            tags = [last]
            if multiple:
                older = takewhile(lambda each: each <= last, self._unconfirmed)
                tags = [each for each in older if each > began]
            ended = [self._unconfirmed.pop(each) for each in tags if each in self._unconfirmed]
            self._end(ended, state)
        if self._waiting:
            self._pump()

    def _end(self, sendings: Sequence[Sending], state: State | None = None) -> None:
        """These are over. Call it with the lock held."""
        for sending in sendings:
            if state is not None and sending.state is State.SENT:
                sending.state = state
            if sending.portion is not None:
                sending.portion.one_ended()

    def close(self) -> None:
        """Send nothing more."""
        self.link.close()


def _frames(sending: Sending, way: _Way) -> bytes | None:
    """What is sent; None where AMQP has no room for a part of it."""
    channel = way.confirmed if sending.confirm else way.loose
    message, exchange, key = sending.message, sending.exchange, sending.key
    try:
        return frames_of(message, channel, exchange, key, sending.mandatory, way.frame_max)
    except Exception:  # noqa: BLE001 - the driver's, and of whatever writes bytes
        return None

"""`Link`: a connection to the server, on a thread of its own. Only this file, `transport` and
`frames` know the driver.

The driver is used by this thread alone. Others hand it calls; it answers heartbeats whatever
handlers do, reads what the server says, and connects again where the connection is lost. A caller
who waits for a confirmation may read in its place: see `turn`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import select
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from functools import partial
from typing import Any, TypeVar

import amqp
from amqp import spec

from duly.brokers.rabbitmq.address import Address
from duly.brokers.rabbitmq.transport import BufferedConnection, ChannelLost, is_confirmation
from duly.brokers.rabbitmq.turn import Turn
from duly.errors import BrokerError, BrokerUnavailable, BrokerUnusable

T = TypeVar("T")

log = logging.getLogger("duly.rabbitmq")

Connection = Any
"""The driver's connection, which only the link's thread may touch."""

LOST = (OSError, amqp.exceptions.ConnectionError, amqp.exceptions.AMQPError)
REFUSED = amqp.exceptions.PreconditionFailed
NOT_FOUND = amqp.exceptions.NotFound
DENIED = amqp.exceptions.AccessRefused
# The server ended a channel for what was asked on it. Its connection goes on.
CHANNEL_ENDED = amqp.exceptions.ChannelError

# A queue of a single node that was killed within seconds of its declaration, or of a cluster
# without its majority. It looks like any other, so nothing here deletes it.
_UNRESPONSIVE = (
    "Where that goes on, rabbitmqctl list_unresponsive_queues names the queue that is stuck; "
    "on a single node, delete it (rabbitmqctl delete_queue) and start again: it is made anew"
)
_BACKOFF_S = (0.05, 5.0)
# How long a caller reads at most; the link's thread has other things to do, if seldom.
_READ_S = 0.05


def content(body: bytes, properties: Mapping[str, Any]) -> Any:
    """A message as the driver sends it, to be kept by the server."""
    message: Any = amqp.Message  # its annotation says str, and it takes bytes
    return message(body, delivery_mode=2, **properties)


def stem(channel: Any, consumers: Iterable[str]) -> None:
    """Cancel consumers of a channel without waiting for that. What is on its way still comes."""
    for tag in consumers:
        channel.send_method(spec.Basic.Cancel, "sb", (tag, True))


def explained(lost: ChannelLost) -> str:
    """What was lost, and what is to be done where it stays so."""
    return f"a channel was lost: {lost}" + (f". {_UNRESPONSIVE}" if lost.silent else "")


def _end(connection: Connection | None) -> None:
    """End the connection below TLS, whose own ending would wait for the other side."""
    # By its own name: asked for otherwise, the driver warns where it has ended the connection.
    transport = getattr(connection, "_transport", None)
    try:
        socket.socket.shutdown(transport.sock, socket.SHUT_RDWR)  # type: ignore[union-attr]
    except (AttributeError, TypeError, OSError):
        return  # it is gone


class Link:
    """``on_up`` is called with each new connection, ``on_down`` when it is lost, and
    ``on_unblocked`` when the server takes messages again, all on the link's thread; what ``on_up``
    raises counts as losing it. ``server`` is what the server says of itself,
    ``why_lost`` what ended the connection before.
    """

    def __init__(
        self,
        address: Address,
        name: str,
        on_up: Callable[[Connection], None],
        on_down: Callable[[], None],
        on_unblocked: Callable[[Connection], None] = lambda _: None,
    ) -> None:
        self._address = address
        self._name = name
        self._on_up = on_up
        self._on_down = on_down
        self._on_freed = on_unblocked
        self._calls: deque[tuple[Callable[[Connection], Any], Future[Any], float]] = deque()
        self._wake_out, self._wake_in = os.pipe()
        os.set_blocking(self._wake_out, False)
        os.set_blocking(self._wake_in, False)
        # Held while its number is used, which may be another file's once it is closed.
        self._waking = threading.Lock()
        self._can_wake = True
        self._process = os.getpid()
        self._connection: Connection | None = None
        self._turn = Turn()
        self._closing = False
        self._awake_since: float | None = None
        self._next_tick = 0.0
        self._first: Future[None] = Future()
        self.blocked: str | None = None
        self.why_lost = ""
        self.server: Mapping[str, Any] = {}
        self._thread = threading.Thread(target=self._run, name=f"duly-rabbitmq-{name}", daemon=True)

    def start(self) -> None:
        """Connect. Raises `BrokerUnavailable`, and `BrokerUnusable` where it is no use to try."""
        self._thread.start()
        try:
            self._first.result(self._address.connect_s * len(self._address.hosts) + 5)
        except FutureTimeout:
            self.close()
            raise BrokerUnavailable(f"{self.where}: no answer; nothing was changed") from None
        except BaseException:
            self.close()
            raise

    @property
    def where(self) -> str:
        """The server, as an error may name it."""
        return "RabbitMQ at " + ", ".join(f"{host}:{port}" for host, port in self._address.hosts)

    @property
    def is_up(self) -> bool:
        """Whether there is a connection just now; a child that was forked has none."""
        return self._connection is not None and os.getpid() == self._process

    # --- for other threads

    def refuse_forked(self) -> None:
        """Raise `BrokerUnavailable` in a child that was forked: the parent goes on counting what it
        sends and is confirmed by this connection, and so nobody else may send or read.
        """
        if os.getpid() != self._process:
            raise BrokerUnavailable(
                f"{self.where}: connected by the process that this one was forked from; nothing "
                "was sent. Open another after forking."
            )

    def call(self, run: Callable[[Connection], T], timeout_s: float = 30.0) -> T:
        """Run this on the link's thread, with the connection; waits for one.

        Raises `BrokerUnavailable` where it was certainly not run, `BrokerError` where nobody can
        say, and whatever it raises itself.
        """
        if threading.current_thread() is self._thread:
            assert self._connection is not None
            return run(self._connection)
        future = self.post(run, timeout_s)
        try:
            return future.result(timeout_s + 1.0)
        except FutureTimeout:
            if future.cancel():
                raise BrokerUnavailable(f"{self.where}: not connected; nothing was sent") from None
            raise BrokerError(
                f"{self.where}: no answer within {timeout_s:g} s. {_UNRESPONSIVE}"
            ) from None

    def post(self, run: Callable[[Connection], T], timeout_s: float = 30.0) -> Future[T]:
        """The same without waiting for its end."""
        future: Future[T] = Future()
        if self._closing or os.getpid() != self._process:
            future.set_exception(BrokerUnavailable(f"{self.where} was closed; nothing was sent"))
            return future
        self._calls.append((run, future, time.monotonic() + timeout_s))
        self._wake()
        return future

    def read_while(self, is_open: Callable[[], bool], seconds: float) -> None:
        """Read confirmations on the caller's thread, if nobody else does, while this is open and
        for so long at most. May return at any time.
        """
        until = time.monotonic() + min(seconds, _READ_S)

        def read(comes: Callable[[float], bool]) -> None:
            connection = self._connection
            if connection is None or self._closing:
                return
            goes_on = self._hear(connection, fill=False)
            while goes_on and is_open():
                left_s = until - time.monotonic()
                goes_on = left_s > 0 and comes(left_s) and self._hear(connection, fill=True)

        self._turn.borrow(read)

    def _hear(self, connection: Connection, *, fill: bool) -> bool:
        """Take confirmations. Where that fails or is interrupted half-way, nobody knows what was
        read, and the connection ends: its own thread finds that.
        """
        # By its own name, see `_end`: the driver would connect again where it has been ended, since
        # this caller was stopped for so long that the link's thread went on without it.
        transport = connection._transport
        if connection is not self._connection or transport is None:
            return False
        try:
            if fill:
                transport.fill_at_hand()
            return self._take_confirmations(connection, transport)
        except BaseException as error:
            _end(connection)
            if isinstance(error, OSError) or connection is not self._connection:
                return False
            raise

    def _take_confirmations(self, connection: Connection, transport: Any) -> bool:
        """Take what is at hand. False: something else came, which is the link's thread's."""
        while (frame := transport.frame_at_hand()) is not None:
            if not is_confirmation(frame):
                transport.put_back(frame)
                self._wake()
                return False
            connection.on_inbound_frame(frame)
        return True

    def _wake(self) -> None:
        with self._waking, contextlib.suppress(BlockingIOError):  # full: it wakes anyway
            if self._can_wake:
                os.write(self._wake_in, b"x")

    def _wake_no_more(self) -> None:
        """Nobody is left to wake."""
        with self._waking:
            if self._can_wake:
                self._can_wake = False
                os.close(self._wake_in)
                os.close(self._wake_out)

    def look(self) -> None:
        """End a connection on which the thread hangs: a peer that stopped in the middle of a
        frame, or does not take what is written.
        """
        since, connection = self._awake_since, self._connection
        if since is None or connection is None:
            return
        if time.monotonic() - since > 2 * self._address.heartbeat_s:
            log.warning("%s: the connection hangs and is ended", self.where)
            self.cut()

    def _moved(self, connection: Connection) -> None:
        """The peer takes or sends something, if slowly: it is there, and does not hang."""
        if self._awake_since is not None:
            self._awake_since = time.monotonic()
        connection.bytes_recv += 1

    def _come(self, connection: Connection) -> None:
        """The same where an answer is waited for; this side has to be heard meanwhile."""
        self._moved(connection)
        self._tick(connection)

    def cut(self) -> None:
        """End the connection, as a network does; the thread notices and connects again."""
        _end(self._connection)

    def abandon(self) -> None:
        """End the connection without a word, and the thread."""
        self._closing = True
        self.cut()
        self._wake()

    def close(self) -> None:
        """End the connection and the thread. In a child that was forked it is the parent's."""
        if os.getpid() != self._process:
            return
        self._closing = True
        self._wake()
        if self._thread.ident is None:
            self._wake_no_more()
        elif threading.current_thread() is not self._thread:
            self._thread.join(10)
        self._fail_calls()

    # --- the thread

    def _run(self) -> None:
        pause_s = _BACKOFF_S[0]
        while not self._closing:
            connection = None
            try:
                connection = self._connect()
                self.blocked = None
                self._connection = connection
                self._awake_since = time.monotonic()
                self._on_up(connection)
                self._awake_since = None
                if not self._first.done():
                    self._first.set_result(None)
                pause_s = _BACKOFF_S[0]
                self._serve(connection)
            except LOST as error:
                self._lost(connection, error)
            except Exception as error:
                log.exception("%s: unexpected; connecting again", self.where)
                self._lost(connection, error)
            if not self._closing:
                self._rest(pause_s * random.uniform(0.5, 1.0))
                pause_s = min(2 * pause_s, _BACKOFF_S[1])
        self._end()
        self._wake_no_more()

    def _connect(self) -> Connection:
        last: Exception | None = None
        hosts = list(self._address.hosts)
        for host, port in hosts:
            try:
                return self._connect_to(host, port)
            except amqp.exceptions.AccessRefused as error:
                last = error
            except LOST as error:
                last = error
        assert last is not None
        raise last

    def _connect_to(self, host: str, port: int) -> Connection:
        address = self._address
        connection = BufferedConnection(
            host=f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
            userid=address.user,
            password=address.password,
            login_method=address.mechanism,
            virtual_host=address.vhost,
            ssl=address.tls_for(host),
            connect_timeout=address.connect_s,
            heartbeat=address.heartbeat_s,
            client_properties={"connection_name": f"duly {self._name}", "product": "duly"},
            on_blocked=self._on_blocked,
            on_unblocked=self._on_unblocked,
        )
        try:
            connection.connect()
        except BaseException:
            connection.collect()
            raise
        connection.later = self.post
        transport: Any = connection.transport
        transport.on_moved = partial(self._moved, connection)
        transport.on_come = partial(self._come, connection)
        self.server = dict(connection.server_properties)
        return connection

    def _on_blocked(self, reason: Any = "") -> None:
        self.blocked = str(reason) or "an alarm"
        log.warning("%s takes no messages for now: %s", self.where, self.blocked)

    def _on_unblocked(self, *_: object) -> None:
        self.blocked = None
        log.info("%s takes messages again", self.where)
        self._on_freed(self._connection)

    def _serve(self, connection: Connection) -> None:
        transport = connection.transport
        sock = transport.sock
        self._turn.begin(sock, self._wake_out, lends=transport.is_direct)
        # What came while all was made ready, and calls that the connection before did not reach.
        self._handle_frames(connection)
        self._wake()
        while not self._closing:
            # What TLS has decrypted beyond what was read is not seen on the socket.
            ready = self._turn.wait(0.0 if transport.has_more else 1.0)
            self._awake_since = time.monotonic()
            # In this order: a call reads as well, and then there may be nothing left.
            if sock.fileno() in ready or transport.has_more:
                self._read(connection)
            if self._wake_out in ready:
                self._take_calls(connection)
                # What a call waited for may have come with more.
                self._handle_frames(connection)
            self._tick(connection)
            self._awake_since = None

    def _tick(self, connection: Connection) -> None:
        """Once a second, whatever takes long: hear and be heard."""
        now = time.monotonic()
        if now >= self._next_tick:
            connection.heartbeat_tick(rate=2)
            self._expire_calls()
            self._next_tick = now + 1.0

    def _read(self, connection: Connection) -> None:
        transport = connection.transport
        # Not `drain_events`, which waits for what a heartbeat does not bring.
        transport.fill_at_hand()
        self._handle_frames(connection)
        while transport.has_more:
            transport.fill()
            self._handle_frames(connection)

    @staticmethod
    def _handle_frames(connection: Connection) -> None:
        transport = connection.transport
        while (frame := transport.frame_at_hand()) is not None:
            connection.on_inbound_frame(frame)

    def _take_calls(self, connection: Connection) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_out, 65536)
        while self._calls:
            run, future, _ = self._calls.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            self._awake_since = time.monotonic()
            self._tick(connection)
            try:
                future.set_result(run(connection))
            except ChannelLost as error:
                # Whoever keeps it knows, and the others have theirs.
                future.set_exception(BrokerError(f"{self.where}: {explained(error)}"))
            except LOST as error:
                # Also what closed a channel: it may be another call's, so all begins anew.
                future.set_exception(BrokerError(f"{self.where}: the connection was lost: {error}"))
                raise
            except Exception as error:  # noqa: BLE001 - its caller's
                future.set_exception(error)

    def _expire_calls(self) -> None:
        """Calls that waited too long for a connection. One that its caller gave up on is told, and
        out of the queue, once.
        """
        now = time.monotonic()
        for _ in range(len(self._calls)):
            call = self._calls.popleft()
            _, future, until = call
            if until > now and not future.cancelled():
                self._calls.append(call)
            elif future.set_running_or_notify_cancel():
                future.set_exception(
                    BrokerUnavailable(f"{self.where}: not connected; nothing was sent")
                )

    def _lost(self, connection: Connection | None, error: Exception) -> None:
        self._connection, self._awake_since = None, None
        self.why_lost = str(error)
        self._turn.end()
        if not self._first.done():
            self._first.set_exception(self._first_failure(error))
            self._closing = True
        if connection is not None:
            if not self._closing:
                log.warning("%s: the connection was lost: %s", self.where, error)
            _end(connection)
            connection.collect()
            self._on_down()

    def _first_failure(self, error: Exception) -> BrokerError:
        if isinstance(error, amqp.exceptions.AccessRefused | amqp.exceptions.NotAllowed):
            return BrokerUnusable(
                f"{self.where} refuses user {self._address.user!r} on virtual host "
                f"{self._address.vhost!r}: check its password, and its permissions there"
            )
        if isinstance(error, ssl.SSLCertVerificationError):
            return BrokerUnusable(
                f"{self.where}: its certificate is refused: {error.verify_message}. cacertfile=... "
                "names who signs it, server_name_indication=... the name that is in it"
            )
        return BrokerUnavailable(f"{self.where}: cannot connect: {error}; nothing was changed")

    def _rest(self, seconds: float) -> None:
        """Wait before connecting again; what waits too long is told."""
        until = time.monotonic() + seconds
        while not self._closing and time.monotonic() < until:
            self._expire_calls()
            select.select([], [], [], min(0.05, seconds))

    def _end(self) -> None:
        connection, self._connection = self._connection, None
        self._turn.end()
        if connection is not None:
            try:
                connection.close()
            except LOST:
                connection.collect()
            self._on_down()
        self._fail_calls()

    def _fail_calls(self) -> None:
        while self._calls:
            _, future, _ = self._calls.popleft()
            if future.set_running_or_notify_cancel():
                future.set_exception(BrokerUnavailable(f"{self.where} was closed"))

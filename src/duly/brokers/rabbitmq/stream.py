"""`LetterStream`: the dead letters of apps that have no store, in a stream on the server.

One stream for all of a namespace, read from its beginning and changed by nobody: a letter is a
record, its number is its place, and removing some is another record that names their numbers. What
is left is what counts. A queue would count each look at it as a failed delivery, and show a letter
to one reader at a time.

What the server says about a stream's length is some seconds old. So who reads writes a mark first,
and reads up to that.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from duly.brokers.rabbitmq.letters import CONSUMER, letter_in, stored, unknown
from duly.brokers.rabbitmq.link import Connection, Link, content
from duly.brokers.rabbitmq.publisher import Sending
from duly.brokers.rabbitmq.topology import Names, count, declare_stream
from duly.brokers.rabbitmq.wire import body_of
from duly.errors import BrokerUnavailable
from duly.inspection import DeadLetter, Selection

REMOVED, MARK = "duly-removed", "duly-mark"

_AHEAD = 500
# Nothing more has come for so long: the server is gone, or the stream is.
_SILENCE_S = 10.0

_Identity = tuple[str, str, str, str, bytes]
_numbers = msgspec.json.Decoder(list[int]).decode


class LetterStream:
    """See `duly.inspection.graves.Graveyard`. ``send`` returns once the server has what was sent,
    or raises `BrokerError`.
    """

    def __init__(self, link: Link, names: Names, send: Callable[[Sequence[Sending]], None]) -> None:
        self._link = link
        self._name = names.letters
        self._send = send
        self._declared = False

    def bury(self, letters: Sequence[DeadLetter]) -> None:
        """As `Graveyard.bury`."""
        self._append([content(each.message.body, stored(each)) for each in letters])

    def select(self, which: Selection, limit: int) -> Sequence[DeadLetter]:
        """As `Graveyard.select`. Reads the whole stream, as all of these do."""
        found = [letter for letter in self._letters() if which.matches(letter)]
        return found[::-1][:limit]

    def gone(self, letters: Sequence[DeadLetter]) -> Sequence[DeadLetter]:
        """As `Graveyard.gone`."""
        kept = {letter.number for letter in self._letters()} if letters else set()
        return [letter for letter in letters if letter.number not in kept]

    def remove(self, letters: Sequence[DeadLetter]) -> Sequence[DeadLetter]:
        """As `Graveyard.remove`."""
        gone = self.gone(letters)
        numbers = [letter.number for letter in letters if letter not in gone]
        if numbers:
            headers = {"application_headers": {REMOVED: True}}
            self._append([content(msgspec.json.encode(numbers), headers)])
        return gone

    def count(self) -> Mapping[tuple[str, str], int]:
        """As `Graveyard.count`."""
        counts = Counter((each.subscription, each.message.topic) for each in self._letters())
        return dict(sorted(counts.items()))

    # --- writing

    def declare(self) -> None:
        """Make the stream, if that is not done."""
        if not self._declared:
            self._link.call(lambda connection: declare_stream(connection, self._name))
            self._declared = True

    def _append(self, contents: Sequence[Any]) -> None:
        self.declare()
        try:
            self._send([Sending(each, "", self._name) for each in contents])
        except BaseException:
            self._declared = False  # it may have been deleted
            raise

    # --- reading

    def _letters(self) -> list[DeadLetter]:
        """Those that are left, the lowest number first."""
        kept: dict[_Identity, DeadLetter] = {}
        removed: set[int] = set()
        for number, message in self._records():
            headers = message.properties.get("application_headers") or {}
            if headers.get(REMOVED) is True:
                removed.update(_numbers(message.body))
                kept = {key: each for key, each in kept.items() if each.number not in removed}
            elif isinstance(consumer := headers.get(CONSUMER), str):
                letter = replace(_read(consumer, message), number=number)
                identity = _identity(letter)
                before = kept.get(identity)
                # Written twice, or given up on again after a replay.
                if before is None or letter.replays > before.replays:
                    kept[identity] = letter
        return sorted(kept.values(), key=lambda each: each.number)

    def _records(self) -> Sequence[tuple[int, Any]]:
        reader = _Reader(self._name, secrets.token_hex(8))
        if not self._link.call(reader.is_there):
            return ()
        headers = {"application_headers": {MARK: reader.mark}}
        self._send([Sending(content(b"", headers), "", self._name)])
        try:
            self._link.call(reader.start)
            reader.wait()
            return reader.records
        finally:
            self._link.post(reader.stop)


class _Reader:
    """One reading of the stream, from its beginning up to a mark."""

    def __init__(self, name: str, mark: str) -> None:
        self.mark = mark
        self.records: list[tuple[int, Any]] = []
        self._name = name
        self._channel: Any = None
        self._ended = threading.Event()

    def is_there(self, connection: Connection) -> bool:
        """Whether anything was ever written."""
        return bool(count(connection, [self._name]))

    def start(self, connection: Connection) -> None:
        """Begin, on the link's thread."""
        channel = self._channel = connection.channel()
        # Whoever waits for the end sees that nothing comes any more.
        channel.on_lost = _ignore
        channel.basic_qos(0, _AHEAD, False)
        channel.basic_consume(
            self._name,
            callback=self._take,
            on_cancel=_ignore,
            arguments={"x-stream-offset": "first"},
        )

    def _take(self, message: Any) -> None:
        headers = message.properties["application_headers"]
        message.channel.basic_ack(message.delivery_tag)
        if self._ended.is_set():
            return
        if MARK not in headers:
            self.records.append((int(headers["x-stream-offset"]) + 1, message))
        elif headers[MARK] == self.mark:
            self._ended.set()

    def wait(self) -> None:
        """Wait for the end. Raises `BrokerUnavailable` where it does not come."""
        seen, silent_since = 0, time.monotonic()
        while not self._ended.wait(0.1):
            if len(self.records) > seen:
                seen, silent_since = len(self.records), time.monotonic()
            elif time.monotonic() - silent_since > _SILENCE_S:
                raise BrokerUnavailable(
                    f"the stream {self._name!r} was not read to its end; nothing was changed"
                )

    def stop(self, connection: Connection) -> None:
        """Read no more."""
        if self._channel is not None and self._channel.connection is connection:
            self._channel.close()


def _ignore(_: object) -> None:
    """The stream is gone, or what was read it by."""


def _read(consumer: str, message: Any) -> DeadLetter:
    body = body_of(message)
    topic = str(message.properties.get("type", ""))
    return letter_in(unknown(topic), consumer, body, message.properties)


def _identity(letter: DeadLetter) -> _Identity:
    message = letter.message
    return letter.subscription, message.topic, message.source, message.id, message.body

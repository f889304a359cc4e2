"""Dead letters: made of records, and kept in a compacted topic by apps without a store.

The key of a record names consumer, message and body, so that a letter which is written twice is
one; removing it is a record with this key and nothing in it. A letter's number is its offset and
one. All of it is read each time, as long as nobody gives up on millions.

A body that is too large for a record of duly's, as others may publish them, is cut, and its letter
says so: it can be looked at and not brought back.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from duly.brokers.kafka.fetched import unknown
from duly.brokers.kafka.producer import Sender, Sending
from duly.brokers.kafka.reader import Reader
from duly.brokers.kafka.share import Item
from duly.brokers.kafka.wire import (
    SOURCE_OF_STRANGERS,
    headers_in,
    headers_of,
    message_in,
    read_headers,
)
from duly.errors import ConfigurationError, InvalidMessage
from duly.inspection import DeadLetter, Selection
from duly.message import Message
from duly.message.limits import check_id, check_source

MAX_ERROR_CHARS = 4000
HISTORY = "duly-letter"
UNKNOWN = "unknown"
"""whose a letter is that cannot be read"""

_MAY_BE_LOST = "dead letters may not be kept"


class _History(msgspec.Struct):
    subscription: str
    topic: str
    key: str | None
    error: str
    attempts: int
    dead_ms: int
    replays: int
    cut_bytes: int = 0


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(_History).decode


def letter_of(item: Item, subscription: str, error: str, attempts: int, dead_ms: int) -> DeadLetter:
    """The dead letter that a record becomes, whoever published it."""
    message = item.message
    if message is None:
        message = _as_it_came(item, dead_ms)
        headers, key = item.record
        error = f"{error}. It came with the headers {headers!r} and the key {key!r}"
    return DeadLetter(subscription, message, _text(error), attempts, dead_ms, replays=item.replays)


class LetterTopic:
    """See `duly.inspection.graves.Graveyard`. ``make`` makes the topic ``name``, if it is not
    there.
    """

    def __init__(
        self, name: str, reader: Reader, sender: Sender, make: Callable[[], None], most_bytes: int
    ) -> None:
        self._name = name
        self._most_bytes = most_bytes
        self._reader = reader
        self._sender = sender
        self._make = make
        self._kept: dict[bytes, DeadLetter] = {}
        self._partial: set[int] = set()

    def bury(self, letters: Sequence[DeadLetter]) -> None:
        """As `Graveyard.bury`."""
        self._sender.surely(self.records(letters), _MAY_BE_LOST)

    def records(self, letters: Sequence[DeadLetter]) -> Sequence[Sending]:
        """The records that keep these, once they are stored. Raises `BrokerError`."""
        self._make()
        return [self._record(each) for each in letters]

    def _record(self, letter: DeadLetter) -> Sending:
        body, error, cut_bytes = letter.message.body, letter.error, 0
        if len(body) > self._most_bytes:
            cut_bytes = len(body) - self._most_bytes
            error = _text(
                f"(of its {len(body)} bytes the last {cut_bytes} are cut; their BLAKE2b is "
                f"{letter.message.body_hash().hex()}) {error}"
            )
            body = body[: self._most_bytes]
        history = _History(
            letter.subscription, letter.message.topic, letter.message.key,
            error, letter.attempts, letter.dead_ms, letter.replays, cut_bytes,
        )  # fmt: skip
        headers = [*headers_of(letter.message), (HISTORY, _encode(history))]
        return Sending(self._name, body, _key(letter), headers, partition=0)

    def check_whole(self, letters: Sequence[DeadLetter]) -> None:
        """Raises `ConfigurationError` where one of these is not all there."""
        partial = [letter for letter in letters if letter.number in self._partial]
        if partial:
            message = partial[0].message
            raise ConfigurationError(
                f"{len(partial)} of these dead letters cannot be brought back, because a body was "
                "too large for a record and was cut, or a record is no letter. The first is "
                f"message {message.id!r} of topic {message.topic!r}; its error says what is "
                "missing. Publish anew from where it came, and discard the letter"
            )

    def select(self, which: Selection, limit: int) -> Sequence[DeadLetter]:
        """As `Graveyard.select`."""
        found = [letter for letter in self._letters().values() if which.matches(letter)]
        return sorted(found, key=lambda letter: letter.number, reverse=True)[:limit]

    def gone(self, letters: Sequence[DeadLetter]) -> Sequence[DeadLetter]:
        """As `Graveyard.gone`."""
        kept = {letter.number for letter in self._letters().values()} if letters else set()
        return [letter for letter in letters if letter.number not in kept]

    def remove(self, letters: Sequence[DeadLetter]) -> Sequence[DeadLetter]:
        """As `Graveyard.remove`."""
        gone = self.gone(letters)
        with self._reader.lock:
            keys = {letter.number: key for key, letter in self._kept.items()}
        self._sender.surely(
            [
                Sending(self._name, None, keys[each.number], [], partition=0)
                for each in letters
                if each.number in keys and each not in gone
            ],
            _MAY_BE_LOST,
        )
        return gone

    def count(self) -> Mapping[tuple[str, str], int]:
        """As `Graveyard.count`."""
        counts = Counter((e.subscription, e.message.topic) for e in self._letters().values())
        return dict(sorted(counts.items()))

    def _letters(self) -> Mapping[bytes, DeadLetter]:
        self._make()
        with self._reader.lock:
            for record in self._reader.read():
                key = record.key()
                if not record.value() and not headers_in(record):
                    self._kept.pop(key, None)
                    continue
                letter = self._letter_in(record)
                before = self._kept.get(key)
                # Written twice, or given up on again after a replay.
                if before is None or letter.replays > before.replays:
                    self._kept[key] = letter
            return dict(self._kept)

    def _letter_in(self, record: Any) -> DeadLetter:
        try:
            headers = read_headers(headers_in(record))
            history = _decode(headers[HISTORY])
            if history.cut_bytes:
                self._partial.add(record.offset() + 1)
            return _read(record, headers, history)
        except (InvalidMessage, KeyError, msgspec.DecodeError) as error:
            # Behind one that cannot be read the others are to be seen all the same.
            self._partial.add(record.offset() + 1)
            return _unreadable(self._name, record, error)


def _key(letter: DeadLetter) -> bytes:
    message = letter.message
    named = (letter.subscription, message.topic, message.source, message.id)
    told = _encode(named) + message.body_hash()
    return hashlib.blake2b(told, digest_size=16).hexdigest().encode()


def _read(record: Any, headers: Mapping[str, str], history: _History) -> DeadLetter:
    key = None if history.key is None else history.key.encode()
    message = message_in(
        unknown(history.topic), headers, key, record.value() or b"", record.timestamp()[1]
    )
    return DeadLetter(
        history.subscription, message, history.error, history.attempts, history.dead_ms,
        replays=history.replays, number=record.offset() + 1,
    )  # fmt: skip


def _unreadable(name: str, record: Any, error: Exception) -> DeadLetter:
    """A letter in the place of a record that is none, so that it can be looked at and removed."""
    number, stamp_ms = record.offset() + 1, max(0, record.timestamp()[1])
    body = record.value() or b""
    message: Message[Any] = Message(name, "kafka", f"unreadable-{number}", body, stamp_ms)
    told = (
        f"this record of {name!r} is no dead letter: {error}. Its headers: {headers_in(record)!r}"
    )
    return DeadLetter(UNKNOWN, message, _text(told), 0, stamp_ms, number=number)


def _as_it_came(item: Item, now_ms: int) -> Message[Any]:
    """A message that duly would not carry, as far as it can be shown; the same each time."""
    headers, key = item.record
    given = dict(headers or ())
    id: Any = (given.get("ce_id") or b"").decode(errors="replace")
    try:
        check_id(item.declared.name, id)
    except InvalidMessage:
        id = ""
    told = repr((headers, key)).encode() + item.body
    id = id or f"unidentified-{hashlib.blake2b(told, digest_size=12).hexdigest()}"
    source: Any = (given.get("ce_source") or b"").decode(errors="replace")
    try:
        check_source(item.declared.name, str(id), source)
    except InvalidMessage:
        source = SOURCE_OF_STRANGERS
    return Message(item.declared.name, source, str(id), item.body, now_ms)


def _text(text: str) -> str:
    """What every database can store."""
    clean = text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")
    return clean[:MAX_ERROR_CHARS]

"""Dead letters: made of records, and kept in a compacted topic by apps without a store.

The key of a record names consumer, message and body, so that a letter which is written twice is
one; removing it is a record with this key and nothing in it. A letter's number is its offset and
one. All of it is read each time, as long as nobody gives up on millions.
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
from duly.brokers.kafka.wire import Headers, headers_of, message_in, read_headers
from duly.errors import InvalidMessage
from duly.inspection import DeadLetter, Selection
from duly.message import Message
from duly.message.limits import check_id

MAX_ERROR_CHARS = 4000
HISTORY = "duly-letter"


class _History(msgspec.Struct):
    subscription: str
    topic: str
    key: str | None
    error: str
    attempts: int
    dead_ms: int
    replays: int


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

    def __init__(self, name: str, reader: Reader, sender: Sender, make: Callable[[], None]) -> None:
        self._name = name
        self._reader = reader
        self._sender = sender
        self._make = make
        self._kept: dict[bytes, DeadLetter] = {}

    def bury(self, letters: Sequence[DeadLetter]) -> None:
        """As `Graveyard.bury`."""
        self._make()
        self._write([(_key(each), each.message.body, _headers(each)) for each in letters])

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
        self._write([(_key(each), None, []) for each in letters if each not in gone])
        return gone

    def count(self) -> Mapping[tuple[str, str], int]:
        """As `Graveyard.count`."""
        counts = Counter((e.subscription, e.message.topic) for e in self._letters().values())
        return dict(sorted(counts.items()))

    def _write(self, records: Sequence[tuple[bytes, bytes | None, Headers]]) -> None:
        self._sender.surely(
            [
                Sending(self._name, body, key, headers, partition=0)
                for key, body, headers in records
            ],
            "dead letters may not be kept",
        )

    def _letters(self) -> Mapping[bytes, DeadLetter]:
        self._make()
        with self._reader.lock:
            for record in self._reader.read():
                key, headers = record.key(), read_headers(record.headers())
                if HISTORY not in headers:
                    self._kept.pop(key, None)
                    continue
                letter = _read(record, headers)
                before = self._kept.get(key)
                # Written twice, or given up on again after a replay.
                if before is None or letter.replays > before.replays:
                    self._kept[key] = letter
            return dict(self._kept)


def _key(letter: DeadLetter) -> bytes:
    message = letter.message
    named = (letter.subscription, message.topic, message.source, message.id)
    told = _encode(named) + message.body_hash()
    return hashlib.blake2b(told, digest_size=16).hexdigest().encode()


def _headers(letter: DeadLetter) -> Headers:
    history = _History(
        letter.subscription, letter.message.topic, letter.message.key,
        letter.error, letter.attempts, letter.dead_ms, letter.replays,
    )  # fmt: skip
    return [*headers_of(letter.message), (HISTORY, _encode(history))]


def _read(record: Any, headers: Mapping[str, str]) -> DeadLetter:
    history = _decode(headers[HISTORY])
    key = None if history.key is None else history.key.encode()
    message = message_in(
        unknown(history.topic), headers, key, record.value() or b"", record.timestamp()[1]
    )
    return DeadLetter(
        history.subscription, message, history.error, history.attempts, history.dead_ms,
        replays=history.replays, number=record.offset() + 1,
    )  # fmt: skip


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
    source = (given.get("ce_source") or b"").decode(errors="replace")
    return Message(item.declared.name, _text(source) or "kafka", str(id), item.body, now_ms)


def _text(text: str) -> str:
    """What every database can store."""
    clean = text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")
    return clean[:MAX_ERROR_CHARS]

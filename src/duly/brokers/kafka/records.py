"""`Records`: what is fixed where every process sees it, in a compacted topic.

===================================  =========================================================
``topic/<topic>``                    its guarantee
``subscription/<name>``              its guarantee
``effects/<name>``                   what remembers what took effect, of an exactly-once one
``lanes/<name>``                     into how many lanes of keys an exactly-once one cuts partitions
``began/<name>/<topic>``              the id of the topic in which it began
``first/<name>/<topic's id>``        how many partitions there were when it began
``begun/<name>/<topic's id>/<n>``    it has a position in this partition
``taker/<name>/<topic's id>/<n>``    who was given this partition last, to commit by transactions
===================================  =========================================================

Who took a partition is whoever said so last. Of all others, which are fixed, the first record
counts: who finds another behind it writes the first again, since
the topic is compacted and keeps the last. A position that Kafka has forgotten
(``offsets.retention.minutes``) looks like one that there never was; the last record tells them
apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from duly.brokers.kafka.producer import Sender, Sending
from duly.brokers.kafka.reader import Reader


class Records:
    """All of one namespace. ``reader`` is of the topic ``name``, which is there."""

    def __init__(self, name: str, reader: Reader, sender: Sender) -> None:
        self._name = name
        self._reader = reader
        self._sender = sender
        self._fixed: dict[str, str] = {}
        self._last: dict[str, str] = {}

    def fix(self, wanted: Mapping[str, str]) -> Mapping[str, str]:
        """What is recorded under each key: this, unless there was something before. Raises
        `BrokerError`.
        """
        with self._reader.lock:
            if any(self._fixed.get(key) != text for key, text in wanted.items()):
                self._read()
            new = {key: text for key, text in wanted.items() if key not in self._fixed}
            if new:
                self._write(new)
                self._read()
            # Also where another wrote the last one, and died before it could put that right.
            if lost := {k: self._fixed[k] for k in wanted if self._last[k] != self._fixed[k]}:
                self._write(lost)
                self._last |= lost
            return {key: self._fixed[key] for key in wanted}

    def found(self, keys: Iterable[str]) -> Mapping[str, str]:
        """What is recorded under these keys, of those under which anything is."""
        with self._reader.lock:
            wanted = list(keys)
            if not self._fixed.keys() >= set(wanted):
                self._read()
            return {key: self._fixed[key] for key in wanted if key in self._fixed}

    def put(self, texts: Mapping[str, str]) -> None:
        """Record this in place of what was there. Raises `BrokerError`."""
        with self._reader.lock:
            self._write(texts)
            self._read()

    def last(self, keys: Iterable[str]) -> Mapping[str, str]:
        """What was recorded last under these keys, of those under which anything is."""
        with self._reader.lock:
            self._read()
            return {key: self._last[key] for key in keys if key in self._last}

    def _write(self, texts: Mapping[str, str]) -> None:
        self._sender.surely(
            [
                Sending(self._name, text.encode(), key.encode(), [], partition=0)
                for key, text in texts.items()
            ],
            "what is fixed could not be recorded",
        )

    def _read(self) -> None:
        for record in self._reader.read():
            key, text = (record.key() or b"").decode(), (record.value() or b"").decode()
            self._fixed.setdefault(key, text)
            self._last[key] = text

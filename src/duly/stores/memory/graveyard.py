"""Dead letters that a store in memory keeps for a broker which keeps none."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from duly.inspection import DeadLetter, Selection

_Identity = tuple[str, str, str, str, bytes]


def _identity(letter: DeadLetter) -> _Identity:
    message = letter.message
    return letter.subscription, message.topic, message.source, message.id, message.body


class MemoryGraveyard:
    """See `duly.inspection.graves.Graveyard`. ``lock`` is the store's."""

    def __init__(self, lock: AbstractContextManager[Any]) -> None:
        self._lock = lock
        self._letters: dict[_Identity, DeadLetter] = {}
        self._numbers = itertools.count(1)

    def bury(self, letters: Sequence[DeadLetter]) -> None:
        """As `Graveyard.bury`."""
        with self._lock:
            for letter in letters:
                identity = _identity(letter)
                kept = self._letters.get(identity)
                if kept is None:
                    self._letters[identity] = replace(letter, number=next(self._numbers))
                elif letter.replays > kept.replays:
                    self._letters[identity] = replace(letter, number=kept.number)

    def select(self, which: Selection, limit: int) -> Sequence[DeadLetter]:
        """As `Graveyard.select`."""
        with self._lock:
            found = [letter for letter in self._letters.values() if which.matches(letter)]
        return sorted(found, key=lambda letter: letter.number, reverse=True)[:limit]

    def gone(self, letters: Sequence[DeadLetter]) -> Sequence[DeadLetter]:
        """As `Graveyard.gone`."""
        with self._lock:
            return [letter for letter in letters if not self._keeps(letter)]

    def remove(self, letters: Sequence[DeadLetter]) -> Sequence[DeadLetter]:
        """As `Graveyard.remove`."""
        with self._lock:
            gone = [letter for letter in letters if not self._keeps(letter)]
            for letter in letters:
                if self._keeps(letter):
                    del self._letters[_identity(letter)]
            return gone

    def _keeps(self, letter: DeadLetter) -> bool:
        kept = self._letters.get(_identity(letter))
        return kept is not None and (kept.number, kept.replays) == (letter.number, letter.replays)

    def count(self) -> Mapping[tuple[str, str], int]:
        """As `Graveyard.count`."""
        with self._lock:
            letters = list(self._letters.values())
        counts = Counter((letter.subscription, letter.message.topic) for letter in letters)
        return dict(sorted(counts.items()))

"""Message ids: unique, and growing with time."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

_SEED_BYTES, _SEEDS = 9, 64


@dataclass(frozen=True, slots=True)
class Moment:
    """What the ids made in one millisecond share, and what tells them apart."""

    ms: int
    prefix: str
    counter: Iterator[int]

    @classmethod
    def of(cls, ms: int, seed: int) -> Moment:
        count, high, low = seed & 0x7FFF_FFFF_FFFF, (seed >> 47) & 0xFFF, (seed >> 59) & 0xFFF
        time_part = f"{ms:012x}"
        prefix = f"{time_part[:8]}-{time_part[8:]}-7{high:03x}-{0x8000 | low:04x}-"
        return cls(ms, prefix, itertools.count(count))


class Ids:
    """UUIDs of version 7 (RFC 9562), growing in each thread in the order made.

    The bits after the time are random in each millisecond that needs an id, and the last 48 of
    them counted up inside it (RFC 9562 §6.2, method 1; their top bit starts as 0, so that they
    do not overflow). Two processes collide as seldom as 71 random bits do. Without a lock:
    a moment is one value, and its counter gives each number once.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start anew; a forked child must not count on from its parent's state."""
        self._seeds: list[int] = []
        self._drawn_ms = 0
        self._moment = self._new(0)

    def _new(self, ms: int) -> Moment:
        if ms > self._drawn_ms + _SEEDS:
            self._seeds = []  # a machine that was copied meanwhile goes on with its own
        try:
            seed = self._seeds.pop()
        except IndexError:
            # Many at once, for each call lets another thread have the interpreter.
            self._drawn_ms = ms
            chance = os.urandom(_SEED_BYTES * _SEEDS)
            starts = range(0, len(chance), _SEED_BYTES)
            seeds = [int.from_bytes(chance[at : at + _SEED_BYTES], "big") for at in starts]
            seed = seeds.pop()
            self._seeds = seeds
        return Moment.of(ms, seed)

    def one(self) -> str:
        """A new id."""
        return self.one_at(time.time_ns() // 1_000_000)

    def one_at(self, ms: int) -> str:
        """A new id, for who has looked at the clock: milliseconds since 1970 UTC."""
        moment = self._moment
        # A clock that was set back changes nothing: the last moment goes on.
        if ms > moment.ms:
            moment = self._moment = self._new(ms)
        return f"{moment.prefix}{next(moment.counter):012x}"

    def take(self, count: int) -> list[str]:
        """``count`` new ids, in order."""
        moment = self._moment
        ms = time.time_ns() // 1_000_000
        if ms > moment.ms:
            moment = self._moment = self._new(ms)
        prefix = moment.prefix
        return [f"{prefix}{n:012x}" for n in itertools.islice(moment.counter, count)]


ids = Ids()
os.register_at_fork(after_in_child=ids.forget)


def new_ids(count: int) -> list[str]:
    """``count`` new message ids: unique, growing in the order made."""
    return ids.take(count)

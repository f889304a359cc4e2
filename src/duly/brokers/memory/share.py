"""How far one subscription has come in one partition of a log."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from duly.broker import Delivery, LogPosition
from duly.brokers.memory.partition import Entry, KeyLane, Partition


class LogReceipt(msgspec.Struct, frozen=True, gc=False):
    """The receipt of a delivery: ``generation`` is that of the assignment it came under."""

    subscription: str
    log: str
    offset: int
    generation: int
    token: int


@dataclass(slots=True, eq=False)
class Past:
    """What is known of an offset that was delivered before and comes again.

    ``charged`` counts its starts, ``due`` is when it may come again (never: a dead letter that
    holds what is behind it), ``replays`` how often it came back from the dead letters.
    """

    charged: int = 0
    suspect: bool = False
    repeated: bool = False
    due: float = 0.0
    replays: int = 0


@dataclass(slots=True, eq=False)
class Flight:
    """One claimed offset. ``alone``: its start is counted already. ``asked_for_one``: it is not,
    and the lane asked for one message.
    """

    token: int
    until: float
    alone: bool
    asked_for_one: bool


class Share:
    """One partition, or one lane of its keys, as one subscription sees it: owned by one lane at a
    time.

    Only a contiguous prefix is committed: ``committed`` is the next offset behind it. What is
    done further on is remembered until the partition changes hands, and comes again then.
    """

    def __init__(self, subscription: str, partition: Partition | KeyLane, first: int) -> None:
        self.partition = partition
        self.committed = first
        self.owner: int | None = None
        self.generation = 0
        self.flying: dict[int, Flight] = {}
        self._subscription = subscription
        self._next = first
        self._again: dict[int, Past] = {}
        self._known: dict[int, Past] = {}
        self._done: set[int] = set()
        # Replayed dead letters, which the log itself may have let go.
        self._replayed: dict[int, Entry] = {}

    # --- claiming

    def offers(self, now: float, *, ordered: bool) -> Iterator[tuple[Entry, Past | None]]:
        """What may be claimed now, in order of offsets; one suspect comes first and alone.

        The partition waits behind a message that is not due and behind one in flight alone; in
        order by key behind anything in flight.
        """
        if any(flight.alone for flight in self.flying.values()) or (ordered and self.flying):
            return
        for offset in sorted(self._again):
            past = self._again[offset]
            entry = self.entry(offset)
            if past.due > now:
                return
            if entry is not None:
                yield entry, past
        entry = self.partition.after(self._next)
        while entry is not None:
            yield entry, None
            entry = self.partition.after(entry.offset + 1)

    def next_due(self) -> float | None:
        """When the partition goes on by itself."""
        if not self._again:
            return None
        due = self._again[min(self._again)].due
        return None if due == math.inf else due

    def take(self, entry: Entry, flight: Flight) -> Delivery:
        """Claim one of the offers."""
        alone, token = flight.alone, flight.token
        past = self._again.pop(entry.offset, None)
        if past is None:
            past = Past()
            self._next = entry.offset + 1
        self._known[entry.offset] = past
        past.charged += alone
        self.flying[entry.offset] = flight
        return Delivery(
            entry.message,
            LogReceipt(
                self._subscription, self.partition.log, entry.offset, self.generation, token
            ),
            past.charged if alone else past.charged + 1,
            past.repeated,
            alone,
            LogPosition(self.partition.log, entry.offset, entry.epoch, self.partition.end),
            past.replays,
        )

    @property
    def safe(self) -> int:
        """The partition may let go what stands before this offset. In a lane of keys that is past
        what others have in between.
        """
        left = self.partition.after(self.committed)
        return self.partition.end if left is None else left.offset

    def entry(self, offset: int) -> Entry | None:
        """The message at an offset, as long as this subscription needs it."""
        return self._replayed.get(offset) or self.partition.at(offset)

    # --- how a flight ends

    def holds(self, receipt: LogReceipt) -> bool:
        """Whether a receipt still holds its claim."""
        flight = self.flying.get(receipt.offset)
        return (
            flight is not None
            and receipt.generation == self.generation
            and receipt.token == flight.token
        )

    def done(self, offset: int) -> None:
        """Handled or given up on; the prefix grows as far as it can."""
        del self.flying[offset]
        del self._known[offset]
        self._finish(offset)

    def retry(self, offset: int, due: float) -> int:
        """Failed: the partition waits until it is due. Returns the attempts so far."""
        past = self._land(offset, charge=True)
        past.suspect, past.repeated, past.due = False, True, due
        return past.charged

    def wait(self, offset: int, due: float) -> None:
        """Never started: the partition waits until it is due."""
        self._land(offset, charge=False).due = due

    def release(self, offset: int, *, started: bool) -> None:
        """Not done: it comes again."""
        past = self._land(offset, charge=False)
        past.repeated = past.repeated or started

    def hold(self, offset: int) -> int:
        """Dead, and the partition waits behind it. Returns the attempts so far."""
        return self.retry(offset, math.inf)

    def attempts(self, offset: int) -> int:
        """The starts of a flying offset, this one included."""
        return self._known[offset].charged + (not self.flying[offset].alone)

    def replays(self, offset: int) -> int:
        """How often a flying offset came back from the dead letters."""
        return self._known[offset].replays

    def unhold(self, offset: int) -> None:
        """A dead letter that held the partition is discarded."""
        del self._again[offset]
        self._finish(offset)

    def _land(self, offset: int, *, charge: bool) -> Past:
        flight = self.flying.pop(offset)
        past = self._again[offset] = self._known.pop(offset)
        if charge:
            past.charged += not flight.alone
        else:
            past.charged -= flight.alone
        return past

    def replay(self, entry: Entry, replays: int) -> None:
        """A dead letter is delivered again, for the ``replays``-th time."""
        if entry.offset not in self._again:  # behind the cursor
            self._replayed[entry.offset] = entry
        self._again[entry.offset] = Past(replays=replays)

    def _finish(self, offset: int) -> None:
        if self._replayed.pop(offset, None) is not None and offset < self.committed:
            return
        self._done.add(offset)
        entry = self.partition.after(self.committed)
        while entry is not None and entry.offset in self._done:
            self._done.remove(entry.offset)
            self.committed = entry.offset + 1
            entry = self.partition.after(self.committed)

    # --- changing hands

    def revoke(self, *, died: bool, sole: bool = False) -> None:
        """The owner is gone or another: what is not committed comes again.

        Where it ``died`` its flights are suspect. One that was alone in its claim has been
        charged already; a ``sole`` one that was asked for singly is charged now.
        """
        for offset in sorted(self.flying):
            flight = self.flying[offset]
            past = self._land(offset, charge=False)
            past.repeated = True
            past.suspect = past.suspect or died
            if died:
                past.charged += flight.alone or (sole and flight.asked_for_one)
        for offset in self._done:
            # Done, but behind a gap: the log only knows the prefix.
            self._again[offset] = Past(repeated=True)
        self._done.clear()

    def truncated(self) -> None:
        """The partition lost its end: so did what this subscription knows of it."""
        self.partition.truncated()
        self.revoke(died=False)
        end = self.partition.end
        self.committed = min(self.committed, end)
        self._next = min(self._next, end)
        self._again = {offset: past for offset, past in self._again.items() if offset < end}
        # What was lost in flight must not be settled as what comes to stand there.
        self.generation += 1

    def count(self, now: float) -> tuple[int, int, int]:
        """How many messages wait to be claimed, are claimed, and wait for something else."""
        held = sum(past.due == math.inf for past in self._again.values())
        parked = sum(past.due > now for past in self._again.values()) - held
        ready = len(self._again) - parked - held
        return self.partition.count_from(self._next) + ready, len(self.flying), parked

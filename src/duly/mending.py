"""Dead letters of an app: found, brought back, removed; and what a replay will come to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

from duly.broker import Broker
from duly.consumer import Consumer
from duly.contract.setting import Run, Setting
from duly.errors import ConfigurationError
from duly.guarantees import Admission, Guarantee
from duly.inspection import DeadLetter, Mending, Selection
from duly.inspection.graves import Buries
from duly.store import Parked, Store, parked_beside

# One portion is one transaction: others get their turn in between.
PORTION = 500

_BY_ADMISSION = {
    Admission.BY_CLAIM: "no effect of it was committed; it runs again and commits once",
    Admission.BY_INBOX: (
        "the inbox remembers it as given up on and admits this replay; had it taken effect, "
        "the inbox drops it as a repeat"
    ),
    Admission.BY_CURSOR: "the cursor has passed it, so that it can have no effect any more",
}
_PARKED = (
    "no effect of it was committed; it waits in the store, due at once, runs again and commits once"
)
_BY_GUARANTEE = {
    Guarantee.AT_MOST_ONCE: "it runs once more, unless its worker dies before that",
    Guarantee.AT_LEAST_ONCE: "it runs again, and what its earlier attempts did stays done",
}


class Letters(Protocol):
    """Dead letters wherever they are kept: what `Mending` adds to `Inspection`."""

    def select(self, which: Selection, limit: int) -> Sequence[DeadLetter]:
        """Those that are meant, the highest number first."""
        ...

    def replay(self, letters: Sequence[DeadLetter]) -> Sequence[DeadLetter]:
        """Deliver them again; returns those that are no dead letters any more."""
        ...

    def discard(self, letters: Sequence[DeadLetter]) -> Sequence[DeadLetter]:
        """Remove them for good; returns those that are no dead letters any more."""
        ...


@dataclass(frozen=True, slots=True)
class Buried:
    """The dead letters of a broker that keeps none itself.

    A replay is two steps, delivered and then removed: a crash in between, or two people at once,
    deliver it twice under one identity. An inbox drops the second, and to an at-least-once
    consumer it is a repeat.
    """

    broker: Buries

    def select(self, which: Selection, limit: int) -> Sequence[DeadLetter]:
        """As `Letters.select`."""
        return self.broker.graveyard.select(which, limit)

    def replay(self, letters: Sequence[DeadLetter]) -> Sequence[DeadLetter]:
        """As `Letters.replay`."""
        graveyard = self.broker.graveyard
        gone = graveyard.gone(letters)
        kept = [letter for letter in letters if letter not in gone]
        self.broker.redeliver(kept)
        # One that has died again by now is another letter, and stays.
        graveyard.remove(kept)
        return gone

    def discard(self, letters: Sequence[DeadLetter]) -> Sequence[DeadLetter]:
        """As `Letters.discard`."""
        return self.broker.graveyard.remove(letters)


@dataclass(frozen=True, slots=True)
class Mender:
    """Dead letters that can be mended, and the consumers that gave up on them."""

    letters: Letters
    setting: Setting
    consumers: Sequence[Consumer]
    parked: Parked | None = None

    @classmethod
    def of(cls, backends: tuple[Broker, Store | None], consumers: Sequence[Consumer]) -> Self:
        """Raises `ConfigurationError` where nobody keeps the broker's dead letters."""
        broker, store = backends
        letters: Letters
        if isinstance(broker, Mending):
            letters = broker
        elif isinstance(broker, Buries):
            broker.carry()  # what the server gave up on a moment ago is among them
            letters = Buried(broker)
        else:
            raise ConfigurationError(
                f"{broker.capabilities.name} keeps no dead letters that duly could show or bring "
                "back; look for them with its own tools"
            )
        setting = Setting(broker.capabilities, None if store is None else store.capabilities, Run())
        return cls(letters, setting, consumers, parked_beside(broker, store))

    def select(self, which: Selection, limit: int) -> Sequence[DeadLetter]:
        """The dead letters that are meant, the latest first."""
        return self.letters.select(which, limit)

    def walk(self, which: Selection) -> Iterator[Sequence[DeadLetter]]:
        """All of them, in portions; those of a portion may be mended before the next is read."""
        while letters := self.letters.select(which, PORTION):
            yield letters
            which = replace(which, below=letters[-1].number)

    def outlook(self, consumer: str) -> str:
        """What a replay to this consumer comes to."""
        found = self._consumer(consumer)
        if found is None:
            return "this app has no such consumer (any more): it waits until one works it"
        if self._parks(found):
            return _PARKED
        admission = self.setting.admission(found)
        return _BY_GUARANTEE[found.guarantee] if admission is None else _BY_ADMISSION[admission]

    def refuse_useless(self, consumers: Iterable[str]) -> None:
        """Raise `ConfigurationError` where a replay can have no effect."""
        for name in consumers:
            found = self._consumer(name)
            if found is None or self._parks(found):
                continue
            if self.setting.admission(found) is Admission.BY_CURSOR:
                raise ConfigurationError(
                    f"consumer {name!r}: {_BY_ADMISSION[Admission.BY_CURSOR]}. Nothing was "
                    "replayed. Publish it again under another id, and discard the dead letter."
                )

    def replay(self, letters: Sequence[DeadLetter]) -> int:
        """Bring them back, the oldest first; returns how many were still there."""
        names = {letter.subscription for letter in letters}
        self.refuse_useless(names)
        found = (self._consumer(name) for name in names)
        into_store = {each.name for each in found if each is not None and self._parks(each)}
        parked = [letter for letter in letters if letter.subscription in into_store]
        others = [letter for letter in letters if letter.subscription not in into_store]
        return _in_portions(self._park, parked) + _in_portions(self.letters.replay, others)

    def _parks(self, consumer: Consumer) -> bool:
        return self.parked is not None and self.setting.parks(consumer)

    def _park(self, letters: Sequence[DeadLetter]) -> Sequence[DeadLetter]:
        """Deliver these out of the store, which the log's own deliveries do not reach any more."""
        assert self.parked is not None, "asked before"
        if isinstance(self.letters, Buried):
            return self.parked.replay(letters)
        # A log that keeps its own: what it delivers again lies below the cursor, and is a repeat.
        gone = self.letters.replay(letters)
        self.parked.bring_back([letter for letter in letters if letter not in gone])
        return gone

    def discard(self, letters: Sequence[DeadLetter]) -> int:
        """Remove them for good; returns how many were still there."""
        return _in_portions(self.letters.discard, letters)

    def _consumer(self, name: str) -> Consumer | None:
        return next((each for each in self.consumers if each.name == name), None)


def _in_portions(
    mend: Callable[[Sequence[DeadLetter]], Sequence[DeadLetter]], letters: Sequence[DeadLetter]
) -> int:
    numbered = {letter.number: letter for letter in letters}
    each = [numbered[number] for number in sorted(numbered)]
    portions = [each[start : start + PORTION] for start in range(0, len(each), PORTION)]
    return sum(len(portion) - len(mend(portion)) for portion in portions)

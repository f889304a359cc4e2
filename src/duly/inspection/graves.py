"""Dead letters of brokers that keep none which people could list and mend.

Such a broker (`Buries`) gives what it has to give up on to a `Graveyard`, and settles it then. An
app's store has one, durable like everything in it; a broker may have one of its own for apps
without a store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, cast, runtime_checkable

from duly.inspection import DeadLetter, Selection


@runtime_checkable
class Graveyard(Protocol):
    """Where dead letters are kept, one for each consumer, message (with its body) and life.

    Safe to use from any thread. Raises `BrokerError`, having changed nothing or, where nobody can
    say, also `CommitUnknown`: doing it again is harmless.
    """

    def bury(self, letters: Sequence[DeadLetter]) -> None:
        """Keep these, durably on return, each under a number of its own. One that is kept already
        changes nothing, unless it was replayed more often: then it takes that one's place.
        """
        ...

    def select(self, which: Selection, limit: int) -> Sequence[DeadLetter]:
        """Those that are meant, the highest number first."""
        ...

    def gone(self, letters: Sequence[DeadLetter]) -> Sequence[DeadLetter]:
        """Those of these that are not kept any more, or have died again since. Only reads."""
        ...

    def remove(self, letters: Sequence[DeadLetter]) -> Sequence[DeadLetter]:
        """Keep these no longer; returns those that were `gone`, which stay as they are."""
        ...

    def count(self) -> Mapping[tuple[str, str], int]:
        """How many there are, by consumer and topic."""
        ...


@runtime_checkable
class Buries(Protocol):
    """What a broker does that keeps no dead letters itself, where `Mending` is not offered."""

    @property
    def graveyard(self) -> Graveyard:
        """Where what is given up on goes."""
        ...

    def bury_in(self, graveyard: Graveyard) -> None:
        """From now on what is given up on goes there, durably, before it is settled: where that
        fails, nothing is settled and it comes again.
        """
        ...

    def carry(self) -> int:
        """Bring there what the server itself gave up on, of the subscriptions made known here;
        returns how many. Interrupted, it is done again, which is harmless. Raises `BrokerError`.
        """
        ...

    def redeliver(self, letters: Sequence[DeadLetter]) -> None:
        """Deliver these to their subscriptions, and to nobody else, as if for the first time but
        with one replay more; durable on return. Raises `BrokerError`: some may have been.
        """
        ...


class KeepsLetters(Protocol):
    """What a log does that keeps dead letters itself, where a store parks what it delivers."""

    def keep_letters(self, letters: Sequence[DeadLetter]) -> None:
        """Keep these: messages that it delivered once, and that were given up on since, out of
        the store. Raises `BrokerError`.
        """
        ...


def keeper_of(broker: object) -> KeepsLetters | None:
    """A broker as one that keeps such letters; None: the store shows them."""
    return cast(KeepsLetters, broker) if hasattr(broker, "keep_letters") else None


def graveyard_of(store: object) -> Graveyard | None:
    """The graveyard of a store that has one."""
    return getattr(store, "graveyard", None)

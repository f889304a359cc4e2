"""A broker that buries its dead letters elsewhere, graveyards, and mistakes in them."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from dataclasses import replace as with_operations
from typing import Any

from msgspec.structs import replace as with_fields

from duly.broker import Delivery
from duly.errors import BrokerError
from duly.guarantees import Dead, Settlement
from duly.inspection import DeadLetter, Selection
from duly.inspection.graves import Buries
from duly.message import now_ms
from duly.stores.memory.graveyard import MemoryGraveyard
from duly.testing.conformance.memory import STORE_APART
from tests.contract.broken.coats import Broken, BrokenStore, Coat
from tests.contract.broken.mistake import Mistake
from tests.contract.subjects import SQLITE, SQLITE_STORE

# --- a sound one: its own dead letters it keeps only to deliver them again


class LaneThatBuries(Coat):
    def __init__(self, inner: Any, broker: BuriesElsewhere, subscription: str) -> None:
        super().__init__(inner)
        self.broker = broker
        self.subscription = subscription
        self.claimed: dict[Any, Delivery] = {}

    def claim(self, limit: int, max_bytes: int, wait_s: float) -> Sequence[Delivery]:
        found: Sequence[Delivery] = self.inner.claim(limit, max_bytes, wait_s)
        self.claimed |= {delivery.receipt: delivery for delivery in found}
        return found

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[Any]:
        self.broker.graveyard.bury(
            [
                self.letter(self.claimed[each.receipt], each.error)
                for each in settlements
                if isinstance(each, Dead) and each.receipt in self.claimed
            ]
        )
        refused: Sequence[Any] = self.inner.settle(settlements)
        return refused

    def letter(self, delivery: Delivery, error: str) -> DeadLetter:
        return DeadLetter(
            self.subscription,
            delivery.message,
            error,
            delivery.attempt,
            now_ms(),
            replays=delivery.replays,
        )


class BuriesElsewhere(Broken):
    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.graveyard: Any = MemoryGraveyard(threading.RLock())

    def __getattr__(self, name: str) -> Any:
        if name in ("select", "replay", "discard"):
            raise AttributeError(name)
        return super().__getattr__(name)

    def subscribe(self, topics: Any, subscription: str, options: Any) -> Any:
        return LaneThatBuries(
            self.inner.subscribe(topics, subscription, options), self, subscription
        )

    def bury_in(self, graveyard: Any) -> None:
        self.graveyard = graveyard

    def carry(self) -> int:
        return 0

    def redeliver(self, letters: Sequence[DeadLetter]) -> None:
        ids = {letter.message.id for letter in letters}
        meant = [each for each in self.inner.select(Selection(), 100) if each.message.id in ids]
        self.inner.replay(meant)


# --- mistakes


class MendsToo(BuriesElsewhere):
    """It is asked for its dead letters, and the graveyard is not."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class SettlesBeforeItBuries(BuriesElsewhere):
    def subscribe(self, topics: Any, subscription: str, options: Any) -> Any:
        class Hasty(LaneThatBuries):
            def settle(self, settlements: Sequence[Settlement]) -> Sequence[Any]:
                refused: Sequence[Any] = self.inner.settle(settlements)
                with suppress(KeyError):
                    super().settle(settlements)
                return refused

        return Hasty(self.inner.subscribe(topics, subscription, options), self, subscription)


class BuriesIfItCan(BuriesElsewhere):
    """A graveyard that is away is no reason to keep the message."""

    def subscribe(self, topics: Any, subscription: str, options: Any) -> Any:
        class Careless(LaneThatBuries):
            def settle(self, settlements: Sequence[Settlement]) -> Sequence[Any]:
                with suppress(BrokerError):
                    return super().settle(settlements)
                refused: Sequence[Any] = self.inner.settle(settlements)
                return refused

        return Careless(self.inner.subscribe(topics, subscription, options), self, subscription)


class ForgetsHowItDied(BuriesElsewhere):
    def subscribe(self, topics: Any, subscription: str, options: Any) -> Any:
        class Forgetful(LaneThatBuries):
            def letter(self, delivery: Delivery, error: str) -> DeadLetter:
                return replace(super().letter(delivery, error), attempts=1, replays=0)

        return Forgetful(self.inner.subscribe(topics, subscription, options), self, subscription)


class KeepsOnlyItsOwn(BuriesElsewhere):
    """`bury_in` is heard and not followed."""

    def bury_in(self, graveyard: Any) -> None:
        """Not now."""


class RedeliversAnew(BuriesElsewhere):
    """Published again, for everybody."""

    def redeliver(self, letters: Sequence[DeadLetter]) -> None:
        self.inner.publish([letter.message for letter in letters])


class RedeliversInWords(BuriesElsewhere):
    def redeliver(self, letters: Sequence[DeadLetter]) -> None:
        """Done."""


class Yard(Coat):
    """A graveyard with something wrong in it."""


class StoreWithAYard(BrokenStore):
    yard: type[Coat] = Yard

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.graveyard: Any = self.yard(inner.graveyard)


class KeepsEachTime(StoreWithAYard):
    """A second writing is a second letter."""

    class yard(Yard):  # noqa: N801
        def bury(self, letters: Sequence[DeadLetter]) -> None:
            times = itertools.count(len(self.inner.select(Selection(), 1000)))
            self.inner.bury(
                [
                    replace(each, message=with_fields(each.message, source=f"{next(times)}"))
                    for each in letters
                ]
            )


class KeepsTheFirst(StoreWithAYard):
    """Whatever died later under the same name is known already."""

    class yard(Yard):  # noqa: N801
        def bury(self, letters: Sequence[DeadLetter]) -> None:
            there = {each.message.id for each in self.inner.select(Selection(), 1000)}
            self.inner.bury([each for each in letters if each.message.id not in there])


class RemovesByNumber(StoreWithAYard):
    """A letter that died again is removed for the one that somebody saw."""

    class yard(Yard):  # noqa: N801
        def remove(self, letters: Sequence[DeadLetter]) -> Sequence[DeadLetter]:
            numbers = {letter.number for letter in letters}
            now = [e for e in self.inner.select(Selection(), 1000) if e.number in numbers]
            self.inner.remove(now)
            return []


class RemovesInWords(StoreWithAYard):
    class yard(Yard):  # noqa: N801
        def remove(self, letters: Sequence[DeadLetter]) -> Sequence[DeadLetter]:
            return []


class KeepsNoHeaders(StoreWithAYard):
    class yard(Yard):  # noqa: N801
        def bury(self, letters: Sequence[DeadLetter]) -> None:
            self.inner.bury(
                [replace(e, message=with_fields(e.message, headers={})) for e in letters]
            )


class SelectsAll(StoreWithAYard):
    class yard(Yard):  # noqa: N801
        def select(self, which: Selection, limit: int) -> Sequence[DeadLetter]:
            found: Sequence[DeadLetter] = self.inner.select(Selection(), limit)
            return found


class CountsOnce(StoreWithAYard):
    class yard(Yard):  # noqa: N801
        def count(self) -> Any:
            return dict.fromkeys(self.inner.count(), 1)


class HalfAYard(StoreWithAYard):
    class yard(Yard):  # noqa: N801
        def __getattr__(self, name: str) -> Any:
            if name == "gone":
                raise AttributeError(name)
            return super().__getattr__(name)


class NumbersAnew(StoreWithAYard):
    """The lowest number that is free."""

    class yard(Yard):  # noqa: N801
        def select(self, which: Selection, limit: int) -> Sequence[DeadLetter]:
            found: Sequence[DeadLetter] = self.inner.select(which, limit)
            return [replace(each, number=n) for n, each in enumerate(found[::-1], 1)][::-1]


class BuriesInMemory(StoreWithAYard):
    """The store is a file, and its graveyard is not."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.graveyard = MemoryGraveyard(threading.RLock())


BROKER: Any = {"around": with_operations(SQLITE, operations=(Buries,)), "page": "sqlite.md"}
STORE: Any = {"around": STORE_APART}

BURYING = (
    Mistake(MendsToo, ("Burying::test_it_has_every_call_and_mends_nothing_itself",), **BROKER),
    Mistake(SettlesBeforeItBuries, ("Burying::test_what_is_not_kept_is_not_settled",), **BROKER),
    Mistake(BuriesIfItCan, ("Burying::test_a_crash_on_the_way_repeats_it[before_bury]",), **BROKER),
    Mistake(
        ForgetsHowItDied,
        (
            "Burying::test_a_letter_says_what_became_of_it[its own]",
            "Burying::test_how_often_it_was_replayed_is_known[dead]",
        ),
        **BROKER,
    ),
    Mistake(
        KeepsOnlyItsOwn,
        (
            "Burying::test_a_letter_says_what_became_of_it[a store's]",
            "Burying::test_a_crash_before_the_removal_delivers_it_twice",
        ),
        **BROKER,
    ),
    Mistake(
        RedeliversAnew,
        ("Burying::test_a_replay_reaches_its_subscription_and_nobody_else",),
        **BROKER,
    ),
    Mistake(
        RedeliversInWords,
        ("Burying::test_a_replay_is_the_same_message_begun_anew[its own]",),
        **BROKER,
    ),
    Mistake(HalfAYard, ("Graves::test_it_has_every_call",), **STORE),
    Mistake(KeepsNoHeaders, ("Graves::test_a_letter_is_as_it_was",), **STORE),
    Mistake(
        KeepsEachTime,
        ("Graves::test_written_again_it_is_one", "Graves::test_from_many_threads_too"),
        **STORE,
    ),
    Mistake(
        KeepsTheFirst,
        (
            "Graves::test_another_body_or_consumer_is_another_letter",
            "Graves::test_one_that_died_again_takes_the_place_of_the_first",
        ),
        **STORE,
    ),
    Mistake(RemovesInWords, ("Graves::test_what_is_removed_is_gone",), **STORE),
    Mistake(
        RemovesByNumber,
        ("Graves::test_what_died_again_is_not_removed_for_what_it_was",),
        **STORE,
    ),
    Mistake(NumbersAnew, ("Graves::test_a_number_is_given_once",), **STORE),
    Mistake(SelectsAll, ("Graves::test_which_are_meant",), **STORE),
    Mistake(CountsOnce, ("Graves::test_they_are_counted",), **STORE),
    Mistake(
        BuriesInMemory,
        ("GravesDurably::test_a_letter_survives",),
        SQLITE_STORE,
        "sqlite.md",
    ),
)

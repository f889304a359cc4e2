"""Dead letters that a store keeps for brokers which keep none (`Graveyard`)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from duly.guarantees import Admission
from duly.inspection import DeadLetter, Selection
from duly.inspection.graves import Graveyard, graveyard_of
from duly.message import Topic
from duly.testing.conformance.backend import SOURCE, Place, together

EVERY = Selection()
DIED_MS = 1_700_000_000_000
TOPIC: Topic[Any] = Topic("t", str, guarantee="at-least-once")


def graveyard(place: Place) -> Graveyard:
    """The store's."""
    found = graveyard_of(place.store)
    assert found is not None, "the subject says that it has one"
    return found


def letter(body: str = "a", id: str = "one", **more: Any) -> DeadLetter:
    """One that a broker hands over."""
    fields = {"subscription": "sub", "error": "no", "attempts": 3, "dead_ms": DIED_MS, **more}
    message = fields.pop("message", TOPIC.message(body, source=SOURCE, id=id, time_ms=1))
    return DeadLetter(message=message, **fields)


def kept(place: Place, **which: Any) -> list[DeadLetter]:
    """What is there, the lowest number first."""
    return list(graveyard(place).select(Selection(**which), 100))[::-1]


def ids(letters: Any) -> str:
    """Of which messages."""
    return "".join(each.message.id for each in letters)


class Graves:
    """A letter is kept once, as it was, until it is removed or has died again."""

    admissions = frozenset({Admission.BY_INBOX})

    def test_it_has_every_call(self, place: Place) -> None:
        yard = graveyard(place)
        assert isinstance(yard, Graveyard)
        yard.bury([])
        assert list(yard.select(EVERY, 10)) == []
        assert list(yard.gone([])) == list(yard.remove([])) == []
        assert dict(yard.count()) == {}

    def test_a_letter_is_as_it_was(self, place: Place) -> None:
        message = TOPIC.message(
            "grüße", source=SOURCE, id="one", key="k", headers={"tenant": "blue"}, time_ms=5
        )
        graveyard(place).bury([letter(message=message, error="ValueError: nö", replays=2)])
        [found] = kept(place)
        assert found.number > 0
        assert (found.subscription, found.error, found.attempts, found.dead_ms, found.replays) == (
            "sub", "ValueError: nö", 3, DIED_MS, 2,
        )  # fmt: skip
        got = found.message
        assert (got.topic, got.source, got.id, got.key, got.time_ms, got.body) == (
            "t", SOURCE, "one", "k", 5, "grüße".encode(),
        )  # fmt: skip
        assert dict(got.headers) == {"tenant": "blue"}

    def test_written_again_it_is_one(self, place: Place) -> None:
        """Who wrote it died before the broker was told."""
        yard = graveyard(place)
        yard.bury([letter(), letter("b", "two")])
        before = kept(place)
        yard.bury([letter(error="another", attempts=1), letter(), letter("c", "three")])
        assert kept(place)[:2] == before
        assert ids(kept(place)) == "onetwothree"

    def test_from_many_threads_too(self, place: Place) -> None:
        yard = graveyard(place)
        letters = [letter(f"{n}", f"{n}") for n in range(9)]
        together(*(lambda some=letters[:: 1 - 2 * (n % 2)]: yard.bury(some) for n in range(4)))
        assert sorted(ids(kept(place))) == [f"{n}" for n in range(9)]

    def test_another_body_or_consumer_is_another_letter(self, place: Place) -> None:
        yard = graveyard(place)
        yard.bury([letter("a"), letter("b")])
        yard.bury([letter("a", subscription="other")])
        found = [(each.subscription, each.message.body) for each in kept(place)]
        assert sorted(found) == [("other", b"a"), ("sub", b"a"), ("sub", b"b")]

    def test_one_that_died_again_takes_the_place_of_the_first(self, place: Place) -> None:
        yard = graveyard(place)
        yard.bury([letter(error="first")])
        yard.bury([letter(error="second", dead_ms=DIED_MS + 5, replays=1)])
        yard.bury([letter(error="late", replays=0)])
        assert [(each.error, each.replays, each.dead_ms) for each in kept(place)] == [
            ("second", 1, DIED_MS + 5)
        ]

    def test_what_is_removed_is_gone(self, place: Place) -> None:
        yard = graveyard(place)
        yard.bury([letter("a", "one"), letter("b", "two")])
        first, second = kept(place)
        assert list(yard.gone([first, second])) == []
        assert list(yard.remove([first])) == []
        assert list(yard.gone([first, second])) == [first]
        assert list(yard.remove([first, second])) == [first]
        assert kept(place) == []

    def test_what_died_again_is_not_removed_for_what_it_was(self, place: Place) -> None:
        yard = graveyard(place)
        yard.bury([letter()])
        [old] = kept(place)
        yard.bury([letter(error="again", replays=1)])
        assert list(yard.gone([old])) == list(yard.remove([old])) == [old]
        assert [each.error for each in kept(place)] == ["again"]

    def test_a_number_is_given_once(self, place: Place) -> None:
        yard = graveyard(place)
        yard.bury([letter("a", "one")])
        [first] = kept(place)
        yard.remove([first])
        yard.bury([letter("b", "two")])
        assert kept(place)[0].number > first.number
        assert list(yard.gone([first])) == [first]

    def test_which_are_meant(self, place: Place) -> None:
        yard = graveyard(place)
        other: Topic[Any] = Topic("other", str, guarantee="at-least-once")
        told = [("a", TOPIC, "ValueError: 100%"), ("b", other, "KeyError"), ("c", TOPIC, "Value_")]
        for age, (id, to, error) in enumerate(told):
            message = to.message(id, source=SOURCE, id=id)
            yard.bury([letter(message=message, error=error, dead_ms=DIED_MS + age)])
        second = kept(place)[1]

        def found(limit: int = 10, **which: Any) -> str:
            return ids(yard.select(Selection(**which), limit))

        assert (found(), found(2)) == ("cba", "cb")
        assert (found(consumer="sub"), found(consumer="su")) == ("cba", "")
        assert (found(topic="t"), found(topic="other"), found(id="b")) == ("ca", "b", "b")
        assert (found(error="Value"), found(error="0%"), found(error="e_")) == ("ca", "a", "c")
        assert (found(since_ms=DIED_MS + 1), found(before_ms=DIED_MS + 1)) == ("cb", "a")
        assert (found(below=second.number), found(id="' or 1=1 --")) == ("a", "")

    def test_they_are_counted(self, place: Place) -> None:
        yard = graveyard(place)
        yard.bury([letter("a", "one"), letter("b", "two"), letter(subscription="other")])
        assert dict(yard.count()) == {("other", "t"): 1, ("sub", "t"): 2}
        yard.remove(kept(place, consumer="other"))
        assert dict(yard.count()) == {("sub", "t"): 2}


class GravesDurably:
    """What is buried, or removed, is so when the call returns, whatever dies then."""

    admissions = frozenset({Admission.BY_INBOX})

    def test_a_letter_survives(self, place: Place) -> None:
        graveyard(place).bury([letter("a", "one"), letter("b", "two")])
        place.reopen()
        first, second = kept(place)
        assert (ids([first]), ids([second])) == ("one", "two")
        graveyard(place).remove([first])
        graveyard(place).bury([replace(second, replays=1)])
        place.reopen()
        assert [(each.message.id, each.replays) for each in kept(place)] == [("two", 1)]

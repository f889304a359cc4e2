"""What people ask a store that admits by inbox: when something took effect (`Remembering`), and
to forget it for a new life of its consumer (`Forgetting`).
"""

from __future__ import annotations

from typing import Any

import pytest

from duly.guarantees import Admission, Dead, Done, Settlement
from duly.inspection.steering import Forgetting
from duly.inspection.tracing import Remembering
from duly.message import now_ms
from duly.testing.conformance.areas.inbox import delivered, take_effect
from duly.testing.conformance.backend import SOURCE, Place, bodies


class Remembered:
    """When a message took effect, and for whom."""

    admissions = frozenset({Admission.BY_INBOX})

    def test_when_it_took_effect(self, place: Place) -> None:
        assert isinstance(place.store, Remembering)
        deliveries = delivered(place, place.backend.topic(), ("a", "one"), ("b", "two"))
        assert place.store.effect_ms("sub", "t", SOURCE, "one") is None
        take_effect(place, deliveries[:1])
        when_ms = place.store.effect_ms("sub", "t", SOURCE, "one")
        assert when_ms is not None
        assert abs(when_ms - now_ms()) < 60_000
        assert place.store.effect_ms("sub", "t", SOURCE, "two") is None

    def test_nobody_elses(self, place: Place) -> None:
        assert isinstance(place.store, Remembering)
        take_effect(place, delivered(place, place.backend.topic(), ("a", "one")))
        for asked in (
            ("another", "t", SOURCE, "one"),
            ("sub", "another", SOURCE, "one"),
            ("sub", "t", "another", "one"),
            ("sub", "t", SOURCE, "' or 1=1 --"),
        ):
            assert place.store.effect_ms(*asked) is None

    @pytest.mark.parametrize("how", ["rolled back", "dead"])
    def test_only_what_took_effect(self, place: Place, how: str) -> None:
        assert isinstance(place.store, Remembering)
        [delivery] = delivered(place, place.backend.topic(), ("a", "one"))
        session = place.begin()
        admitted = session.admit([delivery])
        ends: dict[str, Settlement] = {
            "rolled back": Done(delivery.receipt),
            "dead": Dead(delivery.receipt, "e"),
        }
        session.settle([ends[how]], admitted.fresh)
        if how == "dead":
            session.commit()
        session.rollback()
        assert place.store.effect_ms("sub", "t", SOURCE, "one") is None


class Forgotten:
    """A consumer's memory goes piece by piece, and nobody else's."""

    admissions = frozenset({Admission.BY_INBOX})

    def test_some_at_a_time_until_none_is_left(self, place: Place) -> None:
        store: Any = place.store
        assert isinstance(store, Forgetting)
        batch = delivered(place, place.backend.topic(), *((f"m{n}", f"m{n}") for n in range(5)))
        take_effect(place, batch)
        assert bodies(take_effect(place, batch).fresh) == []
        pieces = [store.forget("sub", 2) for _ in range(4)]
        assert (sum(pieces), max(pieces), pieces[-1]) == (5, 2, 0)
        assert take_effect(place, batch).fresh == batch

    def test_nobody_elses(self, place: Place) -> None:
        store: Any = place.store
        batch = delivered(place, place.backend.topic(), ("a", "one"))
        for consumer in ("sub", "another"):
            take_effect(place, batch, consumer=consumer)
        while store.forget("sub", 10):
            pass
        assert take_effect(place, batch, consumer="another").repeated == batch
        assert take_effect(place, batch).fresh == batch

    def test_what_was_given_up_on_too(self, place: Place) -> None:
        """Else the new life would find it dead before it ran."""
        store: Any = place.store
        [delivery] = delivered(place, place.backend.topic(), ("a", "one"))
        session = place.begin()
        admitted = session.admit([delivery])
        session.settle([Dead(delivery.receipt, "e")], admitted.fresh)
        session.commit()
        assert store.forget("sub", 10) == 1
        assert take_effect(place, [delivery]).fresh == [delivery]

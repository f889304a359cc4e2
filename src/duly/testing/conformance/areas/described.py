"""The page: what it says of a broker or a store is what that is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from duly.guarantees import Admission
from duly.testing.conformance.backend import Backend, Place
from duly.testing.conformance.page import Expected, as_toml, told_of


def check(expected: Expected, told: Mapping[str, Any]) -> None:
    """Hold a page's table against what the real thing says of itself."""
    differ = [
        f"{name}: the page says {expected.can.get(name, 'nothing')!r}, it says "
        f"{told.get(name, 'nothing')!r}"
        for name in sorted({*expected.can, *told})
        if expected.can.get(name) != told.get(name)
    ]
    assert not differ, (
        f"{expected.page} does not describe {expected.name}:\n  "
        + "\n  ".join(differ)
        + f"\nWhat it says of itself:\n{as_toml(expected.name, told)}"
    )


class Page:
    """What the page says of the broker is what the broker is."""

    def test_capabilities_are_as_the_page_says(self, backend: Backend) -> None:
        inspection = all(
            hasattr(backend.broker, call)
            for call in ("subscriptions", "dead_letters", "incidents", "incident_counts")
        )
        check(backend.expected, told_of(backend.can, inspection=inspection))

    def test_deviations_have_their_reasons(self, backend: Backend) -> None:
        assert all(
            isinstance(why, str) and len(why) > 20 for why in backend.expected.deviations.values()
        ), "say why the broker's nature forces it: a reader has to live with it"

    def test_another_broker_is_another_database(self, backend: Backend) -> None:
        """The contract tells by it whether one transaction can cover both."""
        first = backend.can.database
        if first is not None:
            assert first
            assert isinstance(first, str)
        if backend.can.durable:
            backend.restart()
            assert backend.can.database == first


class StorePage:
    """What the page says of the store is what the store is."""

    admissions = frozenset({Admission.BY_CURSOR, Admission.BY_INBOX})

    def test_capabilities_are_as_the_page_says(self, place: Place) -> None:
        check(place.backend.expected, told_of(place.store.capabilities))

    def test_a_store_apart_is_another_database(self, place: Place) -> None:
        assert place.store.capabilities.database != place.backend.can.database


class StorePageByClaim:
    """The store and the broker say that they are one database."""

    admissions = frozenset({Admission.BY_CLAIM})

    def test_it_is_the_brokers_database(self, place: Place) -> None:
        assert place.store.capabilities.database == place.backend.can.database

"""The page: what it says of a broker or a store is what that is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from duly.broker import Knows, NotesRepeats
from duly.guarantees import Admission
from duly.inspection.counting import Counting
from duly.inspection.erasing import Erasing
from duly.inspection.steering import Forgetting, Steering
from duly.inspection.survey import Surveys
from duly.inspection.tracing import Remembering, Tracing
from duly.schedules import Ticking
from duly.testing.conformance.backend import Backend, Place
from duly.testing.conformance.page import Expected, as_toml, told_of
from duly.testing.conformance.subject import BrokerSubject, StoreSubject

PROTOCOLS = {
    "inspection": ("subscriptions", "dead_letters", "incidents", "incident_counts"),
    "mending": ("select", "replay", "discard"),
    "observing": ("holders", "oldest"),
}
"""What a broker may have beside its own protocol, by the name that a page has for it."""


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


def check_operation(
    subject: BrokerSubject | StoreSubject, operation: type[Any], *, there: bool
) -> None:
    """Hold what a subject names against what there is."""
    named = operation in subject.operations
    assert there == named, (
        f"{operation.__name__} is{'' if named else ' not'} among the operations of the "
        f"subject {subject.name!r}, and it is otherwise"
    )


class Page:
    """What the page says of the broker is what the broker is."""

    def test_capabilities_are_as_the_page_says(self, backend: Backend) -> None:
        # By the calls that somebody would make, so that half a protocol is told in words.
        more = {
            name: all(hasattr(backend.broker, call) for call in calls)
            for name, calls in PROTOCOLS.items()
        }
        check(backend.expected, told_of(backend.can, **more))

    def test_operations_are_as_the_subject_says(self, backend: Backend) -> None:
        """What nobody names is not tested, and so not promised."""
        subject, lane = backend.subject, backend.lane(backend.topic())
        for operation in (Steering, Tracing, Erasing, Ticking, Counting, Surveys, Knows):
            check_operation(subject, operation, there=isinstance(backend.broker, operation))
        check_operation(subject, NotesRepeats, there=isinstance(lane, NotesRepeats))

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

    def test_operations_are_as_the_subject_says(self, place: Place) -> None:
        """What nobody names is not tested, and so not promised."""
        for operation in (Remembering, Forgetting):
            check_operation(place.subject, operation, there=isinstance(place.store, operation))

    def test_a_store_apart_is_another_database(self, place: Place) -> None:
        assert place.store.capabilities.database != place.backend.can.database


class StorePageByClaim:
    """The store and the broker say that they are one database."""

    admissions = frozenset({Admission.BY_CLAIM})

    def test_it_is_the_brokers_database(self, place: Place) -> None:
        assert place.store.capabilities.database == place.backend.can.database

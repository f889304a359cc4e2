"""`conformance`: from a subject and its page to classes of tests that pytest collects."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

from duly.errors import ConfigurationError
from duly.guarantees import Admission
from duly.testing.conformance.page import Expected, expected_on
from duly.testing.conformance.subject import BrokerSubject, Pairing, Site, StoreSubject

# Before any of it is imported: a failed assertion shows its values.
pytest.register_assert_rewrite("duly.testing.conformance.areas", "duly.testing.conformance.backend")

Area = type[Any]
"""A class of tests about one thing."""


def conformance(subject: BrokerSubject | StoreSubject, *, page: Path | str) -> type[Any]:
    """Every test of a broker or a store, as a class; assign it to a name that pytest collects.

    ``page`` is the docs page with the subject's capabilities and deviations in it. Which tests
    there are follows from the page: a capability adds its tests; where it is absent, others see
    that it is refused. Raises `ConfigurationError` where the page does not say enough.
    """
    if not isinstance(subject, BrokerSubject | StoreSubject):
        raise ConfigurationError(
            f"conformance({subject!r}): give a BrokerSubject or a StoreSubject, which say how "
            "yours is opened"
        )
    expected = expected_on(Path(page), subject.name)
    if isinstance(subject, BrokerSubject):
        areas = _of_broker(subject, expected)
    else:
        areas = _of_store(subject, expected)
    namespace: dict[str, Any] = {
        "__doc__": f"What {subject.name} keeps.",
        "__test__": True,
        **{area.__name__: area for area in areas},
    }
    return type(f"Test{subject.name.title().replace('-', '')}", (), namespace)


# --- which areas


def _of_broker(subject: BrokerSubject, expected: Expected) -> Iterator[Area]:
    from duly.testing.conformance.areas import brokers
    from duly.testing.conformance.memory import STORE_APART

    pairings = [Pairing(subject, STORE_APART, Admission.BY_INBOX)]
    if expected.can.get("is_log"):
        pairings.append(Pairing(subject, STORE_APART, Admission.BY_CURSOR))
    for area in brokers(subject, expected):
        yield _area(area, subject.name, expected, subject, pairings)


def _of_store(subject: StoreSubject, expected: Expected) -> Iterator[Area]:
    from duly.testing.conformance.areas import stores
    from duly.testing.conformance.memory import LOG, QUEUE

    pairings = [
        Pairing(LOG, subject, Admission.BY_CURSOR),
        Pairing(LOG, subject, Admission.BY_INBOX),
        Pairing(QUEUE, subject, Admission.BY_INBOX),
    ]
    if subject.broker is not None:
        pairings.insert(0, Pairing(subject.broker, subject, Admission.BY_CLAIM))
    for area in stores(subject, expected):
        yield _area(area, subject.name, expected, subject.broker, pairings)


def _area(
    area: Area,
    name: str,
    expected: Expected,
    broker: BrokerSubject | None,
    pairings: Sequence[Pairing],
) -> Area:
    """The area as a class of this subject's own, with the fixtures that its tests take."""
    for attribute, value in vars(area).items():
        if attribute.startswith("test_"):
            value.__test__ = True  # whatever an author's python_functions says
    suitable = [each for each in pairings if _suits(area, each, expected)]
    namespace: dict[str, Any] = {
        "__doc__": area.__doc__,
        "__test__": True,
        "conformance_subject": name,
        "place": _place(expected, suitable),
        "outboxed": _outboxed(expected, pairings),
    }
    if broker is not None:
        namespace["backend"] = _backend(expected, broker)
    return type(area.__name__, (area,), namespace)


def _suits(area: Area, pairing: Pairing, expected: Expected) -> bool:
    """Whether an area is about such a pairing: some are about one admission, or publish."""
    if pairing.admission not in getattr(area, "admissions", frozenset(Admission)):
        return False
    publishes = pairing.admission is Admission.BY_CLAIM or expected.can.get("outbox", True)
    return bool(publishes or not getattr(area, "publishes", False))


# --- fixtures


def _backend(expected: Expected, subject: BrokerSubject) -> Any:
    @pytest.fixture
    def backend(_: Any, tmp_path: Path) -> Iterator[Any]:
        from duly.testing.conformance.backend import backend_on

        site = _site(tmp_path, subject)
        with backend_on(subject, site, expected) as opened:
            yield opened

    return backend


def _place(expected: Expected, pairings: Sequence[Pairing]) -> Any:
    from duly.testing.conformance.backend import place_on

    return _paired("place", place_on, expected, pairings)


def _outboxed(expected: Expected, pairings: Sequence[Pairing]) -> Any:
    from duly.testing.conformance.backend import outboxed_on

    apart = [each for each in pairings if each.admission is Admission.BY_INBOX]
    return _paired("outboxed", outboxed_on, expected, apart[-1:])


def _paired(
    name: str,
    open_on: Callable[[Pairing, Site, Expected], AbstractContextManager[Any]],
    expected: Expected,
    pairings: Sequence[Pairing],
) -> Any:
    @pytest.fixture(name=name, params=pairings, ids=_ids(pairings))
    def opened(_: Any, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
        pairing: Pairing = request.param
        site = _site(tmp_path, pairing.broker)
        with open_on(pairing, site, expected) as opened:
            yield opened

    return opened


def _ids(pairings: Sequence[Pairing]) -> list[str]:
    """By admission; with the broker's name where that says too little."""
    names = [each.name for each in pairings]
    return [
        name if names.count(name) == 1 else f"{name}-{each.broker.name}"
        for name, each in zip(names, pairings, strict=True)
    ]


def _site(folder: Path, broker: BrokerSubject) -> Site:
    name = re.sub(r"[^a-z0-9]+", "_", folder.name.lower())
    # The whole path: another run of the same test is another place, on a server too.
    return Site(folder, f"{name[:31]}_{crc32(str(folder).encode()):08x}", broker.clock())

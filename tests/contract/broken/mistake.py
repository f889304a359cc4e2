"""One mistake: a coat, what it is put around, and who has to find it."""

from __future__ import annotations

from dataclasses import dataclass

from duly.testing.conformance import BrokerSubject, StoreSubject
from duly.testing.conformance.memory import DATABASE
from tests.contract.broken.coats import Coat


@dataclass(frozen=True)
class Mistake:
    """``fails`` are tests that have to fail, in one of their forms. ``says`` is something in
    the page and what stands there instead. ``stays``: a site opened again is the same object.
    """

    coat: type[Coat]
    fails: tuple[str, ...]
    around: BrokerSubject | StoreSubject = DATABASE
    page: str = "memory.md"
    says: tuple[str, str] = ("", "")
    stays: bool = False

    def name(self) -> str:
        """What is wrong, and where that is found first."""
        return f"{self.coat.__name__}_{self.fails[0].partition('::')[0]}"

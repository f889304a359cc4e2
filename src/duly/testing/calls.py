"""One call of the seam, and who makes it: see `duly.testing.seam`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from duly.store import Scope

Name = Literal[
    "publish",
    "claim",
    "made ahead",
    "settle",
    "extend",
    "close",
    "begin",
    "admit",
    "savepoint",
    "rollback to savepoint",
    "release savepoint",
    "publish in transaction",
    "settle in transaction",
    "commit",
    "rollback",
    "hold",
    "let go",
    "unsent",
    "sent",
    "refused",
]


@dataclass(slots=True)
class Call:
    """One call of the seam.

    ``given`` is what it was called with (messages, settlements, receipts, deliveries), ``on``
    the subscription or consumer, ``tx`` the transaction it belongs to. ``inner`` is what is
    wrapped, for faults that use it otherwise (end a lease, deliver twice). ``is_made``: a claim
    that was made with a settlement, and seen then as "made ahead", now has its answer taken.
    """

    name: Name
    given: Any = None
    on: str = ""
    tx: str = ""
    inner: Any = None
    scope: Scope | None = None
    is_made: bool = False


Around = Callable[[Call, Callable[[Any], Any]], Any]
"""Makes a call: ``around(call, perform)`` returns what ``perform(call.given)`` does, or not."""


def inside(outer: Around, inner: Around) -> Around:
    """Both: ``outer`` sees what ``inner`` makes of a call."""

    def around(call: Call, perform: Callable[[Any], Any]) -> Any:
        def deeper(given: Any) -> Any:
            call.given = given
            return inner(call, perform)

        return outer(call, deeper)

    return around

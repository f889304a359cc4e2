"""What the settings of a broker's server make of the promises: the contract reads it.

Capabilities say what a kind of broker can do. A server can be configured otherwise while it runs,
by people who do not read the application's code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Protocol, runtime_checkable

from duly.message import Topic


@dataclass(frozen=True, slots=True)
class Peril:
    """A setting by which the server may lose messages, and what to do about it.

    ``topic`` is None where every topic is affected, ``subscription`` where messages are in danger
    whoever consumes them.
    """

    topic: str | None
    subscription: str | None
    found: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Hold:
    """After ``longest_s`` the server takes a message back from whoever works on it.

    ``known``: it was read there, or somebody who knows said so. Otherwise it cannot be seen, and
    this is what servers do that nobody has configured. ``remedy``: how to make it longer.
    ``in_order_s``: so long a handler in order by key may run, where that is less, since what waits
    behind it is held as well. ``claim_s``: so long after its claim everything of it has to be
    settled, what waits for the handlers before it as well.
    """

    longest_s: float
    known: bool
    remedy: str
    in_order_s: float = inf
    claim_s: float = inf

    def run_s(self, *, in_order: bool) -> float:
        """How long a handler may run."""
        return min(self.longest_s, self.in_order_s) if in_order else self.longest_s


@dataclass(frozen=True, slots=True)
class Survey:
    """What was found. ``perils`` break a promise and are refused. ``limits`` weaken one, by what it
    takes for granted: that a disk lasts, that somebody comes within a day. ``seen`` and ``unseen``
    say in words what was looked at, and what was not and why.
    """

    perils: Sequence[Peril] = ()
    seen: Sequence[str] = ()
    unseen: Sequence[str] = ()
    hold: Hold | None = None
    limits: Sequence[Peril] = ()


@runtime_checkable
class Surveys(Protocol):
    """What a broker may do whose server can be configured against the promises."""

    def survey(
        self, topics: Sequence[Topic[Any]], subscriptions: Mapping[str, Sequence[str]]
    ) -> Survey:
        """Look at what these topics, and the subscriptions of topics by their names, have to
        fear. Changes nothing; they need not be there yet.

        Raises `ConfigurationError` where it is told how to look, and that is wrong. What cannot
        be looked at just now is among what was not.
        """
        ...

"""A broker and a store that misbehave, around any real ones, from a seed.

`Faults` decides for each call of the seam whether a fault hits it, and `make` what that means:
what is raised is always what the protocol allows for that call, so that whoever uses the seam
must cope with it. `FaultyBroker` and `FaultyStore` put both around what they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from random import Random
from typing import Any, Literal, get_args

from duly import errors
from duly.broker import Broker, Capabilities
from duly.errors import PublishFailed, PublishUnknown
from duly.store import Store
from duly.testing.seam import Call, Name, WrappedBroker, WrappedStore

Kind = Literal[
    "unavailable",
    "cut before",
    "cut after",
    "lose",
    "duplicate",
    "reorder",
    "expire",
    "pause",
]
"""What can be done to a call:

- ``unavailable``: it is not made, and that is certain
- ``cut before``, ``cut after``: its answer is lost, and it was not made, or was
- ``lose``: it is answered as if it had been made, and was not (a settlement, where the broker
  does not confirm them)
- ``duplicate``: what is published is stored twice
- ``reorder``: messages change places
- ``expire``: the lease of what is claimed ends at once
- ``pause``: nothing of this process goes on for a while
"""

KINDS: tuple[Kind, ...] = get_args(Kind)

_POSSIBLE: dict[Name, tuple[Kind, ...]] = {
    "publish": ("unavailable", "cut before", "cut after", "duplicate", "reorder", "pause"),
    "claim": ("unavailable", "cut after", "reorder", "expire", "pause"),
    "settle": ("unavailable", "cut before", "cut after", "lose", "pause"),
    "extend": ("unavailable", "cut before", "cut after", "expire"),
    "begin": ("unavailable", "pause"),
    "admit": ("cut before", "cut after", "pause"),
    "publish in transaction": ("cut before", "cut after", "pause"),
    "settle in transaction": ("cut before", "cut after", "pause"),
    "commit": ("unavailable", "cut before", "cut after", "pause"),
    "unsent": ("pause",),
    "sent": ("unavailable", "cut before", "cut after", "pause"),
    "refused": ("unavailable", "cut before", "cut after", "pause"),
}

_UNCONFIRMED: tuple[Kind, ...] = ("lose", "duplicate", "reorder")


def possible(call: Call, can: Capabilities) -> tuple[Kind, ...]:
    """The faults that this call may meet on a broker that promises what ``can`` says."""
    kinds: tuple[Kind, ...] = _POSSIBLE.get(call.name, ())
    if can.confirms_settlement:
        # Such a broker neither loses a settlement nor delivers twice or out of order.
        kinds = tuple(kind for kind in kinds if kind not in _UNCONFIRMED)
    return kinds


def make(
    kind: str,
    call: Call,
    perform: Callable[[Any], Any],
    random: Random,
    pause: Callable[[], None] = lambda: None,
) -> Any:
    """Make a call with a fault; returns or raises what the caller sees of it."""
    fault = _MAKERS.get(kind)
    if fault is None:
        raise ValueError(f"{kind!r} is no fault; there are {', '.join(KINDS)}")
    if kind == "pause":
        pause()
    return fault(call, perform, random)


Perform = Callable[[Any], Any]


def _refuse(call: Call, _perform: Perform, _random: Random) -> Any:
    why = f"a fault: {call.name} was refused"
    if call.name == "publish":
        return [PublishFailed(why, message_id=each.id) for each in call.given]
    if call.name == "commit":
        raise errors.TransactionFailed(why)
    raise errors.BrokerUnavailable(why)


def _cut(call: Call, _perform: Perform, _random: Random) -> Any:
    why = f"a fault: the answer to {call.name} was lost"
    match call.name:
        case "publish":
            return [PublishUnknown(why, message_id=each.id) for each in call.given]
        case "settle" | "commit" | "sent" | "refused":
            raise errors.CommitUnknown(why)
        case _:
            raise errors.BrokerError(why)


def _cut_after(call: Call, perform: Perform, random: Random) -> Any:
    perform(call.given)
    return _cut(call, perform, random)


def _lose(_call: Call, _perform: Perform, _random: Random) -> Any:
    return []


def _duplicate(call: Call, perform: Perform, _random: Random) -> Any:
    return perform([each for each in call.given for _ in (0, 1)])[::2]


def _perform(call: Call, perform: Perform, _random: Random) -> Any:
    return perform(call.given)


def _reorder(call: Call, perform: Perform, random: Random) -> Any:
    if call.name == "publish":
        places = list(range(len(call.given)))
        random.shuffle(places)
        outcomes = perform([call.given[place] for place in places])
        return [outcomes[places.index(place)] for place in range(len(places))]
    delivered = list(perform(call.given))
    random.shuffle(delivered)
    return delivered


def _expire(call: Call, perform: Perform, _random: Random) -> Any:
    answer = perform(call.given)
    if call.name == "claim":
        call.inner.extend([delivery.receipt for delivery in answer], 0.0)
    else:
        call.inner.extend(call.given, 0.0)
    return answer


_MAKERS: Mapping[str, Callable[[Call, Perform, Random], Any]] = {
    "unavailable": _refuse,
    "cut before": _cut,
    "cut after": _cut_after,
    "lose": _lose,
    "duplicate": _duplicate,
    "reorder": _reorder,
    "expire": _expire,
    "pause": _perform,
}


class Faults:
    """Faults from a seed: each call is hit with probability ``rate``, by one of ``kinds``.

    ``at`` hits the n-th call (1, 2, ...) with a kind of its own, or raises an exception there.
    ``pause`` is called to let a process stand still; without it nothing pauses. ``hits`` tells
    what happened: number of the call, its name, the kind.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        rate: float = 0.05,
        kinds: Collection[Kind] = KINDS,
        at: Mapping[int, Kind | BaseException] | None = None,
        pause: Callable[[], None] | None = None,
    ) -> None:
        self.hits: list[tuple[int, Name, str]] = []
        self._random = Random(seed)
        self._rate = rate
        self._kinds: set[Kind] = set(kinds) if pause is not None else set(kinds) - {"pause"}
        self._at = dict(at or {})
        self._pause = pause or (lambda: None)
        self._calls = 0
        self._can: Capabilities | None = None

    def meet(self, can: Capabilities) -> None:
        """Learn what the broker promises, and so which faults it may not show."""
        self._can = can

    def __call__(self, call: Call, perform: Callable[[Any], Any]) -> Any:
        self._calls += 1
        fault = self._at.get(self._calls) or self._draw(call)
        if fault is None:
            return perform(call.given)
        if isinstance(fault, BaseException):
            self.hits.append((self._calls, call.name, type(fault).__name__))
            raise fault
        self.hits.append((self._calls, call.name, fault))
        return make(fault, call, perform, self._random, self._pause)

    def _draw(self, call: Call) -> Kind | None:
        if self._random.random() >= self._rate:
            return None
        can = self._can or Capabilities(name="unknown")
        kinds: list[Kind] = [kind for kind in possible(call, can) if kind in self._kinds]
        return self._random.choice(kinds) if kinds else None


class FaultyBroker(WrappedBroker):
    """Any broker, with faults around it. See `duly.broker.Broker`."""

    def __init__(self, inner: Broker, faults: Faults) -> None:
        super().__init__(inner, faults)
        faults.meet(inner.capabilities)


class FaultyStore(WrappedStore):
    """Any store, with faults around it. See `duly.store.Store`."""

    def __init__(self, inner: Store, faults: Faults) -> None:
        super().__init__(inner, faults)

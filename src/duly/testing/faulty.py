"""A broker and a store that misbehave, around any real ones, from a seed.

`Faults` decides for each call of the seam whether a fault hits it, and `make` what that means:
what is raised is always what the protocol allows for that call, so that whoever uses the seam
must cope with it. `FaultyBroker` and `FaultyStore` put both around what they are given.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from random import Random
from typing import Any, Literal, get_args

from duly import errors
from duly.broker import Broker, Capabilities
from duly.errors import ConfigurationError, PublishFailed, PublishUnknown
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

Death = Literal["die before", "die after"]
"""The worker's process dies when it makes a call: before it is made, or with it made and its
answer never seen. Only who drives the worker can bring that about (`Faults.surrounded`)."""

DEATHS: tuple[Death, ...] = get_args(Death)

Where = int | tuple[Name, int]
"""The n-th call of all, or the n-th of a name."""

# Calls that only a worker makes. Who publishes may be the test itself, which must not die.
_WORKERS: frozenset[Name] = frozenset(
    {"claim", "settle", "extend", "begin", "admit", "settle in transaction", "commit"}
)


class NotHit(AssertionError):
    """A fault that was asked for by its call has not hit: the call was never made, or cannot go
    wrong in that way. What the test was to show it does not show.
    """


class Died(BaseException):
    """A worker's process died here. No except clause of the code under test catches it."""


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

    ``kinds`` are of `Kind`, and of `Death` where somebody drives the worker who can let it die.
    ``at`` hits the n-th call (1, 2, ...), or the n-th of a name (``("settle", 1)``), with a kind
    of its own, or raises an exception there. `check` raises `NotHit` where one of them has not
    hit; `running` calls it at its end.
    ``pause`` is called to let a process stand still; without it nothing pauses. After ``most``
    faults there are no more but those of ``at``.

    ``calls`` has the name of every call so far, and ``hits`` tells what happened: number of the
    call, its name, the kind. The same calls are hit alike by the same seed; calls of several
    threads come in no certain order.

    Kinds that were asked for and that the broker's promises rule out are refused with
    `ConfigurationError`, when it is met: a fault that can never hit proves nothing.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        rate: float = 0.05,
        kinds: Collection[Kind | Death] | None = None,
        at: Mapping[Where, Kind | Death | BaseException] | None = None,
        pause: Callable[[], None] | None = None,
        most: int | None = None,
    ) -> None:
        self.seed = seed
        self.calls: list[Name] = []
        self.hits: list[tuple[int, Name, str]] = []
        self._random = Random(seed)
        self._rate = rate
        self._asked = None if kinds is None else frozenset(kinds)
        self._kinds: frozenset[str] = frozenset(KINDS) if self._asked is None else self._asked
        self._at = dict(at or {})
        self._open = dict(self._at)
        self._pause = pause
        self._most = most
        self._dies = False
        self._healed = False
        self._can: Capabilities | None = None
        self._made: list[BaseException] = []
        self._mutex = threading.Lock()
        self._check_numbers()
        self._check_kinds()

    def surrounded(self, pause: Callable[[], None]) -> None:
        """Let somebody say how a process pauses, who also lets its worker die (`Died`)."""
        self._pause = self._pause or pause
        self._dies = True
        if self._asked is None:
            self._kinds = frozenset((*KINDS, *DEATHS))

    def meet(self, can: Capabilities) -> None:
        """Learn what the broker promises, and so which faults it may not show."""
        self._can = can
        self._check_kinds()

    def heal(self) -> None:
        """From here on there are no faults."""
        self._healed = True

    def check(self) -> None:
        """Raise `NotHit` for what ``at`` asked for and has not hit."""
        for where, fault in self._open.items():
            raise NotHit(
                f"the fault {fault!r} at {_shown(where)} has not hit: {self._why_not(where)}. "
                f"There were {len(self.calls)} calls: {_counted(self.calls)}"
            )

    def made(self, error: BaseException | None) -> bool:
        """Whether an exception, or what caused it, comes from a fault."""
        while error is not None:
            if any(error is mine for mine in self._made):
                return True
            error = error.__cause__ or error.__context__
        return False

    def __call__(self, call: Call, perform: Callable[[Any], Any]) -> Any:
        if call.name == "made ahead":
            return perform(call.given)  # part of the settlement, which is hit or is not
        with self._mutex:
            self.calls.append(call.name)
            fault = self._choose(call)
            if fault is not None:
                shown = fault if isinstance(fault, str) else type(fault).__name__
                self.hits.append((len(self.calls), call.name, shown))
        if fault is None:
            return perform(call.given)
        try:
            answer = self._bring_about(fault, call, perform)
        except BaseException as error:
            self._made.append(error)
            raise
        if call.name == "publish" and isinstance(answer, Sequence):
            self._made += [each for each in answer if isinstance(each, BaseException)]
        return answer

    def _bring_about(self, fault: str | BaseException, call: Call, perform: Perform) -> Any:
        if isinstance(fault, BaseException):
            raise fault
        if fault not in DEATHS:
            return make(fault, call, perform, self._random, self._pause or _stand)
        if fault == "die after":
            answer = perform(call.given)
            if call.name == "begin":
                answer.rollback()  # as the database does when it finds the process gone
        raise Died(f"a fault: the worker died at {call.name}")

    def _choose(self, call: Call) -> str | BaseException | None:
        if self._healed:
            return None
        given = self._given(call)
        if given is not None:
            return given
        over = self._most is not None and len(self.hits) >= self._most
        if over or self._random.random() >= self._rate:
            return None
        kinds = [kind for kind in self._possible(call) if kind in self._kinds]
        return self._random.choice(kinds) if kinds else None

    def _given(self, call: Call) -> str | BaseException | None:
        """What ``at`` has for this call, where the call can go wrong in that way."""
        places: tuple[Where, ...] = (len(self.calls), (call.name, self.calls.count(call.name)))
        for where in places if self._at else ():
            fault = self._at.get(where)
            if isinstance(fault, BaseException) or fault in DEATHS or fault in self._possible(call):
                self._open.pop(where, None)
                return fault
        return None

    def _why_not(self, where: Where) -> str:
        name, number = where if isinstance(where, tuple) else ("", where)
        made = [n for n, each in enumerate(self.calls) if not name or each == name]
        if len(made) < number:
            return "that call was never made"
        call = Call(self.calls[made[number - 1]])
        if self._at[where] == "pause" and not self._pause:
            return "nobody lets the process pause (Faults(pause=...))"
        can = self._can or Capabilities(name="unknown")
        there = ", ".join(possible(call, can)) or "nothing"
        return f"a {call.name!r} call cannot go wrong in that way, only by {there}"

    def _possible(self, call: Call) -> Sequence[str]:
        can = self._can or Capabilities(name="unknown")
        kinds = [kind for kind in possible(call, can) if kind != "pause" or self._pause]
        return [*kinds, *DEATHS] if self._dies and call.name in _WORKERS else kinds

    def _check_numbers(self) -> None:
        if not 0.0 <= self._rate <= 1.0:
            raise ConfigurationError(f"rate={self._rate!r}: a probability, 0.0 to 1.0")
        if self._most is not None and self._most < 0:
            raise ConfigurationError(f"most={self._most!r}: 0 or more faults, or None")
        for where in self._at:
            number = where[1] if isinstance(where, tuple) else where
            if number < 1:
                raise ConfigurationError(f"at={where!r}: calls are counted from 1 on")

    def _check_kinds(self) -> None:
        given = {each for each in self._at.values() if isinstance(each, str)} | self._kinds
        if unknown := given - {*KINDS, *DEATHS}:
            there = ", ".join((*KINDS, *DEATHS))
            raise ConfigurationError(f"{min(unknown)!r} is no fault; there are {there}")
        calls = {key[0] for key in self._at if isinstance(key, tuple)}
        if unknown_calls := calls - {*get_args(Name)}:
            there = ", ".join(get_args(Name))
            raise ConfigurationError(f"{min(unknown_calls)!r} is no call; there are {there}")
        for where, fault in self._at.items():
            self._check_place(where, fault)
        asked = {*(self._asked or ()), *(f for f in self._at.values() if isinstance(f, str))}
        if self._can is None or not self._can.confirms_settlement:
            return
        if never := asked & set(_UNCONFIRMED):
            raise ConfigurationError(
                f"the fault {min(never)!r} cannot hit: {self._can.name} confirms settlements, "
                "keeps messages in order and stores each once. Test with a broker that promises "
                'less (broker="memory://?kind=queue"), or with other faults: "expire" and '
                '"die after" make a message come twice on every broker.'
            )

    def _check_place(self, where: Where, fault: str | BaseException) -> None:
        if isinstance(where, int) or isinstance(fault, BaseException) or fault in DEATHS:
            return
        there = _POSSIBLE.get(where[0], ())
        if fault not in there:
            raise ConfigurationError(
                f"the fault {fault!r} cannot hit a {where[0]!r} call, only "
                f"{', '.join(there) or 'an exception'} can"
            )


def _shown(where: Where) -> str:
    return f"call {where}" if isinstance(where, int) else f"{where[0]!r} call {where[1]}"


def _counted(calls: Sequence[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in Counter(calls).items()) or "none"


def _stand() -> None:
    """Without anybody who lets a process stand still, it goes on."""


class FaultyBroker(WrappedBroker):
    """Any broker, with faults around it. See `duly.broker.Broker`."""

    def __init__(self, inner: Broker, faults: Faults) -> None:
        faults.meet(inner.capabilities)
        super().__init__(inner, faults)


class FaultyStore(WrappedStore):
    """Any store, with faults around it. See `duly.store.Store`."""

    def __init__(self, inner: Store, faults: Faults) -> None:
        super().__init__(inner, faults)

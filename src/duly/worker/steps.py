"""What a round yields, and the small values a lane works with."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Generator, Hashable, Iterator, Sequence
from dataclasses import dataclass
from random import random
from typing import Any, overload

import msgspec

from duly import events
from duly.broker import Delivery, Receipt, Span
from duly.errors import BrokerError
from duly.guarantees import Dead, Done, Retry, Settlement
from duly.stamps import Stamp
from duly.store import Declare
from duly.worker.permits import Permits


class Pause(msgspec.Struct, frozen=True, gc=False):
    """A round's wish to do nothing for so many seconds."""

    seconds: float


class Unfit(msgspec.Struct, frozen=True, gc=False):
    """Stands for the argument of a message that cannot be handled, and says why.

    ``wait_s``: this code cannot read it, and perhaps another can that looks after so many seconds.
    """

    why: str
    wait_s: float | None = None

    def settlement(self, receipt: Receipt) -> Settlement:
        """How such a message ends, without its handler."""
        if self.wait_s is None:
            return Dead(receipt, self.why)
        return Retry(receipt, self.wait_s, self.why, charged=False)


class Work(Sequence[tuple[Any, Any]]):
    """Claimed messages in order, each with what its handler is called with (or `Unfit`).

    Two sequences side by side, because ``deliveries`` may be a `Span`, of which no part is made
    that nobody looks at. For a batch handler an item may stand for several deliveries.
    ``plain``: there is no `Unfit` among the arguments that is known. ``decode``: see `BodyWork`.
    """

    __slots__ = ("arguments", "decode", "deliveries", "plain")

    def __init__(
        self, deliveries: Sequence[Any], arguments: list[Any], *, plain: bool = False
    ) -> None:
        self.deliveries = deliveries
        self.arguments = arguments
        self.plain = plain
        self.decode: Callable[[bytes], Any] | None = None

    def __len__(self) -> int:
        return len(self.arguments)

    @overload
    def __getitem__(self, index: int) -> tuple[Any, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Work: ...
    def __getitem__(self, index: int | slice) -> tuple[Any, Any] | Work:
        """One (delivery, argument), or some of them."""
        if isinstance(index, slice):
            return Work(self.deliveries[index], self.arguments[index], plain=self.plain)
        return self.deliveries[index], self.arguments[index]

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        """Each (delivery, argument)."""
        return zip(self.deliveries, self.arguments, strict=True)

    def then(self, later: Work) -> Work:
        """This work and more behind it."""
        if not later or not self:
            return self or later
        both = self.decoded(), later.decoded()
        deliveries = [delivery for work in both for delivery in work.deliveries]
        arguments = [argument for work in both for argument in work.arguments]
        return Work(deliveries, arguments, plain=self.plain and later.plain)

    def receipts(self) -> list[Receipt]:
        """The receipts that stand for all of it."""
        if isinstance(self.deliveries, Span):
            return [self.deliveries.receipt] if self.arguments else []
        return [delivery.receipt for delivery in self.deliveries]

    def only(self, wanted: Callable[[Any, Any], bool]) -> Work:
        """Those (delivery, argument) that are wanted."""
        kept = [item for item in self if wanted(*item)]
        deliveries, arguments = [d for d, _ in kept], [a for _, a in kept]
        return Work(deliveries, arguments, plain=self.plain)

    def fit(self) -> Work:
        """What a handler can be called with."""
        return self if self.plain else self.only(lambda _, argument: type(argument) is not Unfit)

    def decoded(self) -> Work:
        """The same, with all bodies decoded now."""
        return self

    def unfit(self, index: int) -> Unfit | None:
        """Why one cannot be handled, where that is known."""
        if self.plain:
            return None
        argument = self.arguments[index]
        return argument if isinstance(argument, Unfit) else None

    def found_unfit(self, index: int) -> bool:  # noqa: ARG002 - a `BodyWork` looks
        """Whether what raised was decoding it, and not its handler; `unfit` tells it then."""
        return False

    def callable_from(self, start: int, most: int) -> list[Any]:
        """The arguments from ``start`` to before the next `Unfit`, at most so many."""
        arguments = self.arguments[start : start + most]
        if not self.plain:
            for index, argument in enumerate(arguments):
                if argument.__class__ is Unfit:
                    return arguments[:index]
        return arguments

    def handled(self, start: int, stop: int) -> list[Settlement]:
        """The settlements of a part that was handled."""
        if isinstance(self.deliveries, Span):
            span = self.deliveries[start:stop]
            return [Done(span.receipt, len(span))] if span else []
        return [Done(delivery.receipt) for delivery in self.deliveries[start:stop]]

    def ended(self) -> list[Settlement]:
        """The settlements of all of it, handled or unfit."""
        if self.plain:
            return self.handled(0, len(self.arguments))
        return [
            argument.settlement(delivery.receipt)
            if argument.__class__ is Unfit
            else Done(delivery.receipt)
            for delivery, argument in self
        ]


class BodyWork(Work):
    """A span whose bodies are decoded when the handler is called: one by one, or for a batch
    handler all of them (`decoded`).

    Made one after the other and let go at once, payloads use the same memory again and again:
    half the cost of decoding a batch beforehand. Those of a batch do so from call to call.
    ``decode`` is the quick way, which raises whatever it likes; ``argument_of`` tells why, as an
    `Unfit`.
    """

    __slots__ = ("_argument_of", "_decode", "_span", "_unfit")

    def __init__(
        self, span: Span, decode: Callable[[bytes], Any], argument_of: Callable[[Delivery], Any]
    ) -> None:
        super().__init__(span, span.bodies, plain=True)
        self.decode = self._decode = decode
        self._span = span
        self._unfit: dict[int, Unfit] = {}
        self._argument_of = argument_of

    @overload
    def __getitem__(self, index: int) -> tuple[Any, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Work: ...
    def __getitem__(self, index: int | slice) -> tuple[Any, Any] | Work:
        """One (delivery, argument), or some of them."""
        if isinstance(index, slice):
            return BodyWork(self._span[index], self._decode, self._argument_of)
        delivery = self.deliveries[index]
        return delivery, self._argument_of(delivery)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        """Each (delivery, argument)."""
        return ((delivery, self._argument_of(delivery)) for delivery in self.deliveries)

    def decoded(self) -> Work:
        """The same, with all bodies decoded now."""
        try:
            payloads = [*map(self._decode, self.arguments)]
        except Exception:  # noqa: BLE001 - whatever a damaged body does: found one by one
            return Work([*self.deliveries], [self._argument_of(d) for d in self.deliveries])
        return Work(self.deliveries, payloads, plain=True)

    def unfit(self, index: int) -> Unfit | None:
        """Why one cannot be handled, where that was found."""
        return self._unfit.get(index)

    def found_unfit(self, index: int) -> bool:
        """Decode the one that raised again, to see whether that is the reason."""
        _, argument = self[index]
        if isinstance(argument, Unfit):
            self._unfit[index] = argument
        return index in self._unfit

    def callable_from(self, start: int, most: int) -> list[Any]:
        """The bodies from ``start`` on, at most so many. One that is `Unfit` raises only when
        it is decoded.
        """
        if not start and most >= len(self.arguments):
            return self.arguments
        return self.arguments[start : start + most]


NO_WORK = Work((), [], plain=True)


class Calls:
    """A round's wish to call the handler for ``work`` from index ``done`` on.

    It is fulfilled call by call, at most ``most`` of them, as long as the clock stands before
    ``until`` and there is no `Unfit`. ``extra`` follows each item's argument. ``done`` is moved
    along; when a call raises, it stands at the culprit.
    """

    __slots__ = ("done", "extra", "most", "until", "work")

    def __init__(
        self, work: Work, extra: tuple[Any, ...], until: float, most: int | None = None
    ) -> None:
        self.work = work
        self.extra = extra
        self.until = until
        self.most = len(work) if most is None else most
        self.done = 0


class HandlerFailed(Exception):
    """The handler failed where its failure is that of the whole transaction. Told from what the
    store raises, for a handler may raise the same.
    """


class BrokerFailed(BrokerError):
    """The store could not take what a handler published. Told from what the handler raises."""


class HandlerCancelled(Exception):
    """The handler was cancelled, and not by its worker: something inside it was, or its own task
    was from inside. That is a failure like any other.
    """

    def __init__(self) -> None:
        super().__init__(
            "asyncio.CancelledError left the handler, and its worker cancelled nothing: what it "
            "awaited was cancelled, or its own task, from inside. Catch it where it is expected"
        )


Step = Calls | Pause | None
"""Calls to make, a pause, or None: a boundary, after which anything may happen."""

Round = Generator[Step, None, None]

Failed = Callable[[Delivery, Exception], Settlement]


@dataclass(slots=True)
class Counts:
    """What a lane has done since it started, for progress lines and metrics."""

    claimed: int = 0
    handled: int = 0
    failed: int = 0
    dead: int = 0
    repeats: int = 0
    refused: int = 0
    commits: int = 0
    published: int = 0


@dataclass(slots=True)
class Surroundings:
    """What a lane needs from outside, each replaceable by a simulation.

    ``permits``: the rate limit on handler starts, where there is one.
    ``on_loop``: run a coroutine on the worker's loop and wait for it. ``one_call_a_step``: let
    each call of a handler be a step of its own, so that a simulation can come between two.
    ``declare``: see `duly.store.Declare`.
    """

    source: str
    clock: Callable[[], float] = time.monotonic
    roll: Callable[[], float] = random
    watchers: Sequence[events.Watcher] = ()
    wait_s: float = 0.25
    permits: Permits | None = None
    on_loop: Callable[[Awaitable[Any]], Any] | None = None
    one_call_a_step: bool = False
    declare: Declare | None = None
    stamps: Sequence[Stamp] = ()


class Blocked:
    """The groups (partitions or keys) behind a message that is to be retried.

    What follows such a message in its group is given back unstarted, or order would be lost.
    ``hold_on_dead``: also what follows a dead one.
    """

    __slots__ = ("_by", "_groups", "_hold_on_dead")

    def __init__(self, by: Callable[[Delivery], Hashable], hold_on_dead: bool) -> None:
        self._by = by
        self._hold_on_dead = hold_on_dead
        self._groups: set[Hashable] = set()

    def holds(self, delivery: Delivery) -> bool:
        """Whether this delivery must not start now."""
        return bool(self._groups) and self._by(delivery) in self._groups

    def holds_any(self) -> bool:
        """Whether anything must not start now."""
        return bool(self._groups)

    def hold_behind(self, delivery: Delivery) -> None:
        """What follows a delivery in its group must not start now."""
        if (group := self._by(delivery)) is not None:
            self._groups.add(group)

    def after(self, delivery: Delivery, settlement: Settlement) -> None:
        """Note how a delivery ended."""
        if isinstance(settlement, Retry) or (self._hold_on_dead and isinstance(settlement, Dead)):
            self.hold_behind(delivery)


def blocking(blocked: Blocked | None, delivery: Delivery, settlement: Settlement) -> Settlement:
    """A settlement, noted where there is an order to keep."""
    if blocked is not None:
        blocked.after(delivery, settlement)
    return settlement


def by_key(delivery: Delivery) -> Hashable:
    """The group in order by key; None for a message without a key, which has no order."""
    message = delivery.message
    return None if message.key is None else (message.topic, message.key)


def by_partition(delivery: Delivery) -> Hashable:
    """The group on a log that retries in place."""
    return None if delivery.position is None else delivery.position.log


def describe(error: BaseException, limit: int = 2000) -> str:
    """An exception in one bounded text, as kept with a retry or a dead letter.

    Never fails, whatever the exception does, and gives what a database can store: file names
    that are no text end up in exceptions too, and PostgreSQL's text holds no NUL.
    """
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - its own text fails
        text = "(its text cannot be shown)"
    text = f"{type(error).__name__}: {text}"[:limit]
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")

"""What happens at the seam, and in handlers, written into a history."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, assert_never, runtime_checkable

import msgspec

from duly import errors
from duly.broker import Delivery, Outcome, Published, Receipt, RepeatDropped
from duly.guarantees import Dead, Done, Release, Retry, Settlement
from duly.logs import CURRENT, handling_now
from duly.message import Message
from duly.store import Admitted
from duly.testing.history import (
    About,
    Admit,
    Claim,
    Commit,
    End,
    Event,
    How,
    Kind,
    Phase,
    Publish,
    Settle,
    Start,
    about,
    position_of,
)
from duly.testing.seam import Call

Sink = Callable[[Event], None]
Perform = Callable[[Any], Any]


# Of one process: it may have several recordings, under one name.
_askings = itertools.count(1)


def claimed(receipt: Receipt, who: str) -> str:
    """What the history calls the claim of a process. With its name, for a broker's receipts may be
    wrong: where two claims had the same one, nobody could see that one was taken from the other.
    """
    return f"{receipt!r} {who}"


class Recording:
    """An `Around` that records what process ``who`` does, and what it is told.

    ``clock`` gives seconds, one clock for the whole history. What a process does after it
    ``is_dead`` has not happened.
    """

    def __init__(
        self,
        sink: Sink,
        clock: Callable[[], float],
        who: str,
        is_dead: Callable[[], bool] = bool,
    ) -> None:
        self._sink = sink
        self._clock = clock
        self._who = who
        self._is_dead = is_dead
        self._runs = itertools.count(1)
        self._since_savepoint: list[About] = []
        self._committing: set[str] = set()
        self._tx = ""
        self._began = 0.0

    def __call__(self, call: Call, perform: Perform) -> Any:
        if call.is_made:
            return perform(call.given)  # recorded when it was made
        record = _BY_NAME.get(call.name)
        return perform(call.given) if record is None else record(self, call, perform)

    def put(self, make: Callable[..., Event], *args: Any, **more: Any) -> None:
        """Record an event of this process, now."""
        if not self._is_dead():
            self._sink(make(self._clock(), self._who, *args, **more))

    # --- publishing

    def _publish(self, call: Call, perform: Perform) -> Any:
        published = [about(message) for message in call.given]
        for message in published:
            self.put(Publish, "invoke", message)
        outcomes: Sequence[Outcome] = perform(call.given)
        for message, outcome in zip(published, outcomes, strict=True):
            self._published(message, outcome)
        return outcomes

    def _published(self, message: About, outcome: Outcome) -> None:
        match outcome:
            case Published():
                self.put(Publish, "ok", message)
            case RepeatDropped():
                self.put(Publish, "ok", message, repeat=True)
            case errors.PublishFailed():
                self.put(Publish, "fail", message, why=str(outcome))
            case errors.PublishUnknown():
                self.put(Publish, "info", message, why=str(outcome))
            case _:
                assert_never(outcome)

    def _publish_within(self, call: Call, perform: Perform) -> Any:
        published = [about(message) for message in call.given]
        for message in published:
            self.put(Publish, "invoke", message, call.tx)
        self._since_savepoint += published
        outcomes: Sequence[Outcome] = perform(call.given)
        for message, outcome in zip(published, outcomes, strict=True):
            if isinstance(outcome, errors.PublishFailed):
                self.put(Publish, "fail", message, call.tx, why=str(outcome))
            elif isinstance(outcome, RepeatDropped):
                self.put(Publish, "ok", message, call.tx, repeat=True)
        return outcomes

    # --- claims

    def _claim(self, call: Call, perform: Perform) -> Any:
        asking = next(_askings)
        self.put(Claim, "invoke", call.on, asking=asking)
        try:
            deliveries: Sequence[Delivery] = perform(call.given)
        except errors.BrokerUnavailable:
            self.put(Claim, "fail", call.on)
            raise
        except errors.BrokerError:
            self.put(Claim, "info", call.on)
            raise
        for each in deliveries:
            self.put(
                Claim,
                "ok",
                call.on,
                claimed(each.receipt, self._who),
                about(each.message),
                each.attempt,
                each.repeated,
                each.alone,
                position_of(each),
                asking,
            )
        return deliveries

    def _settle(self, call: Call, perform: Perform) -> Any:
        settlements: Sequence[Settlement] = call.given
        self._each(call, "invoke", settlements)
        try:
            refused = perform(call.given)
        except errors.BrokerUnavailable:
            self._each(call, "fail", settlements)
            raise
        except (errors.BrokerError, errors.CommitUnknown):
            self._each(call, "info", settlements)
            raise
        lost = set(refused)
        self._each(call, "ok", [each for each in settlements if each.receipt not in lost])
        self._each(call, "fail", [each for each in settlements if each.receipt in lost], True)
        return refused

    def _each(
        self, call: Call, phase: Phase, settlements: Sequence[Settlement], refused: bool = False
    ) -> None:
        for each in settlements:
            token = claimed(each.receipt, self._who)
            self.put(Settle, phase, call.on, token, kind_of(each), call.tx, refused)

    # --- transactions

    def _begin(self, call: Call, perform: Perform) -> Any:
        self._began = self._clock()
        session = perform(call.given)
        self._tx = call.tx
        self._since_savepoint = []
        return session

    def _admit(self, call: Call, perform: Perform) -> Any:
        admitted: Admitted = perform(call.given)
        self.put(
            Admit,
            call.tx,
            call.on,
            "" if call.scope is None else str(call.scope.admission),
            tuple(claimed(each.receipt, self._who) for each in admitted.fresh),
            tuple(claimed(each.receipt, self._who) for each in admitted.repeated),
            tuple(
                claimed(e.receipt, self._who) for e in [*admitted.conflicting, *admitted.too_old]
            ),
            self._began,
        )
        return admitted

    def _savepoint(self, call: Call, perform: Perform) -> Any:
        self._since_savepoint = []
        return perform(call.given)

    def _rollback_to_savepoint(self, call: Call, perform: Perform) -> Any:
        perform(call.given)
        for message in self._since_savepoint:
            self.put(Publish, "fail", message, call.tx, why="rolled back to the savepoint")
        self._since_savepoint = []

    def _settle_within(self, call: Call, perform: Perform) -> Any:
        self._each(call, "invoke", call.given)
        return perform(call.given)

    def _commit(self, call: Call, perform: Perform) -> Any:
        self._committing.add(call.tx)
        self.put(Commit, "invoke", call.tx)
        try:
            perform(call.given)
        except errors.CommitUnknown:
            self.put(Commit, "info", call.tx)
            raise
        except (errors.TransactionFailed, errors.Superseded):
            self.put(Commit, "fail", call.tx)
            raise
        self.put(Commit, "ok", call.tx)
        self._tx = ""

    def _rollback(self, call: Call, perform: Perform) -> Any:
        perform(call.given)
        if call.tx not in self._committing:
            self.put(Commit, "fail", call.tx)
        self._tx = ""

    # --- handlers

    def handler(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The handler, its runs recorded. It finds the numbers of its runs in `runs`."""

        def recorded(*arguments: Any) -> Any:
            with self._run():
                return call(*arguments)

        return recorded

    def async_handler(self, call: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        """As `handler`; where several are under way, `runs` are its own until it first awaits."""

        async def recorded(*arguments: Any) -> Any:
            with self._run():
                return await call(*arguments)

        return recorded

    @contextmanager
    def _run(self) -> Iterator[None]:
        self._start()
        how: How = "raised"
        runs = self.runs
        try:
            yield
            how = "returned"
        except asyncio.CancelledError:
            how = how_cancelled()
            raise
        except Exception:
            raise
        except BaseException:
            how = "killed"
            raise
        finally:
            for run in runs:
                self.put(End, run, how)

    def _start(self) -> None:
        handling = CURRENT.get()
        assert handling is not None, "a handler runs in a lane"
        name, given = handling_now(handling)
        deliveries: Sequence[Delivery] = (given,) if isinstance(given, Delivery) else given
        self.messages = [each.message for each in deliveries]
        self.runs = [f"{self._who}.{next(self._runs)}" for _ in deliveries]
        for run, each in zip(self.runs, deliveries, strict=True):
            self.put(
                Start,
                name,
                claimed(each.receipt, self._who),
                about(each.message),
                run,
                each.attempt,
                self._tx,
            )

    runs: Sequence[str] = ()
    """The runs of the handler call that was started last, and the messages they are for."""
    messages: Sequence[Message[Any]] = ()


def how_cancelled() -> How:
    """How a run ended that asyncio.CancelledError left: cancelled where somebody cancelled its
    task, raised where it comes from inside.
    """
    try:
        task = asyncio.current_task()
    except RuntimeError:  # a `def` handler's thread has no loop
        return "raised"
    return "cancelled" if task is not None and task.cancelling() else "raised"


def kind_of(settlement: Settlement) -> Kind:
    """How a settlement says that a delivery ended."""
    match settlement:
        case Done():
            return "done"
        case Retry():
            return "retry"
        case Dead():
            return "dead"
        case Release():
            return "release"
        case _:
            assert_never(settlement)


@runtime_checkable
class ReceiptOfMany(Protocol):
    """A receipt of a whole span that knows those of its messages."""

    def each(self) -> Sequence[Receipt]:
        """The receipt of each message."""
        ...


def message_by_message(settlements: Sequence[Settlement]) -> list[Settlement]:
    """Settlements of whole spans, as those of their messages."""
    single: list[Settlement] = []
    for each in settlements:
        if isinstance(each.receipt, tuple) and len(each.receipt) == 3:
            token, first, last = each.receipt
            single += [
                msgspec.structs.replace(each, receipt=(token, position))
                for position in range(first, last + 1)
            ]
        elif isinstance(each.receipt, ReceiptOfMany):
            single += [msgspec.structs.replace(each, receipt=one) for one in each.receipt.each()]
        else:
            single.append(each)
    return single


_BY_NAME: dict[str, Callable[[Recording, Call, Perform], Any]] = {
    "publish": Recording._publish,
    "claim": Recording._claim,
    "made ahead": Recording._claim,
    "settle": Recording._settle,
    "begin": Recording._begin,
    "admit": Recording._admit,
    "savepoint": Recording._savepoint,
    "rollback to savepoint": Recording._rollback_to_savepoint,
    "publish in transaction": Recording._publish_within,
    "settle in transaction": Recording._settle_within,
    "commit": Recording._commit,
    "rollback": Recording._rollback,
}

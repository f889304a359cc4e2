"""Making the calls a round asks for: in order, on the lane's thread or the worker's loop."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterable, Iterator
from math import inf
from typing import Any, cast

from duly import events
from duly.broker import Delivery, Receipt
from duly.consumer import Consumer
from duly.handlers import refuse_unrun
from duly.logs import CURRENT, InTurn, OneOf
from duly.publishing import IN_TRANSACTION
from duly.store import SeesSavepoints, Session
from duly.worker.loop import TimeLimit, shake_off
from duly.worker.steps import Calls, HandlerCancelled, Pause, Round, Step, Surroundings


@functools.cache
def _sees_savepoints(kind: type) -> bool:
    # Looking whether an object has a protocol's methods takes as long as a statement on SQLite.
    return issubclass(kind, SeesSavepoints)


class Caller:
    """Calls one consumer's handler for a lane.

    ``moment`` is the clock as last read, once a call: where one call ends the next begins.
    """

    def __init__(
        self,
        consumer: Consumer,
        call: Callable[..., Any],
        around: Surroundings,
        inside: str | None,
    ) -> None:
        self.call = call
        self.stopping = False
        # What another has by now of that which is claimed here, as far as is known; and whether
        # nobody has looked yet which of what comes next is among it.
        self.lost: frozenset[Receipt] = frozenset()
        self.leases_lost = False
        # Whether the worker cancels what still runs: only then is a cancellation not the handler's.
        self.abandoned = False
        self.moment = 0.0
        self._consumer = consumer
        self._limit = TimeLimit(consumer.options.max_run_s)
        self._around = around
        # The database whose transaction is open around the calls: `app.publish` to it would wait
        # for that transaction, and so for itself.
        self._inside = inside
        # Whether the round comes back to the lane's thread after each run of calls on the loop:
        # its transaction is on the loop too, and the thread waits for each of its statements.
        self.only_calls_on_loop = False
        self._calling = False
        self._until = inf
        # Savepoints of the handler in the transaction under way: whether the last run of calls
        # ended behind one that may be open still, whether one was seen, and who can tell.
        self.savepoint_left = False
        self._saw_savepoint = False
        self._session: SeesSavepoints | None = None
        self._left: Calls | None = None

    def stop(self) -> None:
        """From any thread: start no further call, except of messages that nothing will bring
        back.
        """
        self.stopping = True
        if self._until != inf:
            self._until = -inf

    def lose(self, receipts: Iterable[Receipt]) -> None:
        """From any thread: these are another's by now; look before the next call."""
        self.lost, self.leases_lost = frozenset(receipts), True
        if self._until != inf:
            self._until = -inf

    def watch_savepoints(self, session: Session[Any]) -> None:
        """In this transaction: start no further call behind one that may leave a savepoint."""
        self.savepoint_left = self._saw_savepoint = False
        if _sees_savepoints(type(session)):
            self._session = cast(SeesSavepoints, session)
            self._session.watch_savepoints(self._see_savepoint)
        else:
            self._session = None

    def over(self, until: float) -> bool:
        """Whether no further call belongs to what was begun: its time is up, what would come next
        may be another's, or a savepoint that the last one left reaches into those after it.
        """
        return self.moment >= until or self.leases_lost or self.savepoint_left

    def _see_savepoint(self) -> None:
        # In the middle of a call, behind which its run of calls ends, to look for what it left.
        self._saw_savepoint = True
        self._until = -inf

    def _look_for_savepoint(self) -> bool:
        self._saw_savepoint = False
        assert self._session is not None, "it has seen one"
        self.savepoint_left = self._session.savepoints_left()
        return self.savepoint_left

    def abandon(self) -> None:
        """From any thread, before what still runs is cancelled: that is no handler's failure."""
        self.abandoned = True

    async def await_one(self, argument: Any, *extra: Any) -> None:
        """Await the handler once, for `max_run_s` at most. On the loop.

        A cancellation from inside, of what it awaits or of the task it runs in, is its own
        failure: `HandlerCancelled`. As asyncio.CancelledError passes the worker's alone.
        """
        task = asyncio.current_task()
        assert task is not None, "coroutines run in tasks"
        try:
            returned = await self._limit.keep(self.call(argument, *extra), task)
            if returned is not None:
                refuse_unrun(returned)
        except asyncio.CancelledError as error:
            if self.abandoned and task.cancelling():
                raise
            raise HandlerCancelled from error
        finally:
            if task.cancelling() and not self.abandoned:
                await shake_off(task)

    def advance(self, round_: Round) -> Pause | None:
        """Run a round to its next boundary or pause. StopIteration: it has ended."""
        step, self._left = self._left or next(round_), None
        if not isinstance(step, Calls):
            return step
        if not self._consumer.handler.is_async:
            return self._call(round_, step)
        assert self._around.on_loop is not None, "an async handler needs the worker's loop"
        if self.only_calls_on_loop:
            return self._call_apart(round_, step)
        answer = self._around.on_loop(self._call_on_loop(round_, step))
        if isinstance(answer, BaseException):
            raise answer
        return answer  # type: ignore[no-any-return]

    def forget(self) -> None:
        """The round is over, and with it what was left to call."""
        self._left = None

    def oldest_start(self) -> float | None:
        """The clock's time at which the call now under way began; None between rounds."""
        return self.moment if self._calling else None

    def _call(self, round_: Round, step: Step) -> Pause | None:
        handling = InTurn(self._consumer.name)
        CURRENT.set(handling)
        IN_TRANSACTION.set(self._inside)
        self.moment, self._calling = self._around.clock(), True
        try:
            while isinstance(step, Calls):
                begun = step.done, self.moment
                try:
                    self._call_in_turn(step, handling)
                except Exception as error:  # noqa: BLE001 - it belongs to the round
                    self.moment = self._around.clock()
                    self._tell_handled(step, begun)
                    step = round_.throw(error)
                else:
                    self._tell_handled(step, begun)
                    step = round_.send(None)
                if self._around.one_call_a_step and isinstance(step, Calls):
                    self._left = step
                    return None
        finally:
            self._calling = False
            CURRENT.set(None)
            IN_TRANSACTION.set(None)
        return step

    def _call_in_turn(self, calls: Calls, handling: InTurn) -> None:
        work, done = calls.work, calls.done
        given = work.callable_from(done, 1 if self._around.one_call_a_step else calls.most)
        source = handling.begin(work.deliveries, given, done)
        self._until = calls.until
        if (self.stopping or self.leases_lost) and calls.until != inf:
            self._until = -inf
        try:
            if work.decode is None:
                self._call_each(source, *calls.extra)
            else:
                self._decode_and_call_each(source, work.decode, *calls.extra)
        except asyncio.CancelledError as error:
            # Nobody cancels a thread: this comes from the handler.
            calls.done = handling.index
            raise HandlerCancelled from error
        except BaseException:
            calls.done = handling.index
            raise
        calls.done = handling.index + 1
        if self._saw_savepoint:
            self._look_for_savepoint()

    def _call_each(self, arguments: Iterator[Any], *extra: Any) -> None:
        call, clock = self.call, self._around.clock
        for argument in arguments:
            if (returned := call(argument, *extra)) is not None:
                refuse_unrun(returned)
            self.moment = now = clock()
            if now >= self._until:
                break

    def _decode_and_call_each(
        self, bodies: Iterator[bytes], decode: Callable[[bytes], Any], *extra: Any
    ) -> None:
        """Everything a message costs beside its handler is in these loops. A payload is let go
        at once, so that the next one finds its memory warm.
        """
        call, clock = self.call, self._around.clock
        if extra:
            [tx] = extra
            for body in bodies:
                if (returned := call(decode(body), tx)) is not None:
                    refuse_unrun(returned)
                self.moment = now = clock()
                if now >= self._until:
                    break
        else:
            for body in bodies:
                if (returned := call(decode(body))) is not None:
                    refuse_unrun(returned)
                self.moment = now = clock()
                if now >= self._until:
                    break

    def _tell_handled(self, calls: Calls, begun: tuple[int, float]) -> None:
        """Show what calls returned since ``begun``: an index and the clock."""
        if self._around.watchers:
            start, began = begun
            some = calls.work.deliveries[start : calls.done]
            count = len(some)
            if self._consumer.handler.is_batch:  # one call may stand for several messages
                count = sum(1 if isinstance(each, Delivery) else len(each) for each in some)
            seen = events.Handled(self._consumer.name, count, self.moment - began)
            events.tell(self._around.watchers, seen)

    async def _call_on_loop(self, round_: Round, step: Step) -> Pause | BaseException | None:
        # What ends the lane is returned, not raised: StopIteration cannot leave a coroutine,
        # and SystemExit would end the loop with everything else on it.
        IN_TRANSACTION.set(self._inside)
        self.moment, self._calling = self._around.clock(), True
        try:
            while isinstance(step, Calls):
                begun = step.done, self.moment
                try:
                    await self._await_in_turn(step)
                except Exception as error:  # noqa: BLE001 - it belongs to the round
                    self.moment = self._around.clock()
                    self._tell_handled(step, begun)
                    step = round_.throw(error)
                else:
                    self._tell_handled(step, begun)
                    step = round_.send(None)
        except asyncio.CancelledError as error:
            round_.close()
            return error
        except BaseException as error:  # noqa: BLE001
            return error
        finally:
            self._calling = False
        return step

    def _call_apart(self, round_: Round, step: Step) -> Pause | None:
        """Only the calls on the loop; everything between them on this thread."""
        assert self._around.on_loop is not None, "advance has seen it"
        while isinstance(step, Calls):
            error = self._around.on_loop(self._outcome_on_loop(step))
            if error is None:
                step = round_.send(None)
            elif isinstance(error, Exception):
                step = round_.throw(error)
            else:
                raise error
        return step

    async def _outcome_on_loop(self, calls: Calls) -> BaseException | None:
        """What the calls raised, as a value: see `_call_on_loop`."""
        IN_TRANSACTION.set(self._inside)
        self.moment, self._calling = self._around.clock(), True
        try:
            await self._await_in_turn(calls)
        except BaseException as error:  # noqa: BLE001
            self.moment = self._around.clock()
            return error
        finally:
            self._calling = False
        return None

    async def _await_in_turn(self, calls: Calls) -> None:
        name, work = self._consumer.name, calls.work
        with self._limit.held():
            for given in work.callable_from(calls.done, calls.most):
                CURRENT.set(OneOf(name, work.deliveries, calls.done))
                argument = given if work.decode is None else work.decode(given)
                await self.await_one(argument, *calls.extra)
                calls.done += 1
                self.moment = self._around.clock()
                cut_short = self.stopping or self.leases_lost
                if self.moment >= calls.until or (cut_short and calls.until != inf):
                    break
                if self._saw_savepoint and self._look_for_savepoint():
                    break

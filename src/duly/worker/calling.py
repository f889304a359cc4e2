"""Making the calls a round asks for: in order, on the lane's thread or the worker's loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from math import inf
from typing import Any

from duly.consumer import Consumer
from duly.guarantees import Guarantee
from duly.logs import CURRENT, InTurn
from duly.publishing import IN_TRANSACTION
from duly.worker.loop import within_limit
from duly.worker.steps import Calls, HandlerCancelled, Pause, Round, Step, Surroundings


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
        self.moment = 0.0
        self._consumer = consumer
        self._around = around
        # The database whose transaction is open around the calls: `app.publish` to it would wait
        # for that transaction, and so for itself.
        self._inside = inside
        self._calling = False
        self._until = inf
        self._left: Calls | None = None

    def stop(self) -> None:
        """From any thread: start no further call, except of messages that nothing will bring
        back.
        """
        self.stopping = True
        if self._until != inf:
            self._until = -inf

    def advance(self, round_: Round) -> Pause | None:
        """Run a round to its next boundary or pause. StopIteration: it has ended."""
        step, self._left = self._left or next(round_), None
        if not isinstance(step, Calls):
            return step
        if not self._consumer.handler.is_async:
            return self._call(round_, step)
        assert self._around.on_loop is not None, "an async handler needs the worker's loop"
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
                try:
                    self._call_in_turn(step, handling)
                except Exception as error:  # noqa: BLE001 - it belongs to the round
                    self.moment = self._around.clock()
                    step = round_.throw(error)
                else:
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
        if self.stopping and calls.until != inf:
            self._until = -inf
        try:
            if work.decode is None:
                self._call_each(source, *calls.extra)
            else:
                self._decode_and_call_each(source, work.decode, *calls.extra)
        except asyncio.CancelledError as error:
            calls.done = handling.index
            self._go_on_if_settled(error)
            raise
        except BaseException:
            calls.done = handling.index
            raise
        calls.done = handling.index + 1

    def _call_each(self, arguments: Iterator[Any], *extra: Any) -> None:
        call, clock = self.call, self._around.clock
        for argument in arguments:
            call(argument, *extra)
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
                call(decode(body), tx)
                self.moment = now = clock()
                if now >= self._until:
                    break
        else:
            for body in bodies:
                call(decode(body))
                self.moment = now = clock()
                if now >= self._until:
                    break

    def _go_on_if_settled(self, error: asyncio.CancelledError) -> None:
        """At-most-once: what is settled already has no other chance, so this is a failure like
        any other, and the next messages run.
        """
        if self._consumer.guarantee is Guarantee.AT_MOST_ONCE:
            raise HandlerCancelled("the handler was cancelled") from error

    async def _call_on_loop(self, round_: Round, step: Step) -> Pause | BaseException | None:
        # What ends the lane is returned, not raised: StopIteration cannot leave a coroutine,
        # and SystemExit would end the loop with everything else on it.
        IN_TRANSACTION.set(self._inside)
        self.moment, self._calling = self._around.clock(), True
        try:
            while isinstance(step, Calls):
                try:
                    await self._await_in_turn(step)
                except Exception as error:  # noqa: BLE001 - it belongs to the round
                    self.moment = self._around.clock()
                    step = round_.throw(error)
                else:
                    step = round_.send(None)
        except asyncio.CancelledError as error:
            round_.close()
            return error
        except BaseException as error:  # noqa: BLE001
            return error
        finally:
            self._calling = False
        return step

    async def _await_in_turn(self, calls: Calls) -> None:
        name, limit_s = self._consumer.name, self._consumer.options.max_run_s
        work = calls.work
        for given in work.callable_from(calls.done, calls.most):
            CURRENT.set((name, work.deliveries[calls.done]))
            argument = given if work.decode is None else work.decode(given)
            try:
                await within_limit(self.call(argument, *calls.extra), limit_s)
            except asyncio.CancelledError as error:
                task = asyncio.current_task()
                if task is None or not task.cancelling():  # not this worker's end
                    self._go_on_if_settled(error)
                raise
            calls.done += 1
            self.moment = self._around.clock()
            if self.moment >= calls.until or (self.stopping and calls.until != inf):
                break

"""Making the calls a round asks for: in order, on the lane's thread or the worker's loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from math import inf
from typing import Any

from duly.consumer import Consumer
from duly.guarantees import Guarantee
from duly.logs import CURRENT
from duly.publishing import IN_TRANSACTION
from duly.worker.loop import within_limit
from duly.worker.steps import Calls, HandlerCancelled, Pause, Round, Step, Surroundings


class Caller:
    """Calls one consumer's handler for a lane.

    ``moment`` is the clock as last read, once a call: where one call ends the next begins.
    ``stopping`` may be set from any thread: no further call starts, except those of messages
    that nothing will bring back.
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
        self._left: Calls | None = None

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
        # One list changed for each message: a third of the cost of setting the variable.
        handling: list[Any] = [self._consumer.name, (), 0]
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

    def _call_in_turn(self, calls: Calls, handling: list[Any]) -> None:
        """Everything a call costs beside the handler is in this loop."""
        call, clock, extra, until = self.call, self._around.clock, calls.extra, calls.until
        most = 1 if self._around.one_call_a_step else calls.most
        done = calls.done
        handling[1] = calls.work.deliveries
        try:
            for argument in calls.work.callable_from(done, most):
                handling[2] = done
                call(argument, *extra)
                done += 1
                self.moment = now = clock()
                if now >= until or (self.stopping and until != inf):
                    break
        except asyncio.CancelledError as error:
            self._go_on_if_settled(error)
            raise
        finally:
            calls.done = done

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
        for argument in calls.work.callable_from(calls.done, calls.most):
            CURRENT.set((name, calls.work.deliveries[calls.done]))
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

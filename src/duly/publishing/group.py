"""Publishes of one event loop, combined: callers that wait together share one commit."""

from __future__ import annotations

import asyncio
import contextlib
import copy
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any

from duly.broker import Outcome
from duly.message import Message
from duly.publishing.direct import PORTION_BYTES, PORTION_MESSAGES

Entry = tuple[Message[Any], "asyncio.Future[Outcome]"]


class GroupPublish:
    """Collects what the tasks of one loop publish while the last portion is being stored.

    Everything here happens on the loop's thread save ``publish``, which the executor runs, one
    portion at a time; so the messages of a task are stored in the order it sent them. A waiter
    that is cancelled takes nobody with it: its message is left out where the portion has not
    gone, and otherwise stored all the same.
    """

    def __init__(
        self, publish: Callable[[Sequence[Message[Any]]], Sequence[Outcome]], executor: Executor
    ) -> None:
        self._publish = publish
        self._executor = executor
        self._loop = asyncio.get_running_loop()
        self._waiting: list[Entry] = []
        self._busy = False

    async def send(self, message: Message[Any]) -> Outcome:
        """The outcome of this message, once its portion is stored."""
        future: asyncio.Future[Outcome] = self._loop.create_future()
        self._waiting.append((message, future))
        if not self._busy:
            self._busy = True
            # Not at once: the other tasks that are ready now are to be in the same portion.
            self._loop.call_soon(self._start)
        return await future

    def _start(self) -> None:
        portion = self._take()
        if not portion:
            self._busy = False
            return
        messages = [message for message, _ in portion]
        try:
            stored = self._executor.submit(self._publish, messages)
        except RuntimeError as error:  # the app was closed, or the interpreter ends
            self._end(portion, error)
            return
        stored.add_done_callback(lambda done: self._back(portion, done))

    def _take(self) -> list[Entry]:
        """The next portion, without those whose waiter has gone."""
        portion: list[Entry] = []
        size = taken = 0
        for entry in self._waiting:
            size += entry[0].size
            if portion and (len(portion) >= PORTION_MESSAGES or size > PORTION_BYTES):
                break
            taken += 1
            if not entry[1].cancelled():
                portion.append(entry)
        del self._waiting[:taken]
        return portion

    def _back(self, portion: list[Entry], done: Any) -> None:
        error = done.exception()
        answer = error if error is not None else done.result()
        # RuntimeError: the loop was closed while its last messages were stored.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._end, portion, answer)

    def _end(self, portion: list[Entry], answer: BaseException | Sequence[Outcome]) -> None:
        if isinstance(answer, BaseException):
            for _, future in portion:
                if not future.done():
                    # One each: raised in several tasks, one error would gather their tracebacks.
                    future.set_exception(copy.copy(answer))
        else:
            for (_, future), outcome in zip(portion, answer, strict=True):
                if not future.done():
                    future.set_result(outcome)
        # Later, for the same reason as in send: those who were just answered publish again.
        self._loop.call_soon(self._start)

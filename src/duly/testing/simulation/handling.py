"""Simulated handlers: two rows and an output for each message, and their manners besides."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

from duly import errors
from duly.message import Message, Topic
from duly.store import Transaction
from duly.testing.history import about
from duly.testing.simulation.kinds import LEASE_S, MAX_RUN_S, TABLES, Place
from duly.testing.simulation.scenario import Manner
from duly.testing.simulation.world import Crash, Process, World


class Setting(Protocol):
    """What handlers of all processes share."""

    @property
    def world(self) -> World:
        """Where it all happens."""
        ...

    @property
    def place(self) -> Place:
        """Broker and store."""
        ...

    @property
    def outputs(self) -> Topic[Any]:
        """What they publish to."""
        ...

    @property
    def manners(self) -> dict[str, Manner]:
        """By message id."""
        ...

    @property
    def starts(self) -> Counter[str]:
        """How often each message was started."""
        ...


class _Handling:
    """What a handler does with one message of one run: two rows, an output, its manners."""

    def __init__(self, setting: Setting, process: Process) -> None:
        self._setting = setting
        self._process = process

    def _write_one(
        self, table: str, message: Message[Any], run: str, tx: Transaction[Any] | None
    ) -> None:
        if tx is not None:
            self._setting.place.insert(tx.connection, table, run, about(message))
            row = "one row" if table == TABLES[0] else "both rows"
            self._process.point(f"handler: {row} written")

    def _publish(self, message: Message[Any], run: str, tx: Transaction[Any] | None) -> None:
        if tx is not None:
            tx.publish(self._setting.outputs, int(message.body), id=f"out-{run}")

    def _started(self, message: Message[Any]) -> tuple[Manner, bool]:
        """How it treats the message, and whether this is the message's first start."""
        setting = self._setting
        setting.starts[message.id] += 1
        return setting.manners[message.id], setting.starts[message.id] == 1

    def _behave(self, manner: Manner, first: bool, tx: Transaction[Any] | None) -> None:
        world = self._setting.world
        match manner:
            case "fail once" if first:
                raise ValueError("it fails the first time")
            case "fail always":
                raise ValueError("it always fails")
            case "retry" if first:
                raise errors.Retry("later", in_s=0.5)
            case "reject once" if first:
                raise errors.Reject("not now")
            case "reject":
                raise errors.Reject("never")
            case "cancel once" if first:
                world.record_fault(self._process, "cancel", "handler")
                raise asyncio.CancelledError
            case "die once" if first:
                self._die()
            case "die always":
                self._die()
            case "lose once" if first and tx is not None:
                world.record_fault(self._process, "rolled back inside", "handler")
                self._setting.place.lose(tx.connection)
            case "slow":
                world.clock.now += LEASE_S / 8
            case _:
                pass

    def _die(self) -> None:
        self._setting.world.record_fault(self._process, "crash", "handler: in the middle")
        self._process.die("crash")


class HandlerOf(_Handling):
    """The handler of one process. ``hang`` lets its worker hang."""

    def __init__(self, setting: Setting, process: Process, hang: Callable[[], NoReturn]) -> None:
        super().__init__(setting, process)
        self._hang = hang

    def __call__(self, given: Any, tx: Transaction[Any] | None = None) -> None:
        """Handle one message, or a batch."""
        del given  # of a payload nobody could tell which message it is
        recording = self._process.recording
        messages, runs = list(recording.messages), list(recording.runs)
        for message, run in zip(messages, runs, strict=True):
            self._process.point("handler: before")
            self._write_one(TABLES[0], message, run, tx)
            self._write_one(TABLES[1], message, run, tx)
            self._publish(message, run, tx)
            manner, first = self._started(message)
            if manner == "hang once" and first:
                self._hang()
            self._behave(manner, first, tx)
            self._process.point("handler: after")


class AsyncHandlerOf(_Handling):
    """The same as a coroutine. Between any two of its lines others of the loop may come."""

    async def __call__(self, given: Any, tx: Transaction[Any] | None = None) -> None:
        """Handle one message, or a batch."""
        del given  # of a payload nobody could tell which message it is
        recording = self._process.recording
        messages, runs = list(recording.messages), list(recording.runs)
        for message, run in zip(messages, runs, strict=True):
            self._process.point("handler: before")
            await self._wait()
            self._write_one(TABLES[0], message, run, tx)
            await self._wait()
            self._write_one(TABLES[1], message, run, tx)
            self._publish(message, run, tx)
            manner, first = self._started(message)
            if manner == "hang once" and first:
                await asyncio.sleep(10 * MAX_RUN_S)  # cancelled when its time is over
            self._behave(manner, first, tx)
            await self._wait()
            self._process.point("handler: after")

    async def _wait(self) -> None:
        """Let others of the loop have a turn, or some, or a while."""
        order = self._setting.world.order
        await asyncio.sleep(order.choice((0.0, 0.0, 0.0, 0.05, 0.5)))
        if self._process.is_gone:
            raise Crash

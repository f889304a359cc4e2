"""`Resolver`: makes what handlers use, hands it over, and tears it down."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack, ExitStack
from typing import TYPE_CHECKING, Any

from duly.consumer import Handler
from duly.dependencies.factories import Factory, Kind, name_of
from duly.dependencies.plan import Plan, Step
from duly.errors import ConfigurationError

if TYPE_CHECKING:
    import asyncio


Teardown = tuple[bool, Callable[..., Any]]
"""Whether it is to be awaited, and the context manager's exit."""


class Resolver:
    """Makes what handlers use, for one worker process. Safe to use from any thread.

    ``overrides`` replaces factories (in tests), and is read when a handler is bound.
    """

    def __init__(self, overrides: Mapping[Factory, Factory] | None = None) -> None:
        self._overrides = dict(overrides or {})
        self._plans: dict[Callable[..., Any], Plan] = {}
        self._values: dict[Factory, Any] = {}
        self._teardowns: list[Teardown] = []
        self._lock = threading.Lock()
        self._loop_lock: asyncio.Lock | None = None

    def bind(self, handler: Handler) -> Callable[..., Any]:
        """The handler as a function of its positional parameters only.

        The very function where it uses nothing. Raises `ConfigurationError` where an override
        is async and the handler is not.
        """
        if not handler.uses:
            return handler.function
        plan = self._plans[handler.function] = Plan(handler.uses, self._overrides)
        if handler.is_async:
            import asyncio

            self._loop_lock = self._loop_lock or asyncio.Lock()
            return self._bound_async(handler.function, plan)
        for step in plan.steps:
            if step.kind.is_async:
                raise ConfigurationError(
                    f"{name_of(handler.function)} is a def and cannot use {name_of(step.factory)}, "
                    "which is async"
                )
        return self._bound(handler.function, plan)

    def uses_worker_values(self, handler: Handler) -> bool:
        """Whether a handler that is bound uses something that is made once for the worker."""
        plan = self._plans.get(handler.function)
        return plan is not None and any(step.per_worker for step in plan.steps)

    def make(self, handler: Handler) -> None:
        """Make now what a ``def`` handler uses of the worker's; raises what a factory raises."""
        plan = self._plans[handler.function]
        values: list[Any] = []
        for step in plan.steps:
            values.append(self._worker_value(step, values) if step.per_worker else None)

    async def amake(self, handler: Handler) -> None:
        """The same for an ``async def`` handler, on the loop that it runs on."""
        plan = self._plans[handler.function]
        values: list[Any] = []
        for step in plan.steps:
            # What is made for a message is no part of what is made for the worker.
            values.append(await self._make_async(step, values, None) if step.per_worker else None)

    def close(self) -> None:
        """Tear down the worker's values, last made first; async ones are left to `aclose`."""
        failures: list[Exception] = []
        for _, close in self._take(lambda is_async: not is_async):
            try:
                close(None, None, None)
            except Exception as error:  # noqa: BLE001 - raised below, after the others
                failures.append(error)
        _raise(failures)

    async def aclose(self) -> None:
        """Tear down all of the worker's values, on the loop that made the async ones."""
        failures: list[Exception] = []
        for is_async, close in self._take(lambda _: True):
            try:
                closed = close(None, None, None)
                if is_async:
                    await closed
            except Exception as error:  # noqa: BLE001 - raised below, after the others
                failures.append(error)
        _raise(failures)

    def _take(self, wanted: Callable[[bool], bool]) -> list[Teardown]:
        with self._lock:
            taken = [teardown for teardown in reversed(self._teardowns) if wanted(teardown[0])]
            self._teardowns = [kept for kept in self._teardowns if not wanted(kept[0])]
            self._values.clear()
            return taken

    # --- def handlers

    def _bound(self, function: Callable[..., Any], plan: Plan) -> Callable[..., Any]:
        def run_plain(*args: Any) -> Any:
            values: list[Any] = []
            for step in plan.steps:
                values.append(self._make(step, values, None))
            return function(*args, **plan.keywords(values))

        def run_torn_down(*args: Any) -> Any:
            failure: BaseException | None = None
            with ExitStack() as stack:
                values: list[Any] = []
                for step in plan.steps:
                    values.append(self._make(step, values, stack))
                try:
                    return function(*args, **plan.keywords(values))
                except BaseException as error:
                    failure = error
                    raise
            # Only a teardown that swallowed an exception leads here.
            raise failure or RuntimeError("a dependency swallowed another one's failure")

        return functools.wraps(function)(run_torn_down if plan.has_teardown else run_plain)

    def _make(self, step: Step, values: list[Any], stack: ExitStack | AsyncExitStack | None) -> Any:
        if step.per_worker:
            return self._worker_value(step, values)
        made = step.make(**step.arguments(values))
        if step.kind is Kind.CONTEXT and stack is not None:
            return stack.enter_context(made)
        return made

    def _worker_value(self, step: Step, values: list[Any]) -> Any:
        try:
            return self._values[step.factory]
        except KeyError:
            pass
        with self._lock:
            if step.factory not in self._values:
                made = step.make(**step.arguments(values))
                if step.kind is Kind.CONTEXT:
                    close, made = made.__exit__, made.__enter__()
                    self._teardowns.append((False, close))
                self._values[step.factory] = made
            return self._values[step.factory]

    # --- async def handlers

    def _bound_async(self, function: Callable[..., Any], plan: Plan) -> Callable[..., Any]:
        async def run_plain(*args: Any) -> Any:
            values: list[Any] = []
            for step in plan.steps:
                values.append(await self._make_async(step, values, None))
            return await function(*args, **plan.keywords(values))

        async def run_torn_down(*args: Any) -> Any:
            failure: BaseException | None = None
            async with AsyncExitStack() as stack:
                values: list[Any] = []
                for step in plan.steps:
                    values.append(await self._make_async(step, values, stack))
                try:
                    return await function(*args, **plan.keywords(values))
                except BaseException as error:
                    failure = error
                    raise
            raise failure or RuntimeError("a dependency swallowed another one's failure")

        return functools.wraps(function)(run_torn_down if plan.has_teardown else run_plain)

    async def _make_async(self, step: Step, values: list[Any], stack: AsyncExitStack | None) -> Any:
        if not step.kind.is_async:
            return self._make(step, values, stack)
        if step.per_worker:
            return await self._async_worker_value(step, values)
        made = step.make(**step.arguments(values))
        if step.kind is Kind.ASYNC_VALUE:
            return await made
        return made if stack is None else await stack.enter_async_context(made)

    async def _async_worker_value(self, step: Step, values: list[Any]) -> Any:
        try:
            return self._values[step.factory]
        except KeyError:
            pass
        assert self._loop_lock is not None
        async with self._loop_lock:
            if step.factory not in self._values:
                made = step.make(**step.arguments(values))
                if step.kind is Kind.ASYNC_VALUE:
                    made = await made
                else:
                    close, made = made.__aexit__, await made.__aenter__()
                    self._teardowns.append((True, close))
                self._values[step.factory] = made
            return self._values[step.factory]


def _raise(failures: list[Exception]) -> None:
    if failures:
        raise ExceptionGroup("dependencies failed when they were torn down", failures)

"""What a handler needs besides its message: `use`, and the `Resolver` that a worker runs it with.

A dependency is a factory named in a keyword-only default::

    def session() -> Iterator[Session]:
        with Session(engine) as opened:
            yield opened

    @app.consumer(rides, name="board", guarantee="at-least-once")
    def show(ride: Ride, *, db: Session = duly.use(session)) -> None: ...

What is torn down is torn down before the message is settled or the transaction commits, and
sees what the handler raised. It cannot turn that into a success: only the handler itself says
how a message ended.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    ExitStack,
)
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from duly.consumer import Handler
from duly.errors import ConfigurationError

if TYPE_CHECKING:
    import asyncio

    # By these, and not by the protocol of context managers: a connection is one too, and a
    # factory that returns a connection gives the connection.
    from contextlib import _AsyncGeneratorContextManager, _GeneratorContextManager

T = TypeVar("T")
Per = Literal["message", "worker"]
Factory = Callable[..., Any]


class Kind(Enum):
    """What calling a factory gives."""

    VALUE = auto()
    CONTEXT = auto()
    ASYNC_VALUE = auto()
    ASYNC_CONTEXT = auto()

    @property
    def is_async(self) -> bool:
        """Whether only an ``async def`` handler can use it."""
        return self in (Kind.ASYNC_VALUE, Kind.ASYNC_CONTEXT)


@dataclass(frozen=True, slots=True, eq=False)
class Use:
    """The default of a keyword parameter that a worker fills."""

    factory: Factory
    per: Per


@overload
def use(factory: Callable[[], _AsyncGeneratorContextManager[T]], *, per: Per = "message") -> T: ...
@overload
def use(factory: Callable[[], _GeneratorContextManager[T]], *, per: Per = "message") -> T: ...
@overload
def use(factory: Callable[[], AsyncIterator[T]], *, per: Per = "message") -> T: ...
@overload
def use(factory: Callable[[], Iterator[T]], *, per: Per = "message") -> T: ...
@overload
def use(factory: Callable[[], Coroutine[Any, Any, T]], *, per: Per = "message") -> T: ...
@overload
def use(factory: Callable[[], T], *, per: Per = "message") -> T: ...
def use(factory: Factory, *, per: Per = "message") -> Any:
    """What ``factory`` gives, made when the handler runs: the default of a keyword parameter.

    The factory is a function, a generator (what follows ``yield`` tears down), a function of
    `contextlib.contextmanager`, or the async form of each, for ``async def`` handlers only. Its
    own parameters, if any, are dependencies too. ``per="message"``: made for each run of the
    handler (each batch of a batch consumer) and shared by all that use it there.
    ``per="worker"``: made once in a worker process, when first needed, and torn down when the
    worker stops. Sync factories of ``async def`` handlers run on the event loop: they may not
    block. Raises `ConfigurationError`.
    """
    if not callable(factory):
        raise ConfigurationError(
            f"duly.use({factory!r}): give the function that makes the value, not a value"
        )
    if per not in ("message", "worker"):
        raise ConfigurationError(f'duly.use(per={per!r}): there are "message" and "worker"')
    found = Use(factory, per)
    for needed in uses_of(factory, f"the dependency {_name(factory)}").values():
        if per == "worker" and needed.per == "message":
            raise ConfigurationError(
                f'duly.use({_name(factory)}, per="worker") needs {_name(needed.factory)}, which '
                "is made for each message; a worker's value cannot be built on it"
            )
    return found


def uses_of(factory: Factory, where: str) -> dict[str, Use]:
    """The dependencies among a factory's parameters.

    Raises `ConfigurationError` for a parameter that nobody would fill.
    """
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature: it takes nothing from here
        return {}
    found: dict[str, Use] = {}
    for parameter in parameters:
        if isinstance(parameter.default, Use):
            if parameter.kind is parameter.POSITIONAL_ONLY:
                raise ConfigurationError(
                    f"{where}: {parameter.name!r} is given by keyword, so it cannot be positional"
                )
            found[parameter.name] = parameter.default
        elif parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            raise ConfigurationError(
                f"{where} has a parameter {parameter.name!r} that nothing fills: give it a "
                "default, duly.use(...) or a value"
            )
    return found


def check_colours(uses: Mapping[str, Use], where: str) -> None:
    """Refuse what a ``def`` handler cannot wait for. Raises `ConfigurationError`."""
    for name, found in uses.items():
        if _kind(found.factory).is_async:
            raise ConfigurationError(
                f"{where} is a def, and its dependency {name!r} is made by "
                f"{_name(found.factory)}, which is async. Make the handler async def, or give "
                "a factory that is not async."
            )
        check_colours(uses_of(found.factory, _name(found.factory)), where)


def innermost(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function that decides the colour: without partials, and an object's ``__call__``."""
    while isinstance(function, functools.partial):
        function = function.func
    if inspect.isroutine(function) or inspect.isclass(function):
        return function
    return getattr(function, "__call__", function)  # noqa: B004 - its colour, not its presence


def _kind(factory: Factory) -> Kind:
    called = innermost(factory)
    for function in (called, inspect.unwrap(called)):
        if inspect.iscoroutinefunction(function):
            return Kind.ASYNC_VALUE
        if inspect.isasyncgenfunction(function):
            return Kind.ASYNC_CONTEXT
        if inspect.isgeneratorfunction(function):
            return Kind.CONTEXT
    return Kind.VALUE


def _name(factory: Factory) -> str:
    return getattr(factory, "__qualname__", None) or repr(factory)


def _opened(factory: Factory) -> Callable[..., AbstractContextManager[Any]]:
    """The factory as one of context managers, also where a decorator hides its generator."""

    def open_it(**needed: Any) -> AbstractContextManager[Any]:
        made = factory(**needed)
        if inspect.isgenerator(made):
            return contextlib.contextmanager(lambda: made)()
        return made if hasattr(made, "__exit__") else contextlib.nullcontext(made)

    return open_it


def _opened_async(factory: Factory) -> Callable[..., AbstractAsyncContextManager[Any]]:
    def open_it(**needed: Any) -> AbstractAsyncContextManager[Any]:
        made = factory(**needed)
        if inspect.isasyncgen(made):
            return contextlib.asynccontextmanager(lambda: made)()
        return made if hasattr(made, "__aexit__") else contextlib.nullcontext(made)

    return open_it


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One value to make. ``needs`` pairs the factory's keywords with earlier steps' indexes."""

    factory: Factory
    make: Callable[..., Any]
    kind: Kind
    per_worker: bool
    needs: tuple[tuple[str, int], ...]

    def arguments(self, values: list[Any]) -> dict[str, Any]:
        """The factory's keywords, from the values made before."""
        return {name: values[index] for name, index in self.needs}


class Plan:
    """The values of one handler in the order to make them, each once."""

    def __init__(self, uses: Mapping[str, Use], overrides: Mapping[Factory, Factory]) -> None:
        self.steps: list[Step] = []
        self._overrides = overrides
        self._places: dict[Factory, int] = {}
        self._open: list[Factory] = []
        self.given = tuple((name, self._place(found)) for name, found in uses.items())

    @property
    def has_teardown(self) -> bool:
        """Whether something made for a message is to be torn down after it."""
        return any(
            not step.per_worker and step.kind in (Kind.CONTEXT, Kind.ASYNC_CONTEXT)
            for step in self.steps
        )

    def keywords(self, values: list[Any]) -> dict[str, Any]:
        """The handler's keywords."""
        return {name: values[index] for name, index in self.given}

    def _place(self, found: Use) -> int:
        factory = self._overrides.get(found.factory, found.factory)
        if factory in self._places:
            return self._places[factory]
        if factory in self._open:
            raise ConfigurationError(
                f"the dependency {_name(factory)} needs itself; app.overrides replaces a factory "
                "everywhere, also inside its replacement"
            )
        self._open.append(factory)
        needed = uses_of(factory, f"the dependency {_name(factory)}")
        needs = tuple((name, self._place(use)) for name, use in needed.items())
        self._open.remove(factory)
        kind = _kind(factory)
        make = {
            Kind.VALUE: lambda f: f,
            Kind.ASYNC_VALUE: lambda f: f,
            Kind.CONTEXT: _opened,
            Kind.ASYNC_CONTEXT: _opened_async,
        }[kind](factory)
        self.steps.append(Step(factory, make, kind, found.per == "worker", needs))
        self._places[factory] = len(self.steps) - 1
        return self._places[factory]


class Resolver:
    """Makes what handlers use, for one worker process. Safe to use from any thread.

    ``overrides`` replaces factories (in tests), and is read when a handler is bound.
    """

    def __init__(self, overrides: Mapping[Factory, Factory] | None = None) -> None:
        self._overrides = dict(overrides or {})
        self._values: dict[Factory, Any] = {}
        self._open: list[AbstractContextManager[Any] | AbstractAsyncContextManager[Any]] = []
        self._lock = threading.Lock()
        self._loop_lock: asyncio.Lock | None = None

    def bind(self, handler: Handler) -> Callable[..., Any]:
        """The handler as a function of its positional parameters only.

        The very function where it uses nothing. Raises `ConfigurationError` where an override
        is async and the handler is not.
        """
        if not handler.uses:
            return handler.function
        plan = Plan(handler.uses, self._overrides)
        if handler.is_async:
            import asyncio

            self._loop_lock = self._loop_lock or asyncio.Lock()
            return self._bound_async(handler.function, plan)
        for step in plan.steps:
            if step.kind.is_async:
                raise ConfigurationError(
                    f"{_name(handler.function)} is a def and cannot use {_name(step.factory)}, "
                    "which is async"
                )
        return self._bound(handler.function, plan)

    def close(self) -> None:
        """Tear down the worker's values, last made first; async ones are left to `aclose`."""
        failures = [
            failure
            for opened in self._take(AbstractContextManager)
            if (failure := _close(opened)) is not None
        ]
        if failures:
            raise ExceptionGroup("dependencies failed when they were torn down", failures)

    async def aclose(self) -> None:
        """Tear down the worker's values, async ones too, on the loop that made them."""
        failures: list[Exception] = []
        for opened in self._take(object):
            if not hasattr(opened, "__aexit__"):
                failure = _close(opened)
            else:
                failure = None
                try:
                    await opened.__aexit__(None, None, None)
                except Exception as error:  # noqa: BLE001 - raised below, after the others
                    failure = error
            if failure is not None:
                failures.append(failure)
        if failures:
            raise ExceptionGroup("dependencies failed when they were torn down", failures)

    def _take(self, kind: type[Any]) -> list[Any]:
        with self._lock:
            taken = [opened for opened in reversed(self._open) if isinstance(opened, kind)]
            self._open = [opened for opened in self._open if opened not in taken]
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
                    opened, made = made, made.__enter__()
                    self._open.append(opened)
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
                    opened, made = made, await made.__aenter__()
                    self._open.append(opened)
                self._values[step.factory] = made
            return self._values[step.factory]


def _close(opened: Any) -> Exception | None:
    try:
        opened.__exit__(None, None, None)
    except Exception as error:  # noqa: BLE001 - the caller raises it, after closing the others
        return error
    return None

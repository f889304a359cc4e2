"""`use`, and what can be known of a factory before it is called."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from duly.errors import ConfigurationError

if TYPE_CHECKING:
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
    ``per="worker"``: made once in a worker process, before the consumer's first claim, and torn
    down when the worker stops; while it cannot be made the consumer claims nothing, and no message
    is charged with it. Sync factories of ``async def`` handlers run on the event loop: they may not
    block. Raises `ConfigurationError`.
    """
    if not callable(factory):
        raise ConfigurationError(
            f"duly.use({factory!r}): give the function that makes the value, not a value"
        )
    if per not in ("message", "worker"):
        raise ConfigurationError(f'duly.use(per={per!r}): there are "message" and "worker"')
    found = Use(factory, per)
    for needed in uses_of(factory, f"the dependency {name_of(factory)}").values():
        if per == "worker" and needed.per == "message":
            raise ConfigurationError(
                f'duly.use({name_of(factory)}, per="worker") needs {name_of(needed.factory)}, '
                "which is made for each message; a worker's value cannot be built on it"
            )
    return found


def uses_of(factory: Factory, where: str) -> dict[str, Use]:
    """The dependencies among a factory's parameters.

    Raises `ConfigurationError` for a parameter that nobody would fill.
    """
    try:
        parameters = signature_of(factory).parameters.values()
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


def signature_of(function: Callable[..., Any]) -> inspect.Signature:
    """Its parameters, whatever their annotations are. Raises what `inspect.signature` raises."""
    if sys.version_info >= (3, 14):  # annotations are evaluated when asked for, which may fail
        import annotationlib

        return inspect.signature(function, annotation_format=annotationlib.Format.FORWARDREF)
    return inspect.signature(function)


def check_colours(uses: Mapping[str, Use], where: str) -> None:
    """Refuse what a ``def`` handler cannot wait for. Raises `ConfigurationError`."""
    for name, found in uses.items():
        if kind_of(found.factory).is_async:
            raise ConfigurationError(
                f"{where} is a def, and its dependency {name!r} is made by "
                f"{name_of(found.factory)}, which is async. Make the handler async def, or give "
                "a factory that is not async."
            )
        check_colours(uses_of(found.factory, name_of(found.factory)), where)


def innermost(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function that decides the colour: without partials, and an object's ``__call__``."""
    while isinstance(function, functools.partial):
        function = function.func
    if inspect.isroutine(function) or inspect.isclass(function):
        return function
    return getattr(function, "__call__", function)  # noqa: B004 - its colour, not its presence


def kind_of(factory: Factory) -> Kind:
    """What calling the factory gives, decided before it is called."""
    called = innermost(factory)
    for function in (called, inspect.unwrap(called)):
        if inspect.iscoroutinefunction(function):
            return Kind.ASYNC_VALUE
        if inspect.isasyncgenfunction(function):
            return Kind.ASYNC_CONTEXT
        if inspect.isgeneratorfunction(function):
            return Kind.CONTEXT
    return Kind.VALUE


def name_of(factory: Factory) -> str:
    """The factory as an error names it."""
    return getattr(factory, "__qualname__", None) or repr(factory)

"""The values of one handler, in the order to make them."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass
from typing import Any

from duly.dependencies.factories import Factory, Kind, Use, kind_of, name_of, uses_of
from duly.errors import ConfigurationError


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
                f"the dependency {name_of(factory)} needs itself; app.overrides replaces a factory "
                "everywhere, also inside its replacement"
            )
        self._open.append(factory)
        needed = uses_of(factory, f"the dependency {name_of(factory)}")
        needs = tuple((name, self._place(use)) for name, use in needed.items())
        self._open.remove(factory)
        kind = kind_of(factory)
        make = {
            Kind.VALUE: lambda f: f,
            Kind.ASYNC_VALUE: lambda f: f,
            Kind.CONTEXT: _opened,
            Kind.ASYNC_CONTEXT: _opened_async,
        }[kind](factory)
        self.steps.append(Step(factory, make, kind, found.per == "worker", needs))
        self._places[factory] = len(self.steps) - 1
        return self._places[factory]

"""Statement logic without a driver: generators that yield statements and receive rows.

A function such as ``claim(...)`` is written once as `Steps`; a driver of either colour runs it
(`run` or `arun`). Statements are named blocks of a dialect's ``.sql`` file:

::

    -- name: take_cursor
    -- One line that says what it is for.
    select ...
"""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping, Sequence
from importlib import resources
from typing import Any, Protocol, TypeVar

import msgspec

R = TypeVar("R")


class Ask(msgspec.Struct, frozen=True, gc=False):
    """Run one statement; receives its rows as a list of tuples (empty where it has none)."""

    name: str
    params: Sequence[Any] | Mapping[str, Any] = ()

    def by(self, executor: Executor) -> list[tuple[Any, ...]]:
        """Done by this driver; of an `AsyncExecutor`, to be awaited."""
        return executor.ask(self.name, self.params)


class Many(msgspec.Struct, frozen=True, gc=False):
    """Run one statement for each row of parameters; receives the number of rows changed.

    ``shared`` are the same for every row: ?1, ?2, ... of an insert whose plain ? are the row's.
    """

    name: str
    rows: Sequence[Sequence[Any]]
    shared: Sequence[Any] = ()

    def by(self, executor: Executor) -> int:
        """Done by this driver; of an `AsyncExecutor`, to be awaited."""
        return executor.many(self.name, self.rows, self.shared)


class Each(msgspec.Struct, frozen=True, gc=False):
    """Ask for one row for each of many parameters; receives it, or None, for each in order."""

    name: str
    rows: Sequence[Sequence[Any]]

    def by(self, executor: Executor) -> Sequence[tuple[Any, ...] | None]:
        """Done by this driver; of an `AsyncExecutor`, to be awaited."""
        return executor.each(self.name, self.rows)


class Column(msgspec.Struct, frozen=True, gc=False):
    """Run one statement; receives the first column of its rows as a list. For long results: a
    tuple for each row that nobody keeps is memory that the next rows would have used again.
    """

    name: str
    params: Sequence[Any] = ()

    def by(self, executor: Executor) -> list[Any]:
        """Done by this driver; of an `AsyncExecutor`, to be awaited."""
        return executor.column(self.name, self.params)


class Change(msgspec.Struct, frozen=True, gc=False):
    """Run one statement; receives how many rows it changed."""

    name: str
    params: Sequence[Any] = ()

    def by(self, executor: Executor) -> int:
        """Done by this driver; of an `AsyncExecutor`, to be awaited."""
        return executor.change(self.name, self.params)


class Step(Protocol):
    """What steps yield; a driver may have others than these."""

    def by(self, executor: Any) -> Any:
        """Done by this driver; of an `AsyncExecutor`, to be awaited."""
        ...


Steps = Generator[Step, Any, R]


class Executor(Protocol):
    """What `run` needs of a driver: calls by statement name."""

    def ask(self, name: str, params: Any) -> list[tuple[Any, ...]]:
        """Run one statement and return its rows."""
        ...

    def many(self, name: str, rows: Sequence[Sequence[Any]], shared: Sequence[Any]) -> int:
        """Run one statement for each row and return how many rows changed."""
        ...

    def each(self, name: str, rows: Sequence[Sequence[Any]]) -> Sequence[tuple[Any, ...] | None]:
        """Ask for one row for each of these parameters."""
        ...

    def column(self, name: str, params: Any) -> list[Any]:
        """Run one statement and return the first column of its rows."""
        ...

    def change(self, name: str, params: Any) -> int:
        """Run one statement and return how many rows changed."""
        ...


def run(executor: Executor, steps: Steps[R]) -> R:
    """Drive ``steps`` to their result. A driver's error is thrown into the steps."""
    try:
        step = next(steps)
        while True:
            try:
                answer = step.by(executor)
            except Exception as error:  # noqa: BLE001 - it belongs to the steps
                step = steps.throw(error)
            else:
                step = steps.send(answer)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]


class AsyncExecutor(Protocol):
    """The same calls, awaited, for `arun`."""

    async def ask(self, name: str, params: Any) -> list[tuple[Any, ...]]:
        """Run one statement and return its rows."""
        ...

    async def many(self, name: str, rows: Sequence[Sequence[Any]], shared: Sequence[Any]) -> int:
        """Run one statement for each row and return how many rows changed."""
        ...

    async def each(
        self, name: str, rows: Sequence[Sequence[Any]]
    ) -> Sequence[tuple[Any, ...] | None]:
        """Ask for one row for each of these parameters."""
        ...

    async def column(self, name: str, params: Any) -> list[Any]:
        """Run one statement and return the first column of its rows."""
        ...

    async def change(self, name: str, params: Any) -> int:
        """Run one statement and return how many rows changed."""
        ...


async def arun(executor: AsyncExecutor, steps: Steps[R]) -> R:
    """`run` for a driver whose calls are awaited."""
    try:
        step = next(steps)
        while True:
            try:
                answer = await step.by(executor)
            except Exception as error:  # noqa: BLE001 - it belongs to the steps
                step = steps.throw(error)
            else:
                step = steps.send(answer)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]


_BLOCK = re.compile(r"^-- name: (\w+)$", re.MULTILINE)


def statements(dialect: str) -> Mapping[str, str]:
    """The named statements of ``sql/<dialect>.sql``."""
    text = resources.files("duly.sql").joinpath(f"{dialect}.sql").read_text(encoding="utf-8")
    parts = _BLOCK.split(text)
    found: dict[str, str] = {}
    for name, block in zip(parts[1::2], parts[2::2], strict=True):
        if name in found:
            raise ValueError(f"{dialect}.sql names the statement {name} twice")
        found[name] = _without_comments(block)
    return found


def _without_comments(block: str) -> str:
    lines = (line for line in block.splitlines() if not line.lstrip().startswith("--"))
    return "\n".join(lines).strip().rstrip(";")

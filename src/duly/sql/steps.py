"""Statement logic without a driver: generators that yield statements and receive rows.

A function such as ``claim(...)`` is written once as `Steps`; a driver of either colour runs it
(`run` is the sync one). Statements are named blocks of a dialect's ``.sql`` file:

::

    -- name: take_cursor
    -- One line that says what it is for.
    select ...
"""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple, Protocol, TypeVar

R = TypeVar("R")


class Ask(NamedTuple):
    """Run one statement; receives its rows as a list of tuples (empty where it has none)."""

    name: str
    params: Sequence[Any] | Mapping[str, Any] = ()


class Many(NamedTuple):
    """Run one statement for each row of parameters; receives the number of rows changed.

    ``shared`` are the same for every row: ?1, ?2, ... of an insert whose plain ? are the row's.
    """

    name: str
    rows: Sequence[Sequence[Any]]
    shared: Sequence[Any] = ()


Steps = Generator[Ask | Many, Any, R]


class Executor(Protocol):
    """What `run` needs of a driver: two calls, by statement name."""

    def ask(self, name: str, params: Any) -> list[tuple[Any, ...]]:
        """Run one statement and return its rows."""
        ...

    def many(self, name: str, rows: Sequence[Sequence[Any]], shared: Sequence[Any]) -> int:
        """Run one statement for each row and return how many rows changed."""
        ...


def run(executor: Executor, steps: Steps[R]) -> R:
    """Drive ``steps`` to their result. A driver's error is thrown into the steps."""
    try:
        step = next(steps)
        while True:
            try:
                if isinstance(step, Ask):
                    answer: Any = executor.ask(step.name, step.params)
                else:
                    answer = executor.many(step.name, step.rows, step.shared)
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
